"""Every comparison of a page with its baseline, decided together, and told in sentences."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from rllib_distrl.experiments.equal_average import equal_average_metrics, levels, mean_at_levels
from rllib_distrl.experiments.results import Results, Row, number
from rllib_distrl.experiments.statistics import (
    SIGNIFICANT,
    FloatArray,
    PairedTest,
    estimate,
    seeds_needed,
    sign_flips,
)

_AFTER, _EQUAL = "after training", "at equal average score"


@dataclass(frozen=True)
class Decisions:
    """The tests of a page, corrected for how many there are.

    Attributes:
        tests: {(where, recipe, metric): test}, of those with 2 seeds or more.
        seeds: That are paired.
        by_holm: How many Holm's bound alone would leave.
    """

    tests: dict[tuple[str, str, str], PairedTest]
    seeds: int
    by_holm: int

    def after(self, row: Row, metric: str) -> PairedTest | None:
        """After training; None for the baseline and under 2 seeds."""
        return self.tests.get((_AFTER, row.name, metric))

    def at_equal_average(self, row: Row, metric: str) -> PairedTest | None:
        """At an equal average score, the mean over the levels; None as in `after`."""
        return self.tests.get((_EQUAL, row.name, metric))

    @property
    def smallest_p(self) -> float:
        """That so many seeds can have."""
        return 2.0 ** (1 - self.seeds)

    @property
    def clear(self) -> int:
        """How many are told from 0."""
        return sum(test.clear for test in self.tests.values())


def decide(results: Results) -> Decisions:
    """Tests everything that a page compares: after training, and at an equal average score."""
    found: dict[tuple[str, str, str], tuple[dict[int, float], FloatArray | None]] = {}
    for row in results.rows[1:]:
        for metric in results.main_metrics:
            differences = results.differences(row, metric)
            problems = results.problem_differences(row, metric, list(differences))
            found[_AFTER, row.name, metric] = differences, problems
        if over := levels(results):
            for metric in equal_average_metrics(results):
                equal = mean_at_levels(results, row, metric, over)
                found[_EQUAL, row.name, metric] = equal.by_seed, equal.problems
    found = {key: one for key, one in found.items() if len(one[0]) > 1}
    seeds = sorted({seed for differences, _ in found.values() for seed in differences})
    if not found:
        return Decisions({}, max(len(row.records) for row in results.rows), 0)
    flips = sign_flips([[one.get(seed, 0.0) for seed in seeds] for one, _ in found.values()])
    estimates = [estimate(list(one.values()), problems) for one, problems in found.values()]
    p, corrected = flips.p.tolist(), flips.corrected.tolist()
    tests = {
        key: PairedTest(*one)
        for key, one in zip(found, zip(estimates, p, corrected, strict=True), strict=True)
    }
    return Decisions(tests, len(seeds), int(np.sum(flips.holm <= SIGNIFICANT)))


_MOST_NAMED = 4


def claims(results: Results, decisions: Decisions) -> list[str]:
    """How many comparisons are clear, then a sentence per metric.

    A sentence names the recipes that are told from the baseline, above and below, then those whose
    interval alone is off zero, the furthest first and four at most, and counts the others. Where
    there are too few seeds to tell anything, that stands first.
    """
    found = [_together(decisions)]
    for metric in equal_average_metrics(results):
        one = _sentence(results, metric, decisions.at_equal_average)
        found += [f"{metric} at equal average score: {one}."] if one else []
    for metric in results.main_metrics:
        if "@" in metric:
            one = _sentence(results, metric, decisions.after)
            found += [f"{metric} after training: {one}."] if one else []
    return found


def _together(decisions: Decisions) -> str:
    """How many comparisons there are, what their number costs, and what is left."""
    count, seeds, least = len(decisions.tests), decisions.seeds, decisions.smallest_p
    if least > SIGNIFICANT:
        return (
            f"{seeds} seed{'s' * (seeds != 1)} cannot show a difference, whatever its size: the "
            f"smallest p is {least:g}. What follows are directions."
        )
    holm = f"Holm's bound alone leaves {decisions.by_holm}"
    if count * least > SIGNIFICANT:
        holm += (
            f" (it needs {seeds_needed(count)} seeds to leave any of {count}; the smallest p of "
            f"{seeds} is {least:.2g})"
        )
    return f"{decisions.clear} of {count} comparisons are clear after correction. {holm}."


def _sentence(
    results: Results, metric: str, test_of: Callable[[Row, str], PairedTest | None]
) -> str:
    tests = [(row.name, test_of(row, metric)) for row in results.rows[1:]]
    told = sorted(
        ((name, test) for name, test in tests if test is not None),
        key=lambda one: -one[1].difference.mean,
    )
    if not told:
        return ""
    clear = [one for one in told if one[1].clear]
    above = [one for one in clear if one[1].difference.mean > 0]
    below = [one for one in reversed(clear) if one[1].difference.mean < 0]
    alone = [one for one in told if not one[1].clear and not one[1].difference.holds_zero]
    alone.sort(key=lambda one: -abs(one[1].difference.mean))
    unclear, untold = len(told) - len(clear) - len(alone), len(tests) - len(told)
    parts = [f"above {results.baseline.name}: {_listed(metric, above)}"]
    parts += [f"below: {_listed(metric, below)}"] if below else []
    parts += [f"interval off zero, not clear: {_listed(metric, alone)}"] if alone else []
    parts += [f"not told apart: {unclear}"] if unclear else []
    parts += [f"too few seeds to tell: {untold}"] if untold else []
    return "; ".join(parts)


def _listed(metric: str, tests: Iterable[tuple[str, PairedTest]]) -> str:
    """The first four with their intervals, and how many more there are."""
    names = [_named(metric, *one) for one in tests]
    more = [f"and {len(names) - _MOST_NAMED} more"] if len(names) > _MOST_NAMED else []
    return ", ".join([*names[:_MOST_NAMED], *more]) or "none"


def _named(metric: str, name: str, test: PairedTest) -> str:
    found = test.difference
    low, high = (number(metric, end, signed=True) for end in (found.low, found.high))
    return f"{name} {number(metric, found.mean, signed=True)} [{low}, {high}]"
