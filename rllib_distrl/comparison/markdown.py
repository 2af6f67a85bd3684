"""The tables of a comparison, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from rllib_distrl.comparison.record import DISTINCT, ENTROPY
from rllib_distrl.comparison.results import Results, Row
from rllib_distrl.comparison.statistics import Estimate

_NOTHING = "–"


def is_share(metric: str) -> bool:
    """Whether a metric is shown in %."""
    return "@" in metric


def number(metric: str, value: float, *, signed: bool = False) -> str:
    """A metric's value as the tables show it: shares in %, entropy with three digits."""
    sign = "+" if signed else ""
    if is_share(metric):
        return f"{100 * value:{sign}.1f}"
    return f"{value:{sign}.3f}" if metric == ENTROPY else f"{value:{sign}.2f}"


def spread_cell(metric: str, found: Estimate | None) -> str:
    """Mean ± sd."""
    if found is None:
        return _NOTHING
    return f"{number(metric, found.mean)} ± {number(metric, found.sd)}"


def interval_cell(metric: str, found: Estimate | None, *, signed: bool = False) -> str:
    """Mean [low, high]."""
    if found is None:
        return _NOTHING
    mean, low, high = (
        number(metric, value, signed=signed) for value in (found.mean, found.low, found.high)
    )
    return f"{mean} [{low}, {high}]"


def main_metrics(results: Results) -> list[str]:
    """avg@n, pass@8, pass@16, pass@n, distinct solutions and entropy, as far as they exist."""
    known = results.metrics
    average = [name for name in known if name.startswith("avg@")]
    largest = max(int(name.partition("@")[2]) for name in known if name.startswith("pass@"))
    passes = [f"pass@{k}" for k in sorted({8, 16, largest}) if f"pass@{k}" in known]
    graded = [f"best@{k}" for k in (16, largest) if f"best@{k}" in known]
    return [*average, *passes, *graded, DISTINCT, ENTROPY]


def results_table(results: Results) -> str:
    """One row per contender: mean ± sd over the seeds."""
    metrics = main_metrics(results)
    parts = any(row.part for row in results.rows)
    head = [*(["part"] if parts else []), "recipe", "seeds", *metrics, "tokens/s", "iterations"]
    lines = [
        [
            *([row.part] if parts else []),
            row.name,
            str(len(row.records)),
            *(spread_cell(metric, row.estimate(metric)) for metric in metrics),
            *_costs(row),
        ]
        for row in results.rows
    ]
    return table(head, lines)


def _costs(row: Row) -> list[str]:
    speed = row.estimate_of(lambda record: record.tokens_per_second)
    iterations = row.estimate_of(lambda record: record.iterations)
    return [f"{found.mean:,.0f}" if found else _NOTHING for found in (speed, iterations)]


def differences_table(results: Results) -> str:
    """One row per contender: the difference to the baseline by seed, with interval and p."""
    metrics = main_metrics(results)
    lines = []
    for row in results.rows[1:]:
        cells = [row.name]
        for metric in metrics:
            test = results.against_baseline(row, metric)
            if test is None:
                cells.append(_NOTHING)
            else:
                cell = interval_cell(metric, test.difference, signed=True)
                cells.append(f"{cell}, p {test.p:.2g}")
        lines.append(cells)
    return table(["recipe", *metrics], lines)


def pass_k_table(results: Results) -> str:
    """Mean pass@k (best@k too where scores are graded) for every k, with 95 % intervals."""
    metrics = [name for name in results.metrics if name.startswith(("pass@", "best@"))]
    lines = [
        [row.name, *(interval_cell(metric, row.estimate(metric)) for metric in metrics)]
        for row in results.rows
    ]
    return table(["recipe", *metrics], lines)


def failures_table(results: Results) -> str:
    """The runs that failed, with what they said; "" if none did."""
    if not results.failed:
        return ""
    lines = [[r.name, str(r.seed), " ".join(r.error.split())] for r in results.failed]
    return table(["recipe", "seed", "error"], lines)


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    cells = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def write_up(results: Results, title: str, note: str, command: str) -> str:
    """The whole page.

    Args:
        results: What came out.
        title: The headline.
        note: Stands below it; may be empty.
        command: The command that makes it.
    """
    commits = sorted({r.commit or "unknown" for row in results.rows for r in row.records})
    seeds = sorted({record.seed for row in results.rows for record in row.records})
    first = results.baseline.records[0].recipe["eval"]
    parts = [
        f"# {title}",
        *([note] if note else []),
        f"Every run generated {results.budget_tokens:,} completion tokens in training (to the end "
        "of its last iteration), dropped samples and critic warm-up included. Shares in %, "
        f"measured on {first['problems']} {first['split']} problems x {first['n']} samples; "
        "entropy in nats per token, sampled.",
        f"Seeds: {', '.join(map(str, seeds))} · commit {', '.join(c[:12] for c in commits)}",
        f"```sh\n{command}\n```",
        "Mean ± sd over the seeds:",
        results_table(results),
        f"Difference to {results.baseline.name} on the same seeds: mean [95 % bootstrap interval "
        "over the seeds], p of the two-sided sign-flip test (its smallest value for S seeds is "
        "2^(1-S)):",
        differences_table(results),
        "pass@k, mean [95 % bootstrap interval over the seeds]:",
        pass_k_table(results),
    ]
    if results.failed:
        parts += ["Failed runs:", failures_table(results)]
    if results.missing:
        names = ", ".join(f"{name} seed {seed}" for name, seed in results.missing)
        parts.append(f"Not run: {names}.")
    return "\n\n".join(parts) + "\n"
