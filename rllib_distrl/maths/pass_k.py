"""Unbiased estimates from one pool of n samples per problem, and their uncertainty.

Everything here is NumPy on plain arrays: P problems, n samples each. Nothing knows about models.

Two notions of success live side by side. A *score* is any number in [0, 1] and is what avg@k and
best@k average; a sample *passes* when its score is at least 1, which is what pass@k counts. For
0/1 rewards best@k and pass@k are the same number.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

PASSING_SCORE = 1.0


def default_ks(n: int) -> tuple[int, ...]:
    """Powers of two up to n, and n itself.

    Args:
        n: samples per problem.

    Returns:
        Increasing k's, beginning with 1.
    """
    return tuple(sorted({1 << j for j in range(n.bit_length())} | {n}))


def passes(scores: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Which samples count for pass@k: those with full marks.

    Args:
        scores: any shape, in [0, 1].

    Returns:
        Same shape, True where the score is at least 1 (up to 1e-9, so that a sum of parts counts).
    """
    return np.asarray(scores, dtype=np.float64) >= PASSING_SCORE - 1e-9


def count_scores(scores: npt.ArrayLike) -> list[list[float]]:
    """The scores of one problem's samples, [[score, how many samples], …], ascending by score.

    Args:
        scores: (n,); kept to six digits.
    """
    found = zip(*np.unique(np.asarray(scores), return_counts=True), strict=True)
    return [[float(f"{score:.6g}"), int(count)] for score, count in found]


def pass_at_k(n: int, correct: npt.ArrayLike, k: int) -> FloatArray:
    """Probability that a random k-subset of n samples has at least one correct sample.

    1 - C(n-c, k) / C(n, k) = 1 - prod_{j<k} (1 - c / (n-j)), summed in logs so that neither the
    binomials overflow nor small probabilities cancel (Chen et al. 2021, eq. 1).

    Args:
        n: samples per problem.
        correct: (P,) how many of them are correct, c.
        k: size of the subset, 1 <= k <= n.

    Returns:
        (P,) pass@k of each problem.

    Raises:
        ValueError: k outside [1, n], or a count outside [0, n].
    """
    counts = np.atleast_1d(np.asarray(correct, dtype=np.float64))
    _check_k(n, k)
    if counts.size and (counts.min() < 0 or counts.max() > n):
        raise ValueError(
            f"correct counts must lie in [0, n = {n}], got {counts.min():g} to {counts.max():g}"
        )
    ratio = np.minimum(counts[:, None] / (n - np.arange(k)), 1.0)
    with np.errstate(divide="ignore"):
        return -np.expm1(np.log1p(-ratio).sum(axis=1))


def best_at_k(scores: npt.ArrayLike, k: int) -> FloatArray:
    """Expected best score of a random k-subset: pass@k for graded rewards.

    sum_i s_(i) C(i-1, k-1) / C(n, k) over scores in ascending order: the best of the subset is
    s_(i) when i is in it and the other k-1 come from below. Equals pass@k when scores are 0 or 1.

    Args:
        scores: (P, n).
        k: size of the subset, 1 <= k <= n.

    Returns:
        (P,) expected maximum.

    Raises:
        ValueError: k outside [1, n], or scores that are not two-dimensional.
    """
    ordered = np.sort(_matrix(scores), axis=1)
    n = ordered.shape[1]
    _check_k(n, k)
    # P(best is s_(i)) = P(all k at or below i) - P(all k at or below i-1).
    below = 1.0 - pass_at_k(n, n - np.arange(n + 1), k)
    return ordered @ np.diff(below)


def average(scores: npt.ArrayLike) -> FloatArray:
    """Mean score per problem: avg@n, and the unbiased estimate of avg@k for every k <= n.

    Args:
        scores: (P, n) in [0, 1].

    Returns:
        (P,) means.
    """
    return _matrix(scores).mean(axis=1)


def distinct_correct(solutions: Sequence[Hashable], correct: npt.ArrayLike) -> int:
    """How many different solutions are among the correct samples of one problem.

    Args:
        solutions: (n,) what identifies a solution (its normalised answer, or its text).
        correct: (n,) bool.

    Returns:
        The number of distinct solutions that are correct. It grows with n: compare at equal n.
    """
    mask = np.asarray(correct, dtype=bool)
    if len(solutions) != mask.size:
        raise ValueError(f"{len(solutions)} solutions but {mask.size} marks: give one per sample")
    return len({s for s, good in zip(solutions, mask, strict=True) if good})


def bootstrap_interval(
    values: npt.ArrayLike,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    shares: bool = False,
) -> tuple[FloatArray, FloatArray]:
    """Percentile bootstrap interval of means over problems.

    Problems are resampled with replacement; all M columns share the resamples, so that curves
    move together. The samples of a problem are kept: the interval is about which problems were
    asked, given the estimates for each.

    Where all problems that were asked are solved, or nearly all, resampling them knows of no other
    kind: the interval of pass@64 had no width and covered hardly ever. Shares in [0, 1] therefore
    have a problem of 0 and one of 1 added to those that are drawn from, as Agresti and Coull (1998)
    add successes and failures (with one of each: our choice).

    Args:
        values: (P,) or (P, M), one row per problem.
        level: coverage aimed at.
        resamples: number of resampled problem sets.
        seed: of the resampling.
        shares: whether the values lie in [0, 1].

    Returns:
        (low, high), each (M,); (1,) for one-dimensional input.

    Raises:
        ValueError: no problems, or a level outside (0, 1).
    """
    table = np.asarray(values, dtype=np.float64)
    table = table[:, None] if table.ndim == 1 else table
    count = table.shape[0]
    if count == 0:
        raise ValueError("cannot bootstrap over 0 problems: evaluate at least one")
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie in (0, 1), got {level}")
    found = table.mean(axis=0)
    if shares:
        ends = np.stack([np.zeros(table.shape[1]), np.ones(table.shape[1])])
        table, count = np.concatenate([table, ends]), count + 2
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(count, np.full(count, 1.0 / count), size=resamples)
    means = weights @ table / count
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail], axis=0)
    return np.minimum(low, found), np.maximum(high, found)


def _check_k(n: int, k: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"k must lie in [1, n = {n}], got {k}: draw more samples or lower k")


def _matrix(scores: npt.ArrayLike) -> FloatArray:
    table = np.asarray(scores, dtype=np.float64)
    if table.ndim != 2 or table.shape[1] == 0:
        raise ValueError(f"scores must be (problems, samples), got shape {table.shape}")
    return table


@dataclass(frozen=True)
class Curve:
    """pass@k over k.

    Attributes:
        label: Its name in a plot.
        ks: (K,) ascending.
        mean: (K,) in [0, 1].
        low: (K,) lower end of the interval.
        high: (K,) upper end of the interval.
    """

    label: str
    ks: tuple[int, ...]
    mean: FloatArray
    low: FloatArray
    high: FloatArray


def pass_k_curve(
    label: str,
    n: int,
    correct: npt.ArrayLike,
    ks: Sequence[int] | None = None,
    *,
    level: float = 0.95,
) -> Curve:
    """Mean pass@k with a bootstrap interval over problems.

    Args:
        label: name in a plot.
        n: samples per problem.
        correct: (P,) passing samples of each problem.
        ks: powers of two up to n, and n, when None.
        level: of the interval.
    """
    points = tuple(ks) if ks is not None else default_ks(n)
    values = np.stack([pass_at_k(n, correct, k) for k in points], axis=1)
    low, high = bootstrap_interval(values, level=level, shares=True)
    return Curve(label, points, values.mean(axis=0), low, high)
