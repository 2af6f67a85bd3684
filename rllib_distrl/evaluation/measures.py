"""From a table of graded samples to the numbers of an evaluation.

Further ones of an evaluation or a run: diversity, dead groups, frontier, entropy, audit.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

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
from rllib_distrl.method.token_table import TokenTable

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
        frame: samples with the columns of `result.SCHEMA`.
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
        frame: samples with the columns of `result.SCHEMA`.
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


def distinct_n(completions: Sequence[Sequence[int]], n: int) -> float:
    """dist-n: different n-grams of a problem's completions over all of them.

    Li et al. 2016 (arXiv 1510.03055), of tokens; LAD (arXiv 2602.20132) reports n = 3 and 4.

    Args:
        completions: Token ids.
        n: Length of a gram.

    Returns:
        In [0, 1]; NaN where no completion has n tokens.
    """
    rows = map(tuple, completions)
    grams = [ids[i : i + n] for ids in rows for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def dead_groups(n: int, correct: np.ndarray, k: int) -> FloatArray:
    """(P,) chance that k completions of a problem are all right or all wrong: nothing to learn.

    Of k among n sampled ones: C(c, k)/C(n, k) + C(n − c, k)/C(n, k).

    Args:
        n: Samples of each problem.
        correct: (P,) c, those that pass.
        k: Group size, at most n.
    """
    return (1.0 - pass_at_k(n, correct, k)) + (1.0 - pass_at_k(n, n - correct, k))


def best_of_n_kl(n: int) -> float:
    """Ln N − (N − 1)/N, in nats: how far the best of N is from the policy, at most.

    KL(best of N ‖ policy); an equality for continuous scores (Beirami et al. 2024, arXiv
    2401.01879).
    """
    return math.log(n) - (n - 1) / n


@dataclass(frozen=True)
class EntropyFit:
    """R = b − a e^H, and how much of R's variance it explains.

    Attributes:
        a: What return costs in e^H.
        b: The return.
        explained: R².
    """

    a: float
    b: float
    explained: float

    @property
    def ceiling(self) -> float:
        """The return at an entropy of 0, where nothing is left to trade: b − a."""
        return self.b - self.a


def fit_entropy(entropy: Sequence[float], returns: Sequence[float]) -> EntropyFit:
    """Least squares of R = −a e^H + b over a run's iterations (Cui et al. 2025, arXiv 2505.22617).

    Args:
        entropy: H, in nats.
        returns: R.

    Raises:
        ValueError: For fewer than three points, or an entropy that never changes.
    """
    x, y = np.exp(np.asarray(entropy, dtype=np.float64)), np.asarray(returns, dtype=np.float64)
    if len(x) < 3 or np.ptp(x) < 1e-12:
        raise ValueError("a fit of returns by entropy needs three iterations of different entropy")
    dx, dy = x - x.mean(), y - y.mean()
    slope = float(dx @ dy / (dx @ dx))
    total = float(dy @ dy)
    explained = slope * float(dx @ dy) / total if total > 0 else 1.0
    return EntropyFit(-slope, float(y.mean() - slope * x.mean()), explained)


REFLECTION = ("wait", "hmm", "however", "but", "alternatively", "actually", "check")
"""Words at which a model that thinks again does so (our choice)."""


def entropy_at(table: TokenTable, words: Collection[str] = REFLECTION) -> tuple[float, int]:
    """Mean entropy, in nats, at tokens that are one of some words, and how many there are.

    Skywork-R1V3 (arXiv 2507.06167) chooses checkpoints by it.

    Args:
        table: With entropies.
        words: Compared without case and white space around.

    Returns:
        NaN and 0 where none occurs.

    Raises:
        ValueError: If the table has no entropies.
    """
    wanted = {word.casefold() for word in words}
    texts = [text for some in table.completions["text"] for text in some]
    chosen = np.array([str(text).strip().casefold() in wanted for text in texts], dtype=bool)
    entropies = table.numbers("entropy")[chosen]
    return (float(entropies.mean()) if len(entropies) else math.nan), len(entropies)


@dataclass(frozen=True)
class Rate:
    """A share and its 95 % interval (Wilson 1927)."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, hits: int, count: int) -> Rate:
        """Of so many hits among a count; NaN in [0, 1] of none."""
        if not count:
            return cls(math.nan, 0.0, 1.0)
        z, p = 1.959963984540054, hits / count
        middle = (p + z * z / (2 * count)) / (1 + z * z / count)
        half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count**2))
        return cls(p, max(middle - half, 0.0), min(middle + half, 1.0))


@dataclass(frozen=True)
class Audit:
    """How often a verifier errs: what reward `noise_backward` takes."""

    false_positive_rate: Rate
    false_negative_rate: Rate


def audit(passed: Sequence[bool], right: Sequence[bool]) -> Audit:
    """A verifier's verdicts on completions against what is known of these.

    Args:
        passed: What the verifier said.
        right: What is so.

    Returns:
        ρ0, the share of wrong ones that passed, and ρ1, that of right ones that did not.

    Raises:
        ValueError: For lists of different lengths.
    """
    if len(passed) != len(right):
        raise ValueError(f"an audit needs a verdict on each: {len(passed)} and {len(right)} given")
    verdicts, truth = np.asarray(passed, dtype=bool), np.asarray(right, dtype=bool)
    return Audit(
        Rate.of(int((verdicts & ~truth).sum()), int((~truth).sum())),
        Rate.of(int((~verdicts & truth).sum()), int(truth.sum())),
    )


_SAMPLE = ["problem", "sample"]
_LABEL = [*_SAMPLE, "right"]
_READERS = {".csv": pd.read_csv, ".jsonl": pd.read_json, ".parquet": pd.read_parquet}


def read_labels(path: Path) -> pd.DataFrame:
    """What somebody found out about samples of an evaluation.

    Args:
        path: A .csv, .jsonl or .parquet file with the columns `problem`, `sample` (as in the
            samples) and `right`: true or false, or 1 or 0.

    Returns:
        These columns, `right` as bool.

    Raises:
        ValueError: For another file, or a sample that is labelled twice.
    """
    reader = _READERS.get(path.suffix)
    if reader is None or not path.is_file():
        raise ValueError(
            f"--audit is {str(path)!r}; it must be a .csv, .jsonl or .parquet file with the "
            f"columns {', '.join(_LABEL)}."
        )
    try:
        found = reader(path, lines=True) if path.suffix == ".jsonl" else reader(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if missing := [name for name in _LABEL if name not in found]:
        raise ValueError(f"{path} has no column {missing[0]!r}; it needs {', '.join(_LABEL)}.")
    found = found[_LABEL]
    for row, label in enumerate(found["right"].tolist()):
        if label not in (0, 1):
            raise ValueError(f"{path}: right is {label!r} in row {row}; it must be true or false.")
    if twice := found[found.duplicated(_SAMPLE)].to_dict("records"):
        again = twice[0]
        raise ValueError(
            f"{path} labels sample {again['sample']} of problem {again['problem']} twice."
        )
    return found.astype({"right": bool})


def audit_samples(samples: pd.DataFrame, labels: pd.DataFrame) -> dict[str, Any]:
    """`audit` of the samples of an evaluation that are labelled.

    Args:
        samples: With `problem`, `sample` and `status`; one passed where that is "correct".
        labels: Of `read_labels`.

    Returns:
        ``right`` and ``wrong``, how many are labelled so, and `false_positive_rate` and
        `false_negative_rate`, `Rate` as dicts, whose value is None where none could err.

    Raises:
        ValueError: For a label of a sample that does not exist.
    """
    graded = {
        (problem, sample): status == CORRECT
        for problem, sample, status in samples[[*_SAMPLE, "status"]].to_numpy().tolist()
    }
    passed, right = [], []
    for problem, sample, truth in labels[_LABEL].to_numpy().tolist():
        if (problem, sample) not in graded:
            raise ValueError(
                f"There is no sample {sample} of problem {problem}: the labels are of another "
                "evaluation."
            )
        passed.append(graded[problem, sample])
        right.append(bool(truth))
    rates = asdict(audit(passed, right))
    for rate in rates.values():
        rate["value"] = None if math.isnan(rate["value"]) else rate["value"]
    return {"right": sum(right), "wrong": len(right) - sum(right), **rates}
