"""What choosing among n completions is worth: by votes, by a critic's judgement, by stopping early.

maj@k is exact, without resampling noise. What a critic chooses or stops is counted on completions
that ran to their end, so what it would have cost is known exactly for the sample; that part is
ours.
"""

import math
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
Equivalence = Callable[[Any, Any], bool]

NO_VOTE = -1
# A vote count this many standard deviations off its mean has probability below 1e-16.
_TAIL_SIGMAS = 10.0
# Comparisons may be slow: an answer is compared with so many others that came before it.
_MOST_COMPARED = 64


def group_answers(
    answers: Sequence[Hashable | None],
    equivalent: Equivalence | None = None,
    seconds: float = 10.0,
) -> npt.NDArray[np.int64]:
    """Label equivalent answers alike.

    Args:
        answers: (n,) normalised answers; None is a sample without an answer and has no vote.
        equivalent: compares an answer with the first one of each of the first 64 groups; equality
            when None.
        seconds: Time for comparisons; answers left uncompared when it is spent are groups of their
            own, so that a problem whose answers cannot be told apart quickly costs no more.

    Returns:
        (n,) labels 0, 1, … in order of appearance, `NO_VOTE` (-1) where there is no answer.
    """
    known: dict[Hashable, int] = {}
    heads: list[Hashable] = []
    labels = np.full(len(answers), NO_VOTE, dtype=np.int64)
    deadline = time.monotonic() + seconds
    for index, answer in enumerate(answers):
        if answer is None:
            continue
        if answer not in known:
            compared = enumerate(heads[:_MOST_COMPARED] if equivalent else ())
            same = (
                group for group, head in compared
                if equivalent and time.monotonic() < deadline and equivalent(head, answer)
            )  # fmt: skip
            group = next(same, len(heads))
            if group == len(heads):
                heads.append(answer)
            known[answer] = group
        labels[index] = known[answer]
    return labels


def majority_at_k(labels: npt.ArrayLike, scores: npt.ArrayLike, k: int) -> float:
    """Expected score of the plurality answer of a random k-subset of the samples of one problem.

    Ties are broken uniformly and enter as their expectation; a subset without any vote scores 0;
    a group whose members were scored differently counts with their mean.

    The average over all C(n, k) subsets is computed exactly. A k-subset is what n independent
    coins of probability k/n give when exactly k show heads, so the joint law of the vote counts
    is read off the coefficient of x^k in a product of binomial generating functions, one per
    group, evaluated on the (n+1)-th roots of unity; the tie weight 1/(1+m) is the integral of
    u^m, done by Gauss-Legendre quadrature of sufficient order. (Our derivation.)

    Args:
        labels: (n,) group of each sample, -1 without a vote.
        scores: (n,) in [0, 1].
        k: number of voters drawn, 1 <= k <= n.

    Returns:
        maj@k of the problem.

    Raises:
        ValueError: k outside [1, n], or lengths that differ.
    """
    label, score = np.asarray(labels, dtype=np.int64), np.asarray(scores, dtype=np.float64)
    n = label.size
    if label.shape != score.shape or label.ndim != 1:
        raise ValueError(f"labels {label.shape} and scores {score.shape} must both be (n,)")
    if not 1 <= k <= n:
        raise ValueError(f"k must lie in [1, n = {n}], got {k}: draw more samples or lower k")
    votes = label[label >= 0]
    if votes.size == 0:
        return 0.0
    sizes = np.bincount(votes)
    totals = np.bincount(votes, weights=score[label >= 0], minlength=sizes.size)
    present = sizes > 0
    sizes, means = sizes[present], totals[present] / sizes[present]
    if sizes.size == 1 and votes.size == n:
        return float(means[0])
    if k == n:
        return float(means[sizes == sizes.max()].mean())
    return _expected_winner(sizes, means, n, k)


def _expected_winner(sizes: npt.NDArray[np.int64], means: FloatArray, n: int, k: int) -> float:
    """Sum over winning counts t of the expected score of the winner, by coefficient extraction."""
    prob = k / n
    points = np.arange((n + 1) // 2 + 1)  # The other half are complex conjugates.
    roots = np.exp(2j * np.pi * points / (n + 1))
    distinct, index = np.unique(sizes, return_inverse=True)
    multiplicity = np.bincount(index)
    class_score = np.bincount(index, weights=means)
    silent = (1 - prob + prob * roots) ** (n - sizes.sum())
    coefficient = np.zeros(points.size, dtype=np.complex128)
    tables = [_powers(int(size), prob, roots) for size in distinct]
    for count in _winning_counts(int(distinct[-1]), n, k):
        ties = min(k // count, sizes.size)
        node, weight = _quadrature(ties // 2 + 1)
        everyone = np.broadcast_to(silent, (node.size, points.size))
        won = np.zeros_like(everyone)
        for (terms, sums), many, worth in zip(tables, multiplicity, class_score, strict=True):
            exact = terms[count] if count < len(terms) else np.zeros_like(roots)
            below = sums[min(count, len(terms)) - 1]
            factor = below + node * exact
            rest = factor ** (many - 1)
            won = won * rest * factor + everyone * rest * (worth * exact)
            everyone = everyone * rest * factor
        coefficient += weight @ won
    # A root stands for its conjugate too, except 1 and (there when n + 1 is even) -1.
    pairs = np.where((points == 0) | (2 * points == n + 1), 1.0, 2.0)
    chosen = (pairs * coefficient * roots ** (-k)).real.sum() / (n + 1)
    return float(np.clip(chosen / _binomial(n, prob)[k], means.min(initial=0.0), means.max()))


@cache
def _quadrature(size: int) -> tuple[FloatArray, FloatArray]:
    """Gauss-Legendre nodes (size, 1) and weights (size,) on [0, 1]."""
    node, weight = np.polynomial.legendre.leggauss(size)
    return (node[:, None] + 1) / 2, weight / 2


def _winning_counts(largest: int, n: int, k: int) -> range:
    """Counts that the winner can have with more than negligible probability.

    The winner has at least the votes of the largest group, and no group exceeds what the largest
    can plausibly reach.
    """
    mean = k * largest / n
    sigma = math.sqrt(mean * (1 - largest / n) * (n - k) / max(n - 1, 1))
    low = max(1, math.floor(mean - _TAIL_SIGMAS * sigma - _TAIL_SIGMAS))
    high = min(largest, k, math.ceil(mean + _TAIL_SIGMAS * sigma + _TAIL_SIGMAS))
    return range(low, high + 1)


def _powers(
    size: int, prob: float, roots: npt.NDArray[np.complex128]
) -> tuple[npt.NDArray[np.complex128], npt.NDArray[np.complex128]]:
    """(size+1, R) terms P(j of `size` are drawn) x^j on the roots, and their running sums."""
    counts = np.arange(size + 1)
    terms = _binomial(size, prob)[:, None] * roots[None, :] ** counts[:, None]
    return terms, terms.cumsum(axis=0)


def _binomial(size: int, prob: float) -> FloatArray:
    """(size+1,) probabilities of 0 … size successes, 0 < prob < 1."""
    counts = np.arange(size + 1)
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, size + 1)))])
    choose = logs[size] - logs[counts] - logs[size - counts]
    return np.exp(choose + counts * math.log(prob) + (size - counts) * math.log1p(-prob))


def best_by_value(values: npt.ArrayLike, scores: npt.ArrayLike, k: int) -> float:
    """Expected score of the completion with the highest value among k of n, drawn without repeats.

    Exact: the completion of rank j (0 is the best) is the best of C(n-1-j, k-1) of the C(n, k)
    subsets. Completions of equal value share their mean score, which is a tie broken at random.

    Args:
        values: (n,), what the critic says.
        scores: (n,), what the grader says.
        k: 1 <= k <= n.

    Raises:
        ValueError: k outside [1, n], or lengths that differ.
    """
    value, score = _vectors(values, scores)
    n = value.size
    if not 1 <= k <= n:
        raise ValueError(f"k must lie in [1, n = {n}], got {k}: draw more samples or lower k")
    _, tied = np.unique(value, return_inverse=True)
    means = np.bincount(tied, weights=score) / np.bincount(tied)
    ranked = means[tied[np.argsort(-value, kind="stable")]]
    total, weight = 0.0, k / n  # C(n-1, k-1) / C(n, k)
    for rank, one in enumerate(ranked):
        total += weight * one
        left = n - 1 - rank
        weight *= (left - (k - 1)) / left if left else 0.0
    return float(total)


def weighted_vote(labels: npt.ArrayLike, scores: npt.ArrayLike, weights: npt.ArrayLike) -> float:
    """Score of the answer with the largest sum of weights; ties count with their mean.

    A group whose members were scored differently counts with their mean, as in
    `majority.majority_at_k`, which this is for equal weights and k = n.

    Args:
        labels: (n,) group of each completion, -1 without a vote.
        scores: (n,).
        weights: (n,), not negative, such as the critic's values.

    Raises:
        ValueError: lengths that differ, or a negative weight.
    """
    label, score = _vectors(labels, scores)
    weight, _ = _vectors(weights, scores)
    if (weight < 0).any():
        raise ValueError(f"weights of votes must not be negative; got {float(weight.min()):g}")
    votes = label >= 0
    if not votes.any():
        return 0.0
    groups = label[votes].astype(np.int64)
    sums = np.bincount(groups, weights=weight[votes])
    counts = np.bincount(groups)
    means = np.bincount(groups, weights=score[votes]) / np.maximum(counts, 1)
    present = counts > 0
    won = present & np.isclose(sums, sums[present].max(), rtol=1e-12, atol=0.0)
    return float(means[won].mean())


@dataclass(frozen=True)
class Stopping:
    """What it would do to stop completions where a critic has given them up.

    Attributes:
        threshold: A completion is stopped before the first token in whose state the critic's upper
            quantile lies below it.
        stopped: Share of completions that are stopped.
        tokens_saved: Share of all tokens that are not sampled then.
        false_stops: Share of the stopped completions whose score reached the threshold when they
            ran on; NaN where none is stopped.
        score_lost: Share of the sum of all scores that stopped completions had earned; 0 where
            nothing was earned.
    """

    threshold: float
    stopped: float
    tokens_saved: float
    false_stops: float
    score_lost: float


def stopping(upper: Sequence[npt.ArrayLike], scores: npt.ArrayLike, threshold: float) -> Stopping:
    """Counts stops, what they save and what they cost, on completions that all ran on.

    Args:
        upper: of each completion (T,), a quantile of its return in the state before each token.
        scores: (n,), how the completions ended; not negative.
        threshold: ε.

    Raises:
        ValueError: no completions, or lengths that differ.
    """
    bounds = [np.asarray(one, dtype=np.float64) for one in upper]
    score = np.asarray(scores, dtype=np.float64)
    if not bounds or len(bounds) != score.size:
        raise ValueError(f"got {len(bounds)} completions and {score.size} scores")
    below = [np.flatnonzero(one < threshold) for one in bounds]
    stopped = np.array([places.size > 0 for places in below])
    pairs = zip(bounds, below, strict=True)
    saved = sum(len(one) - int(places[0]) for one, places in pairs if places.size)
    total = score.sum()
    return Stopping(
        threshold,
        float(stopped.mean()),
        saved / sum(map(len, bounds)),
        float((score[stopped] >= threshold).mean()) if stopped.any() else float("nan"),
        float(score[stopped].sum() / total) if total > 0 else 0.0,
    )


def _vectors(
    one: npt.ArrayLike, other: npt.ArrayLike
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    a, b = np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"shapes {a.shape} and {b.shape} must both be (n,)")
    return a, b
