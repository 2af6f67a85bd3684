"""What a comparison keeps of each run, a small JSON file, and all of them, a row per contender.

All tables and figures are made from these.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from rllib_distrl.evaluation.measures import SampleTable, per_problem
from rllib_distrl.experiments.statistics import Estimate, FloatArray, ValidationFit, estimate
from rllib_distrl.files import write_atomic
from rllib_distrl.maths import pass_k
from rllib_distrl.rllib_traps import EVALUATION, OPTIMIZER_STEPS, SECONDS
from rllib_distrl.runs.folder import open_run
from rllib_distrl.runs.log import VALIDATED_PROBLEMS, read_progress, tokens_generated

FINISHED, FAILED = "finished", "failed"
DISTINCT, ENTROPY = "distinct_correct", "entropy"
# Training metrics whose curves are kept, by the names that figures give them.
CURVES = {
    "return": "env_runners/episode_return_mean",
    "entropy": "learners/default_policy/entropy",
    "length": "env_runners/episode_len_mean",
}
_POINTS = 50  # of a kept curve
AVERAGE = "avg@"
_VALIDATION = "evaluation/env_runners/"
_VALIDATION_SECONDS = f"{EVALUATION}/{SECONDS}"
_VALIDATED = (AVERAGE, "pass@", "best@")
_LEFT_OUT = ("truncated", "unparsable", "tokens")
_SAME = 1e-9  # of two metrics


@dataclass(frozen=True)
class Record:
    """One run of a comparison.

    Attributes:
        name: The contender's.
        part: The part of the method that the contender varies.
        seed: Of the run.
        digest: The contender's hash, see `Contender.digest`.
        budget_tokens: What the run was given.
        status: "finished" or "failed".
        error: What a failed run said last.
        recipe: The resolved recipe.
        commit: Of the source tree; None outside of git.
        versions: Of the packages that decide the numbers.
        metrics: avg@n, pass@k, distinct correct solutions and entropy (nats per token) on the
            evaluation's problems after training; shares in [0, 1].
        scores: Of each problem of that evaluation, as [[score, how many samples], …], ascending.
        distinct: Distinct correct solutions of each problem.
        tokens: Completion tokens generated in training.
        iterations: Training iterations.
        updates: Optimiser steps; None where the optimiser does not count them.
        seconds: Of training, without start, evaluation and validation.
        validation_seconds: Of the validations while training.
        wall_seconds: Of the whole process.
        curve: {metric: [[tokens, mean over the iterations since the point before], …]}.
        validation: {"tokens": …, "avg@n": …, "pass@k": …} of each validation while training.
        validation_problems: Of each of them the problems, [[row, how many samples are correct,
            [[score, how many samples], …]], …], ascending by row; empty where only the means of
            `validation` were kept.
    """

    name: str
    part: str
    seed: int
    digest: str
    budget_tokens: int
    status: str
    error: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    commit: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    scores: list[list[list[float]]] = field(default_factory=list)
    distinct: list[int] = field(default_factory=list)
    tokens: int = 0
    iterations: int = 0
    updates: int | None = None
    seconds: float = 0.0
    validation_seconds: float = 0.0
    wall_seconds: float = 0.0
    curve: dict[str, list[list[float]]] = field(default_factory=dict)
    validation: list[dict[str, float]] = field(default_factory=list)
    validation_problems: list[list[list[Any]]] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether there are numbers."""
        return self.status == FINISHED

    @property
    def tokens_per_second(self) -> float:
        """Of training."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def validated(self, metric: str) -> list[list[float]]:
        """[[tokens, value], …] of one metric of the validations."""
        return [[v["tokens"], v[metric]] for v in self.validation if metric in v]

    def against_average(self, metric: str) -> list[list[float]]:
        """[[average score, value], …] along training, of the validations."""
        return [[average, value] for _, average, value in self._with_average(metric).values()]

    def span(self) -> tuple[float, float] | None:
        """Between which average scores the fit through the validations runs."""
        return self._fit(self._with_average("pass@1").values()).span

    def at_levels(self, levels: Sequence[float], metric: str) -> FloatArray:
        """(L,) a validation metric where the average score is at a level; NaN where it is not."""
        points = self._with_average(metric).values()
        return self._fit(points).read(levels, [value for *_, value in points])

    @cached_property
    def validated_rows(self) -> tuple[int, ...] | None:
        """The rows of the validations' problems; None where they are not kept, or not the same.

        Several problems, the same ones with as many samples each time, are what can be drawn again.
        """
        validations = self.validation_problems
        found = {tuple(row for row, *_ in problems) for problems in validations}
        pools = (scores for problems in validations for *_, scores in problems)
        samples = {sum(int(count) for _, count in scores) for scores in pools}
        if len(validations) != len(self.validation) or len(found) != 1 or len(samples) != 1:
            return None
        (rows,) = found
        return rows if len(rows) > 1 else None

    def problems_at_levels(self, levels: Sequence[float], metric: str) -> FloatArray:
        """(L, P) `at_levels` problem by problem, of a run with `validated_rows`."""
        points = self._with_average(metric)
        values, averages = (
            np.stack([self._validated_values(number, name) for number in points])
            for name in (metric, AVERAGE)
        )
        return self._fit(points.values()).read_problems(levels, values, averages)

    def _validated_values(self, validation: int, metric: str) -> FloatArray:
        """(P,) a metric of one validation, problem by problem."""
        problems = self.validation_problems[validation]
        right = np.asarray([correct for _, correct, _ in problems])
        return _by_problem(_spread_out(scores for *_, scores in problems), right, metric)

    @cached_property
    def _pools(self) -> FloatArray:
        """(P, n) scores of the samples of each problem, ascending."""
        return _spread_out(self.scores)

    @staticmethod
    def _fit(points: Collection[Sequence[float]]) -> ValidationFit:
        return ValidationFit(tuple(t for t, *_ in points), tuple(a for _, a, _ in points))

    def _with_average(self, metric: str) -> dict[int, list[float]]:
        """{number: [tokens, average score, value]} of the validations that have both."""
        found = {}
        for number, one in enumerate(self.validation):
            average = next((v for name, v in one.items() if name.startswith(AVERAGE)), None)
            if average is not None and metric in one:
                found[number] = [one["tokens"], average, one[metric]]
        return found

    def problem_values(self, metric: str) -> FloatArray | None:
        """(P,) a metric of the final evaluation, problem by problem; None where it is not kept."""
        if metric == DISTINCT and self.distinct:
            return np.asarray(self.distinct, dtype=np.float64)
        if not self.scores or "@" not in metric:
            return None
        return _by_problem(self._pools, pass_k.passes(self._pools).sum(1), metric)

    def write(self, path: Path) -> None:
        """Writes the file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (
            f"{json.dumps(name)}: {json.dumps(value, allow_nan=False)}"
            for name, value in asdict(self).items()
        )
        write_atomic(path, "{\n" + ",\n".join(lines) + "\n}\n")


def _spread_out(counts: Iterable[Sequence[Sequence[float]]]) -> FloatArray:
    """(P, n) scores of the samples of each problem, ascending, from [[score, how many], …]."""
    counted = (np.asarray(one).T for one in counts)
    return np.stack([np.repeat(score, count.astype(int)) for score, count in counted])


def _by_problem(scores: FloatArray, right: npt.ArrayLike, metric: str) -> FloatArray:
    """(P,) avg@n, pass@k or best@k of each problem.

    Args:
        scores: (P, n) of the samples.
        right: (P,) how many of them are correct.
        metric: One of the three, by its name.
    """
    kind, _, k = metric.partition("@")
    if kind == "pass":
        return pass_k.pass_at_k(scores.shape[1], right, int(k))
    return pass_k.best_at_k(scores, int(k)) if kind == "best" else pass_k.average(scores)


def read_record(path: Path) -> Record:
    """Reads what `Record.write` wrote.

    Raises:
        ValueError: If the file is something else.
    """
    try:
        return Record(**json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a run of a comparison: {error}.") from error


def read_records(folder: Path) -> list[Record]:
    """All records of a folder, in the order of their names."""
    return [read_record(path) for path in sorted(folder.glob("*.json"))]


def finished_record(begun: Record, run_path: Path) -> Record:
    """Reads a finished run folder.

    Args:
        begun: The run's record as far as its folder does not say it.
        run_path: The folder.

    Raises:
        ValueError: If the run is not finished, or generated less than its budget.
    """
    run = open_run(run_path)
    meta = json.loads(run.meta_file.read_text(encoding="utf-8"))
    rows = read_progress(run.progress_file)
    budget = begun.budget_tokens
    tokens = int((tokens_generated(rows[-1]) or 0) if rows else 0)
    if tokens < budget:
        raise ValueError(f"{run_path} holds {tokens:,} of {budget:,} tokens.")
    recipe = run.recipe().to_dict()
    samples = pd.read_parquet(run.samples / "after.parquet")
    validating = sum(row.get(_VALIDATION_SECONDS) or 0.0 for row in rows)
    beside = recipe.get("evaluation", {}).get("evaluation_parallel_to_training", False)
    validations = [row for row in rows if row.get(_VALIDATION_SECONDS) is not None]
    problems = [row.get(VALIDATED_PROBLEMS) for row in validations]
    return replace(
        begun,
        status=FINISHED,
        recipe=recipe,
        commit=meta["commit"],
        versions=meta["versions"],
        metrics=measure_samples(samples),
        scores=score_counts(samples),
        distinct=SampleTable(samples).distinct("completion").astype(int).tolist(),
        tokens=tokens,
        iterations=int(rows[-1]["iteration"]),
        updates=rows[-1].get(OPTIMIZER_STEPS),
        seconds=sum(row.get("time_this_iter_s") or 0.0 for row in rows)
        - (0.0 if beside else validating),
        validation_seconds=validating,
        curve={name: thinned(rows, key) for name, key in CURVES.items()},
        validation=[_validation(row) for row in validations],
        validation_problems=[one for one in problems if one] if all(problems) else [],
    )


def validated(row: Mapping[str, Any]) -> dict[str, float]:
    """What an iteration's validation measured on pools: {"avg@n": …, "pass@k": …, "best@k": …}.

    Args:
        row: A training result with keys joined by '/'; without a validation nothing is returned.
    """
    named = {
        key.removeprefix(_VALIDATION): value
        for key, value in row.items()
        if key.startswith(_VALIDATION) and value is not None
    }
    return {name: float(v) for name, v in named.items() if name.startswith(_VALIDATED)}


def _validation(row: Mapping[str, Any]) -> dict[str, float]:
    return {"tokens": float(tokens_generated(row) or 0), **validated(row)}


def measure_samples(frame: pd.DataFrame) -> dict[str, float]:
    """The numbers of one evaluation.

    The entropy is the sampled one: minus the mean log-probability of the sampled tokens.

    Args:
        frame: Graded samples, with the columns of `evaluation.result.SCHEMA`.

    Returns:
        {"avg@64": …, "pass@1": …, …, "best@1": …, …, "distinct_correct": …, "entropy": nats per
        token}. For scores of 0 and 1 best@k is pass@k.
    """
    table = SampleTable(frame)
    ks = pass_k.default_ks(table.n)
    problems = per_problem(frame, ks, votes=False, distinct_by="completion")
    for k in ks:
        problems[f"best@{k}"] = pass_k.best_at_k(table.scores, k)
    means = dict(zip(problems.columns, problems.to_numpy().mean(axis=0).tolist(), strict=True))
    kept = {name: mean for name, mean in means.items() if not name.startswith(_LEFT_OUT)}
    logp, tokens = frame["logp_sum"].to_numpy().sum(), frame["tokens"].to_numpy().sum()
    return {**kept, ENTROPY: -float(logp / tokens)}


def score_counts(frame: pd.DataFrame) -> list[list[list[float]]]:
    """The scores of each problem, [[score, how many samples], …], ascending by score."""
    return [pass_k.count_scores(row) for row in SampleTable(frame).scores]


def thinned(rows: Sequence[Mapping[str, Any]], key: str) -> list[list[float]]:
    """A training metric over the tokens generated, as at most 50 means of neighbours."""
    points = [
        (float(tokens), float(row[key]))
        for row in rows
        if row.get(key) is not None and (tokens := tokens_generated(row)) is not None
    ]
    width = -(-len(points) // _POINTS) or 1
    groups = [points[start : start + width] for start in range(0, len(points), width)]
    return [[group[-1][0], sum(v for _, v in group) / len(group)] for group in groups]


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
