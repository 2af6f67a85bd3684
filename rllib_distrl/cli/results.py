"""Tables of evaluation results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

SHARES = (0.0, 1.0)
"""Scores within these bounds are shares, shown in %; others are shown as they are."""
OF_SCORES = ("avg@", "best@", "maj@")
"""Metrics that average scores; the others are shares whatever the scores."""


def print_before_after(console: Console, results: Mapping[str, Any]) -> None:
    """Prints the table that ends a training run.

    Args:
        console: Where to.
        results: The contents of `eval.json`; shares in [0, 1], shown as percentages.
    """
    before, after = results["before"], results["after"]
    scores = results.get("scores", SHARES)
    if before is None:
        print_summary(
            console, after, results["problems"], results["samples"], problems_of(results), scores
        )
        return
    table = Table()
    table.add_column("metric")
    for column in ("before", "after", "change"):
        table.add_column(column, justify="right")
    for name in (k for k in before if k in after):
        change = after[name] - before[name]
        style = "green" if change > 0 else "red" if change < 0 else ""
        signed = shown(name, change, scores, sign="+")
        table.add_row(
            name,
            shown(name, before[name], scores),
            shown(name, after[name], scores),
            f"[{style}]{signed}[/]" if style else signed,
        )
    _print(console, table, results["problems"], results["samples"], problems_of(results), scores)


def print_summary(
    console: Console,
    summary: Mapping[str, float],
    problems: int,
    samples: int,
    kind: str,
    scores: Sequence[float] = SHARES,
) -> None:
    """Prints the table of one evaluation.

    Args:
        console: Where to.
        summary: Shares in [0, 1], or means of scores.
        problems: How many.
        samples: Completions of each.
        kind: What problems they are; see `problems_of`.
        scores: The lowest and the highest score.
    """
    table = Table()
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in summary.items():
        table.add_row(name, shown(name, value, scores))
    _print(console, table, problems, samples, kind, scores)


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


def _print(
    console: Console,
    table: Table,
    problems: int,
    samples: int,
    kind: str,
    scores: Sequence[float],
) -> None:
    numbers = ", averages of scores as they are" if _is_number("avg@", scores) else ""
    console.print(
        f"{problems} {kind}, {samples} samples each, in %{numbers}:",
        highlight=False,
        soft_wrap=True,
    )
    console.print(table)
