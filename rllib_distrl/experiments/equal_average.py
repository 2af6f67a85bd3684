"""pass@k at equal average score along training: against the baseline, seed by seed.

A recipe that learns faster has another average score at the end, and with it another pass@k. Here
each run is read at the same average scores on its own way, on a smooth fit through its validations
(`ValidationFit`). Levels that a run does not reach are left out and counted; nothing is
extrapolated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rllib_distrl.experiments.results import Results, Row
from rllib_distrl.experiments.statistics import Estimate, FloatArray, estimate

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
