"""Every comparison of a page with its baseline, decided together, and told in sentences.

After training, and at equal average score along it: a recipe that learns faster has another average
at the end, and with it another pass@k. So each run is read at the same average scores on its own
way, on a smooth fit through its validations (`ValidationFit`), seed by seed. Levels that a run does
not reach are left out and counted; nothing is extrapolated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from rllib_distrl.experiments.results import Results, Row, number
from rllib_distrl.experiments.statistics import (
    SIGNIFICANT,
    Estimate,
    FloatArray,
    PairedTest,
    estimate,
    seeds_needed,
    sign_flips,
)

_MOST_LEVELS = 8
_STEPS = (0.01, 0.02, 0.025, 0.05, 0.1, 0.2)  # between levels: the first that gives few enough
_SMALL_K = 16


@dataclass(frozen=True)
class AtEqualAverage:
    """One metric of one recipe at one level.

    Attributes:
        by_seed: {seed: recipe − baseline} of the seeds where both reach a level; for the baseline
            itself zeros.
        seeds: Seeds that both have.
        value: The recipe's own value over those seeds; None without any.
        problems: (pairs, P) the differences problem by problem, where all runs keep these.
    """

    by_seed: dict[int, float]
    seeds: int
    value: Estimate | None
    problems: FloatArray | None = None

    @property
    def pairs(self) -> int:
        """Seeds where both reach the level."""
        return len(self.by_seed)

    @property
    def difference(self) -> Estimate | None:
        """To the baseline, paired; None under 2 pairs."""
        return estimate(list(self.by_seed.values()), self.problems) if self.pairs > 1 else None


def equal_average_metrics(results: Results) -> list[str]:
    """pass@16 and the largest pass@k of the validations; best@k too where scores are graded."""
    known = results.validation_metrics
    kept = []
    for kind in ("pass@", "best@"):
        ks = [int(name.removeprefix(kind)) for name in known if name.startswith(kind)]
        kept += [f"{kind}{k}" for k in sorted({*ks} & {_SMALL_K, max(ks, default=0)}) if k > 1]
    return kept


def levels(results: Results) -> list[float]:
    """Round average scores, at most 8, that the baseline and a recipe reach with one seed."""
    spans = {(row.name, r.seed): r.span() for row in results.rows for r in row.records}
    shared = [
        (max(span[0], base[0]), min(span[1], base[1]))
        for (name, seed), span in spans.items()
        if name != results.baseline.name
        and (base := spans.get((results.baseline.name, seed)))
        and span
    ]
    shared = [(low, high) for low, high in shared if low < high]
    if not shared:
        return []
    for step in _STEPS:
        grid = _multiples(min(low for low, _ in shared), max(high for _, high in shared), step)
        grid = [level for level in grid if any(low <= level <= high for low, high in shared)]
        if len(grid) <= _MOST_LEVELS:
            return grid
    return grid


def _multiples(low: float, high: float, step: float) -> list[float]:
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 6) for number in range(first, last + 1)]


def at_level(results: Results, row: Row, metric: str, level: float) -> AtEqualAverage:
    """One metric of a recipe where it and the baseline have the same average score."""
    return mean_at_levels(results, row, metric, [level])


def mean_at_levels(
    results: Results, row: Row, metric: str, over: Sequence[float]
) -> AtEqualAverage:
    """The same as the mean over the levels that a run and the baseline's of its seed reach."""
    baseline = {record.seed: record for record in results.baseline.records}
    ours: dict[int, float] = {}
    theirs: dict[int, float] = {}
    problems: list[FloatArray] = []  # of each seed (2, P)
    shared = [record for record in row.records if record.seed in baseline]
    for record in shared:
        pair = (record, baseline[record.seed])
        values = np.stack([one.at_levels(over, metric) for one in pair])
        reached = ~np.isnan(values).any(0)
        if reached.any():
            ours[record.seed], theirs[record.seed] = values[:, reached].mean(1).tolist()
            if results.problems_validated:
                both = np.asarray(over)[reached].tolist()
                tables = [one.problems_at_levels(both, metric).mean(0) for one in pair]
                problems.append(np.stack(tables))
    differences = {seed: ours[seed] - theirs[seed] for seed in ours}
    if not ours:
        return AtEqualAverage(differences, len(shared), None)
    table = np.stack(problems, axis=1) if problems else None
    value = estimate(list(ours.values()), None if table is None else table[0])
    apart = None if table is None else table[0] - table[1]
    return AtEqualAverage(differences, len(shared), value, apart)


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
