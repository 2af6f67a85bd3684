"""The tables of a comparison, as Markdown and as HTML."""

from __future__ import annotations

from rllib_distrl.experiments.decisions import Decisions
from rllib_distrl.experiments.equal_average import (
    AtEqualAverage,
    at_level,
    equal_average_metrics,
    levels,
    mean_at_levels,
)
from rllib_distrl.experiments.results import Results, Row, number
from rllib_distrl.experiments.statistics import Estimate, PairedTest
from rllib_distrl.viewer.html import Table

_NOTHING = "–"


def results_table(results: Results) -> Table:
    """One row per contender: mean ± sd over the seeds."""
    metrics = results.main_metrics
    parts = any(row.part for row in results.rows)
    head = ["recipe", *(["part"] if parts else []), "seeds", *map(_title, metrics)]
    lines = [
        [
            row.name,
            *([row.part] if parts else []),
            str(len(row.records)),
            *(_spread(metric, row.estimate(metric)) for metric in metrics),
        ]
        for row in results.rows
    ]
    return Table(head, lines)


def costs_table(results: Results) -> Table:
    """One row per contender: means over the seeds of speed, iterations, optimiser steps, time."""
    return Table(["recipe", *_COSTS], [[row.name, *_costs(row)] for row in results.rows])


_COSTS = ("tokens/s", "iterations", "optimiser steps", "minutes", "minutes in all")


def _costs(row: Row) -> list[str]:
    speed = row.estimate_of(lambda record: record.tokens_per_second)
    iterations = row.estimate_of(lambda record: record.iterations)
    updates = row.estimate_of(lambda record: record.updates)
    minutes = row.estimate_of(lambda record: record.seconds / 60)
    wall = row.estimate_of(lambda record: record.wall_seconds / 60)
    found = [
        (speed, ",.0f"),
        (iterations, ",.0f"),
        (updates, ",.0f"),
        (minutes, ".1f"),
        (wall, ".1f"),
    ]
    return [format(one.mean, form) if one else _NOTHING for one, form in found]


def differences_table(results: Results, decisions: Decisions) -> Table:
    """One row per contender: the difference to the baseline by seed, with interval and p."""
    metrics = results.main_metrics
    lines = [
        [row.name, *(tested(metric, decisions.after(row, metric)) for metric in metrics)]
        for row in results.rows[1:]
    ]
    return Table(["recipe", *map(_title, metrics)], lines)


def tested(metric: str, test: PairedTest | None) -> str:
    """`+3.8 [+2.2, +5.4], p .008 → .02`: the p of the test alone, and corrected."""
    if test is None:
        return _NOTHING
    cell = _interval(metric, test.difference, signed=True)
    return f"{cell}, p {test.p:.2g} → {test.corrected:.2g}"


def pass_k_table(results: Results) -> Table:
    """Mean pass@k (best@k too where scores are graded) for every k, with 95 % intervals."""
    metrics = [name for name in results.metrics if name.startswith(("pass@", "best@"))]
    lines = [
        [row.name, *(_interval(metric, row.estimate(metric)) for metric in metrics)]
        for row in results.rows
    ]
    return Table(["recipe", *metrics], lines)


def equal_average_table(results: Results, decisions: Decisions) -> Table | None:
    """Metrics at the same average score along training, and their paired difference.

    One line per recipe and metric: the mean over the levels, then every level. None where no
    recipe has the baseline's average score on two seeds or more, or none was validated.
    """
    over = levels(results)
    head = ["recipe", "metric", "mean over levels", *(f"at {100 * x:g} %" for x in over)]
    lines, compared = [], False
    for metric in equal_average_metrics(results):
        for row in results.rows:
            mean = mean_at_levels(results, row, metric, over)
            found = [at_level(results, row, metric, level) for level in over]
            cells = [
                _equal_average_cell(metric, one, row is results.baseline) for one in (mean, *found)
            ]
            if test := decisions.at_equal_average(row, metric):
                cells[0] = f"{tested(metric, test)}; {mean.pairs} of {mean.seeds}"
                compared = True
            lines.append([row.name, metric, *cells])
    return Table(head, lines) if compared else None


def _equal_average_cell(metric: str, found: AtEqualAverage, baseline: bool) -> str:
    """The baseline's value, or the difference to it, and how many seeds reach the level."""
    count = f"{found.pairs} of {found.seeds}"
    if baseline and found.value is not None:
        return f"{_interval(metric, found.value)}; {count}"
    if found.difference is None:
        return f"{_NOTHING}; {count}"
    return f"{_interval(metric, found.difference, signed=True)}; {count}"


def failures_table(results: Results) -> Table:
    """The runs that failed, with what they said."""
    lines = [[r.name, str(r.seed), " ".join(r.error.split())] for r in results.failed]
    return Table(["recipe", "seed", "error"], lines, wraps=True)


def _title(metric: str) -> str:
    return metric.replace("_", " ")


def _spread(metric: str, found: Estimate | None) -> str:
    """Mean ± sd; the mean alone for one seed."""
    if found is None or found.seeds == 1:
        return number(metric, found.mean) if found else _NOTHING
    return f"{number(metric, found.mean)} ± {number(metric, found.sd)}"


def _interval(metric: str, found: Estimate | None, *, signed: bool = False) -> str:
    """Mean [low, high]; the mean alone for one seed."""
    if found is None or found.seeds == 1:
        return number(metric, found.mean, signed=signed) if found else _NOTHING
    mean, low, high = (
        number(metric, value, signed=signed) for value in (found.mean, found.low, found.high)
    )
    return f"{mean} [{low}, {high}]"
