"""pass@k at equal average score along training: against the baseline, seed by seed.

A recipe that learns faster has another average score at the end, and with it another pass@k. Here
each run is read at the same average scores on its own way, by linear interpolation between its
validations, where it first crosses them. Levels that a run does not cross are left out and
counted; nothing is extrapolated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rllib_distrl.comparison.results import Results, Row
from rllib_distrl.comparison.statistics import Estimate, PairedTest, estimate, paired_test

_MOST_LEVELS = 8
_STEPS = (0.01, 0.02, 0.025, 0.05, 0.1, 0.2)  # between levels: the first that gives few enough
_SMALL_K = 16


@dataclass(frozen=True)
class Matched:
    """One metric of one recipe at one level.

    Attributes:
        pairs: Seeds where this run and the baseline's cross the level; for the baseline itself
            the runs that do.
        seeds: Seeds that both have.
        value: The recipe's own value over those pairs; None without any.
        test: The paired difference to the baseline; None for the baseline and under 2 pairs.
    """

    pairs: int
    seeds: int
    value: Estimate | None
    test: PairedTest | None


def front_metrics(results: Results) -> list[str]:
    """pass@16 and the largest pass@k of the validations; best@k too where scores are graded."""
    known = results.validation_metrics
    kept = []
    for kind in ("pass@", "best@"):
        ks = [int(name.removeprefix(kind)) for name in known if name.startswith(kind)]
        kept += [f"{kind}{k}" for k in sorted({*ks} & {_SMALL_K, max(ks, default=0)}) if k > 1]
    return kept


def levels(results: Results) -> list[float]:
    """Round average scores, at most 8, that the baseline and a recipe cross with one seed."""
    paths = {
        (row.name, record.seed): [average for average, _ in record.front("pass@1")]
        for row in results.rows
        for record in row.records
    }
    shared = [
        (max(min(path), min(base)), min(max(path), max(base)))
        for (name, seed), path in paths.items()
        if name != results.baseline.name
        and (base := paths.get((results.baseline.name, seed)))
        and path
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


def matched(results: Results, row: Row, metric: str, level: float) -> Matched:
    """One metric of a recipe where it and the baseline have the same average score."""
    return _compared(results, row, _crossings(results, row, metric, [level]))


def matched_mean(results: Results, row: Row, metric: str, over: Sequence[float]) -> Matched:
    """The mean of `matched` over the levels that a run and the baseline's of its seed cross."""
    return _compared(results, row, _crossings(results, row, metric, over))


def _crossings(
    results: Results, row: Row, metric: str, over: Sequence[float]
) -> dict[int, list[tuple[float, float]]]:
    """{seed: (recipe's, baseline's) value at every level that both cross}."""
    baseline = {record.seed: record for record in results.baseline.records}
    found = {}
    for record in row.records:
        if other := baseline.get(record.seed):
            pairs = ((record.matched(x, metric), other.matched(x, metric)) for x in over)
            found[record.seed] = [(a, b) for a, b in pairs if a is not None and b is not None]
    return found


def _compared(
    results: Results, row: Row, crossings: dict[int, list[tuple[float, float]]]
) -> Matched:
    means = [
        tuple(sum(side) / len(pairs) for side in zip(*pairs, strict=True))
        for pairs in crossings.values()
        if pairs
    ]
    ours, theirs = ([mean[side] for mean in means] for side in (0, 1))
    own = row is results.baseline
    test = None if own or len(means) < 2 else paired_test(ours, theirs)
    return Matched(len(means), len(crossings), estimate(ours) if ours else None, test)
