"""The records of a comparison, arranged: one row per contender."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rllib_distrl.comparison.record import Record
from rllib_distrl.comparison.statistics import Estimate, PairedTest, estimate, paired_test


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
        """Mean and interval over the seeds; None without a run that has the metric."""
        return self.estimate_of(lambda record: record.metrics.get(metric))

    def estimate_of(self, read: Callable[[Record], float | None]) -> Estimate | None:
        """The same for any number of a record; None where no record has it."""
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

    @property
    def metrics(self) -> list[str]:
        """The metrics of the finished runs, in their order."""
        return list(dict.fromkeys(m for row in self.rows for r in row.records for m in r.metrics))

    @property
    def samples(self) -> int:
        """Completions per problem of the evaluation."""
        return max(int(m.partition("@")[2]) for m in self.metrics if m.startswith("pass@"))

    @property
    def validation_metrics(self) -> list[str]:
        """The metrics of the validations while training, by their k."""
        found = dict.fromkeys(
            m for row in self.rows for r in row.records for v in r.validation for m in v
        )
        shares = [m for m in found if "@" in m]
        return sorted(shares, key=lambda m: (m.partition("@")[0], int(m.partition("@")[2])))

    def matched_level(self) -> float | None:
        """An average score that every run crosses while training: the middle of what all share.

        None where there is none.
        """
        paths = [
            [average for average, _ in record.front("pass@1")]
            for row in self.rows
            for record in row.records
        ]
        if any(len(path) < 2 for path in paths):
            return None
        low, high = max(min(path) for path in paths), min(max(path) for path in paths)
        return (low + high) / 2 if low < high else None

    def matched_test(self, row: Row, level: float, metric: str) -> PairedTest | None:
        """The paired test of `Record.matched`; None for fewer than 2 common seeds."""
        ours = {r.seed: v for r in row.records if (v := r.matched(level, metric)) is not None}
        theirs = {
            r.seed: v for r in self.baseline.records if (v := r.matched(level, metric)) is not None
        }
        return self._paired(row, ours, theirs)

    def against_baseline(self, row: Row, metric: str) -> PairedTest | None:
        """The paired test over the seeds that both have; None for fewer than 2."""
        return self._paired(row, row.values(metric), self.baseline.values(metric))

    def _paired(
        self, row: Row, ours: dict[int, float], theirs: dict[int, float]
    ) -> PairedTest | None:
        seeds = sorted(ours.keys() & theirs.keys())
        if row is self.baseline or len(seeds) < 2:
            return None
        return paired_test([ours[s] for s in seeds], [theirs[s] for s in seeds])


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
