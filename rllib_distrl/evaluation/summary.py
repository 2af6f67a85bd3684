"""From a table of graded samples to the numbers of an evaluation."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from rllib_distrl.evaluation.measures import best_of_n_kl, dead_groups
from rllib_distrl.maths.choosing import Equivalence, group_answers, majority_at_k
from rllib_distrl.maths.pass_k import (
    FloatArray,
    average,
    best_at_k,
    bootstrap_interval,
    distinct_correct,
    pass_at_k,
    passes,
)

CORRECT, WRONG, NO_ANSWER = "correct", "wrong", "no_answer"
SAME = 1e-9
TRUNCATED = ("length", "context")
_COUNTS = ("distinct_correct", "tokens")  # columns that may be above 1


class SampleTable:
    """The samples of one evaluation as (problems, samples) arrays.

    Attributes:
        frame: the samples, sorted by problem and sample.
        n: samples per problem.
        scores: (P, n), usually in [0, 1].
    """

    def __init__(self, frame: pd.DataFrame):
        """Arranges ``frame``, which needs problem, sample, score, status, finish_reason, answer.

        Raises:
            ValueError: no samples, or problems with different numbers of samples.
        """
        if frame.empty:
            raise ValueError("there are no samples: evaluate at least one problem")
        self.frame = frame.sort_values(["problem", "sample"], kind="stable", ignore_index=True)
        counts = Counter(self.frame["problem"].tolist()).values()
        if min(counts) != max(counts):
            raise ValueError(
                f"problems have {min(counts)} to {max(counts)} samples: the estimates need the "
                "same number for each, so finish the evaluation first"
            )
        self.n = max(counts)
        self.scores: FloatArray = self._arranged("score").astype(np.float64)

    def _arranged(self, column: str) -> np.ndarray:
        return self.frame[column].to_numpy().reshape(-1, self.n)

    @property
    def passed(self) -> npt.NDArray[np.bool_]:
        """(P, n) which samples count for pass@k: those that were graded correct."""
        if "status" not in self.frame:
            return passes(self.scores)
        return self._arranged("status") == CORRECT

    @property
    def correct(self) -> np.ndarray:
        """(P,) passing samples of each problem."""
        return self.passed.sum(axis=1)

    @property
    def graded(self) -> bool:
        """Whether some score is neither 0 nor 1, or 1 and not correct, or correct and not 1."""
        return bool((np.abs(self.scores - self.passed) > SAME).any())

    @property
    def has_votes(self) -> bool:
        """Whether the task's grades name answers, without which there is no majority."""
        if "status" not in self.frame:
            return True
        decided = self.frame["status"].isin((CORRECT, WRONG)).to_numpy()
        named = self.frame["answer"].notna().to_numpy()
        return bool(not decided.any() or (decided & named).any())

    def majority(self, ks: Sequence[int], equivalent: Equivalence | None = None) -> FloatArray:
        """(P, len(ks)) maj@k of each problem; answers vote where they are not missing."""
        rows = []
        for answers, scores in zip(self._arranged("answer"), self.scores, strict=True):
            votes = [None if pd.isna(a) else a for a in answers]
            labels = group_answers(votes, equivalent)
            rows.append([majority_at_k(labels, scores, k) for k in ks])
        return np.asarray(rows, dtype=np.float64)

    def distinct(self, by: Literal["answer", "completion"]) -> FloatArray:
        """(P,) distinct correct solutions, told apart by normalised answer or by their text."""
        column = self._arranged("answer" if by == "answer" else "text_hash")
        marks = self.passed
        counts = [distinct_correct(s, m) for s, m in zip(column.tolist(), marks, strict=True)]
        return np.asarray(counts, dtype=np.float64)

    def share(self, column: str, *values: str) -> FloatArray:
        """(P,) share of samples whose ``column`` is one of ``values``."""
        return np.isin(self._arranged(column), values).mean(axis=1)

    def mean(self, column: str) -> FloatArray:
        """(P,) means of a numeric column."""
        return self._arranged(column).astype(np.float64).mean(axis=1)


def per_problem(
    frame: pd.DataFrame,
    ks: Sequence[int],
    *,
    votes: bool = True,
    distinct_by: Literal["answer", "completion"] = "answer",
    equivalent: Equivalence | None = None,
) -> pd.DataFrame:
    """One row per problem, one column per estimate.

    Args:
        frame: samples with the columns of `store.SCHEMA`.
        ks: the k of pass@k and maj@k, each at most n.
        votes: compute maj@k, the only estimate that takes time.
        distinct_by: what tells correct solutions apart.
        equivalent: compares normalised answers in votes; equality when None.

    Returns:
        avg@n, pass@k and, where grades name answers, maj@k per k (best@k too where scores are more
        than 1 for what is correct and 0 for the rest), distinct_correct, truncated and unparsable
        shares, tokens.

    Raises:
        ValueError: a k above n, or problems with different numbers of samples.
    """
    table = SampleTable(frame)
    columns: dict[str, FloatArray] = {f"avg@{table.n}": average(table.scores)}
    columns |= {f"pass@{k}": pass_at_k(table.n, table.correct, k) for k in ks}
    if table.graded:
        columns |= {f"best@{k}": best_at_k(table.scores, k) for k in ks}
    if votes and table.has_votes:
        majority = table.majority(ks, equivalent)
        columns |= {f"maj@{k}": majority[:, j] for j, k in enumerate(ks)}
    columns["distinct_correct"] = table.distinct(distinct_by)
    columns["truncated"] = table.share("finish_reason", *TRUNCATED)
    columns["unparsable"] = table.share("status", NO_ANSWER)
    columns["tokens"] = table.mean("tokens")
    return pd.DataFrame(columns)


def summarise(
    frame: pd.DataFrame,
    ks: Sequence[int],
    *,
    distinct_by: Literal["answer", "completion"] = "answer",
    equivalent: Equivalence | None = None,
    further: Mapping[str, FloatArray] | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Means over problems, each with a bootstrap interval over problems.

    Args:
        frame: samples with the columns of `store.SCHEMA`.
        ks: the k of pass@k and maj@k, each at most n.
        distinct_by: what tells correct solutions apart.
        equivalent: compares normalised answers in votes; equality when None.
        further: (P,) columns of other measures.
        level: of the intervals.
        seed: of the bootstrap.

    Returns:
        ``{"avg@64": 0.41, "pass@1": …, …, "problems": 200, "samples": 64, "status": {…},
        "scores": [lowest, highest], "intervals": {"avg@64": [low, high], …}, "best_of_n": {"8":
        {"kl": 1.2, "score": 0.6}, …}}``; shares and probabilities in [0, 1]. ``dead@k`` is the
        share of groups of k that are all right or all wrong; ``kl``, in nats, the most that the
        best of n is away from the policy.
    """
    problems = per_problem(frame, ks, distinct_by=distinct_by, equivalent=equivalent)
    best = "best" if f"best@{ks[0]}" in problems else "pass"
    table = SampleTable(frame)
    for k in (k for k in ks if k > 1):
        problems[f"dead@{k}"] = dead_groups(table.n, table.correct, k)
    for name, column in (further or {}).items():
        problems[name] = column
    intervals = {
        name: bootstrap_interval(
            column, level=level, seed=seed, shares=_is_share(str(name), column)
        )
        for name, column in problems.items()
    }
    means = problems.to_numpy().mean(axis=0).tolist()
    result: dict[str, Any] = dict(zip(problems.columns, means, strict=True))
    result["problems"] = len(problems)
    result["samples"] = len(frame) // len(problems)
    scores = frame["score"].to_numpy()
    result["scores"] = [float(scores.min()), float(scores.max())]
    result["status"] = dict(Counter(frame["status"].tolist()).most_common())
    result["best_of_n"] = {
        str(k): {"kl": best_of_n_kl(k), "score": result[f"{best}@{k}"]} for k in ks
    }
    result["intervals"] = {
        name: [float(low[0]), float(high[0])] for name, (low, high) in intervals.items()
    }
    return result


def _is_share(name: str, column: pd.Series) -> bool:
    """Whether a column lies in [0, 1], and not by chance; scores may be a task's own."""
    return name not in _COUNTS and bool(column.between(0.0, 1.0).all())
