"""Tables of evaluation results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

SHARES = (0.0, 1.0)
"""Scores within these bounds are shares, shown in %; others are shown as they are."""
OF_SCORES = ("avg@", "best@", "maj@")
"""Metrics that average scores; the others are shares whatever the scores."""

_COUNTS = {"tokens": "tokens per sample", "distinct_correct": "distinct correct solutions"}
"""Estimates that are no shares, so not in %."""
_OF_CRITIC = {
    "quantile_explained_variance": "explained variance of returns",
    "quantile_state_explained_variance": "explained variance of mean returns",
    "quantile_state_rmse": "error of the value (root mean square)",
    "quantile_crps": "continuous ranked probability score",
    "quantile_coverage_50": "coverage of the central 50 %",
    "quantile_coverage_90": "coverage of the central 90 %",
    "quantile_pit_ks": "largest deviation of the PIT from uniform",
    "quantile_crossing_rate": "crossing rate",
    "quantile_spread": "spread",
    "quantile_spread_error_correlation": "spread and error, rank correlation",
    "quantile_spread_error_partial_correlation": "... given the value",
    "quantile_spread_error_partial_correlation_given_position": "... and the position",
    "optimism_stat_error_correlation": "bonus statistic and error",
    "optimism_stat_error_partial_correlation": "... given the value",
    "optimism_stat_error_partial_correlation_given_position": "... and the position",
}


def print_before_after(console: Console, results: Mapping[str, Any]) -> None:
    """Prints the table that ends a training run.

    Args:
        console: Where to.
        results: The contents of `eval.json`; shares in [0, 1], shown as percentages.
    """
    before, after = results["before"], results["after"]
    scores = results.get("scores", SHARES)
    table = _metrics("value") if before is None else _metrics("before", "after", "change")
    for name in (k for k in after if before is None or k in before):
        cells = [shown(name, after[name], scores)]
        if before is not None:
            change = after[name] - before[name]
            style = "green" if change > 0 else "red" if change < 0 else ""
            signed = Text(shown(name, change, scores, sign="+"), style)
            cells = [shown(name, before[name], scores), *cells, signed]
        table.add_row(name, *cells)
    asked = f"{results['problems']} {problems_of(results)}, {results['samples']} samples each"
    numbers = ", averages of scores as they are" if _is_number("avg@", scores) else ""
    _print(console, f"{asked}, in %{numbers}:", table)


def print_report(console: Console, report: Mapping[str, Any], data: str, problems: str) -> None:
    """Prints the table of one evaluation with its intervals.

    Args:
        console: Where to.
        report: What `EvalResult.report` returns; shares in [0, 1], shown as percentages.
        data: What was evaluated on.
        problems: What its problems are called.
    """
    table = _metrics("value", "95 % interval")
    for name, (low, high) in report["intervals"].items():
        cells = [report[name], low, high]
        if name in _COUNTS:
            value, low, high = (f"{cell:.1f}" for cell in cells)
        else:
            value, low, high = (shown(name, cell, report["scores"]) for cell in cells)
            value += unit_of(name, report["scores"])
        table.add_row(_COUNTS.get(name, name), value, f"{low} to {high}")
    samples = f"{report['samples']} sample{'s' * (report['samples'] != 1)} each"
    _print(console, f"{data}: {report['problems']} {problems}, {samples}", table)


def print_critic(console: Console, found: Mapping[str, float], split: str) -> None:
    """Prints the table of one critic; nothing where there is none."""
    if not found:
        return
    table = _metrics("value", first="critic")
    for name, label in _OF_CRITIC.items():
        if name in found:
            table.add_row(label, f"{found[name]:.3f}")
    prefixes = problems_of({"split": split}).replace("problems", "prefixes")
    each = f"{found['continuations']} continuations each:"
    _print(console, f"{found['prefixes']} {prefixes}, {each}", table)


def print_judged(console: Console, found: Mapping[str, Any]) -> None:
    """Prints what a critic's choices and stops are worth; nothing where none was asked."""
    if not found:
        return
    table = _metrics("mean score", first="chosen by the critic")
    for name, value in found.items():
        if "@" in name:
            label = f"{name} (votes count alike)" if name.startswith("maj@") else name
            table.add_row(label, f"{value:.3f}")
    _print(console, "The critic's choice among the samples:", table)
    table = _metrics("stopped", "tokens saved", "false stops", "score lost", first="below")
    for each in found["stopping"]:
        names = ("stopped", "tokens_saved", "false_stops", "score_lost")
        cells = ("-" if each[name] is None else f"{100 * each[name]:.1f}" for name in names)
        table.add_row(f"{each['threshold']:g}", *cells)
    quantile = f"{100 * found['level']:.0f} % quantile"
    _print(console, f"If a completion stopped where the critic's {quantile} is below, %:", table)


def print_audit(console: Console, found: Mapping[str, Any]) -> None:
    """Prints how often the verifier errs, and the reward that knows of it; nothing without one."""
    if not found:
        return
    table = _metrics("%", "95 % interval", "of", first="the verifier")
    rows = {
        "false_positive_rate": ("passes what is wrong", found["wrong"]),
        "false_negative_rate": ("fails what is right", found["right"]),
    }
    for name, (label, count) in rows.items():
        value, low, high = (found[name][each] for each in ("value", "low", "high"))
        shown = "-" if value is None else f"{100 * value:.1f}"
        table.add_row(label, shown, f"{100 * low:.1f} to {100 * high:.1f}", str(count))
    _print(console, f"Of {found['right'] + found['wrong']} labelled samples:", table)
    values = {name: found[name]["value"] for name in rows}
    if None not in values.values() and sum(values.values()) < 1:
        given = ", ".join(f"{name} = {value:.4g}" for name, value in values.items())
        line = f'reward_transforms = [{{ name = "noise_backward", {given} }}]'
        console.print(f"In [training]: {line}", highlight=False, markup=False, soft_wrap=True)


def knows_critic(found: Mapping[str, float]) -> bool:
    """Whether `print_critic` has something to print of it."""
    return any(name in found for name in _OF_CRITIC)


def _metrics(*columns: str, first: str = "metric") -> Table:
    """An empty table whose further columns are numbers."""
    table = Table(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _print(console: Console, header: str, table: Table) -> None:
    console.print(header, highlight=False, markup=False, soft_wrap=True)
    console.print(table)


def problems_of(results: Mapping[str, Any]) -> str:
    """What the problems of an evaluation are called: held-out only where training sees none."""
    return "training problems" if results.get("split") == "train" else "held-out problems"


def in_one_line(summary: Mapping[str, float], scores: Sequence[float] = SHARES) -> str:
    """Formats one evaluation as `avg@64 17.1 %, pass@8 60.9 %`."""
    return ", ".join(
        f"{name} {shown(name, value, scores)}{unit_of(name, scores)}"
        for name, value in summary.items()
    )


def shown(name: str, value: float, scores: Sequence[float] = SHARES, sign: str = "") -> str:
    """A metric in %, or as a number where it averages scores outside of [0, 1]."""
    return f"{value:{sign}.3f}" if _is_number(name, scores) else f"{100 * value:{sign}.1f}"


def unit_of(name: str, scores: Sequence[float]) -> str:
    """What stands behind a metric that is `shown`."""
    return "" if _is_number(name, scores) else " %"


def _is_number(name: str, scores: Sequence[float]) -> bool:
    return name.startswith(OF_SCORES) and (scores[0] < SHARES[0] or scores[1] > SHARES[1])
