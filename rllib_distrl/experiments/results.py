"""The records of a comparison, arranged: one row per contender."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rllib_distrl.experiments.record import DISTINCT, ENTROPY, Record
from rllib_distrl.experiments.statistics import Estimate, FloatArray, estimate

_SAME = 1e-9


@dataclass(frozen=True)
class Row:
    """A contender's finished runs.

    Attributes:
        name: The contender's.
        part: The part of the method that it varies.
        records: By seed, ascending.
    """

    name: str
    part: str
    records: tuple[Record, ...]

    def values(self, metric: str) -> dict[int, float]:
        """{seed: number} of the runs that have the metric."""
        return {r.seed: r.metrics[metric] for r in self.records if metric in r.metrics}

    def estimate(self, metric: str) -> Estimate | None:
        """Mean and interval over seeds and problems; None without a run that has the metric."""
        found = self.values(metric)
        if not found:
            return None
        return estimate(list(found.values()), self.problem_values(metric, list(found)))

    def problem_values(self, metric: str, seeds: Sequence[int]) -> FloatArray | None:
        """(S, P) of a metric problem by problem; None where a run does not keep it."""
        by_seed = {record.seed: record for record in self.records}
        found = [by_seed[seed].problem_values(metric) for seed in seeds]
        kept = [row for row in found if row is not None]
        alike = len(kept) == len(found) and len({len(row) for row in kept}) == 1
        return np.stack(kept) if alike else None

    def estimate_of(self, read: Callable[[Record], float | None]) -> Estimate | None:
        """Mean and interval over the seeds of any number of a record; None where none has it."""
        found = [value for record in self.records if (value := read(record)) is not None]
        return estimate(found) if found else None


@dataclass(frozen=True)
class Results:
    """What came out.

    Attributes:
        rows: The contenders with a finished run, the baseline first.
        failed: The runs that failed.
        missing: Names and seeds of runs that have not been made.
        budget_tokens: Of each run.
    """

    rows: tuple[Row, ...]
    failed: tuple[Record, ...]
    missing: tuple[tuple[str, int], ...]
    budget_tokens: int

    @property
    def baseline(self) -> Row:
        """What the others are compared with."""
        return self.rows[0]

    @cached_property
    def metrics(self) -> list[str]:
        """The metrics of the finished runs, in their order; best@k only where scores are graded."""
        return self._without_twins(r.metrics for row in self.rows for r in row.records)

    @cached_property
    def main_metrics(self) -> list[str]:
        """avg@n, pass@8, pass@16, pass@n, best@k, distinct solutions, entropy, as far as known."""
        known, largest = self.metrics, self.samples
        average = [name for name in known if name.startswith("avg@")]
        passes = [f"pass@{k}" for k in sorted({8, 16, largest}) if f"pass@{k}" in known]
        graded = [f"best@{k}" for k in sorted({16, largest}) if f"best@{k}" in known]
        return [*average, *passes, *graded, DISTINCT, ENTROPY]

    @property
    def samples(self) -> int:
        """Completions per problem of the evaluation."""
        return max(int(m.partition("@")[2]) for m in self.metrics if m.startswith("pass@"))

    @cached_property
    def validation_metrics(self) -> list[str]:
        """The metrics of the validations while training, by their k."""
        found = [v for row in self.rows for r in row.records for v in r.validation]
        shares = [m for m in self._without_twins(found) if "@" in m]
        return sorted(shares, key=lambda m: (m.partition("@")[0], int(m.partition("@")[2])))

    @staticmethod
    def _without_twins(found: Iterable[Mapping[str, float]]) -> list[str]:
        """All names but best@k where it is pass@k throughout: where every score is 0 or 1."""
        several = list(found)
        names = dict.fromkeys(name for one in several for name in one)
        graded = any(
            abs(value - one.get(name.replace("best@", "pass@"), value)) > _SAME
            for one in several
            for name, value in one.items()
            if name.startswith("best@")
        )
        return [name for name in names if graded or not name.startswith("best@")]

    @cached_property
    def problems_validated(self) -> bool:
        """Whether all runs keep every problem of their validations, the same ones."""
        rows = {r.validated_rows for row in self.rows for r in row.records if r.validation}
        return len(rows) == 1 and None not in rows

    def differences(self, row: Row, metric: str) -> dict[int, float]:
        """{seed: recipe − baseline} after training, of the seeds that both have."""
        ours, theirs = row.values(metric), self.baseline.values(metric)
        return {seed: ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())}

    def problem_differences(self, row: Row, metric: str, seeds: Sequence[int]) -> FloatArray | None:
        """(S, P) the same problem by problem; None where a run does not keep it."""
        ours, theirs = (one.problem_values(metric, seeds) for one in (row, self.baseline))
        if ours is None or theirs is None or ours.shape != theirs.shape:
            return None
        return ours - theirs


def arrange(records: Sequence[Record], names: Sequence[str], seeds: Sequence[int]) -> Results:
    """Arranges records by contender.

    Args:
        records: Of all runs that ended.
        names: The contenders', the baseline's first.
        seeds: Those of the plan.

    Raises:
        ValueError: If the baseline has no finished run, or budgets differ.
    """
    by_job = {(record.name, record.seed): record for record in records}
    budgets = sorted({record.budget_tokens for record in records})
    if len(budgets) > 1:
        raise ValueError(f"The runs have different budgets of tokens: {budgets}.")
    rows = []
    for name in names:
        found = [by_job[name, s] for s in seeds if (name, s) in by_job]
        finished = tuple(record for record in found if record.finished)
        if finished:
            rows.append(Row(name, finished[0].part, finished))
    if not rows or rows[0].name != names[0]:
        raise ValueError(
            f"The baseline {names[0]} has no finished run: there is nothing to compare with. "
            "Run the command again to continue."
        )
    return Results(
        tuple(rows),
        tuple(record for record in records if not record.finished),
        tuple((name, s) for s in seeds for name in names if (name, s) not in by_job),
        budgets[0],
    )


def number(metric: str, value: float, *, signed: bool = False) -> str:
    """A metric's value as the tables show it: shares in %, entropy with three digits."""
    sign = "+" if signed else ""
    if "@" in metric:
        return f"{100 * value:{sign}.1f}"
    return f"{value:{sign}.3f}" if metric == ENTROPY else f"{value:{sign}.2f}"
