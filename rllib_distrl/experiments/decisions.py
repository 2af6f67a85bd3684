"""Every comparison of a page with its baseline, decided together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rllib_distrl.experiments.matched import front_metrics, levels, matched_mean
from rllib_distrl.experiments.results import Results, Row
from rllib_distrl.experiments.statistics import (
    SIGNIFICANT,
    FloatArray,
    PairedTest,
    estimate,
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
            for metric in front_metrics(results):
                equal = matched_mean(results, row, metric, over)
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
