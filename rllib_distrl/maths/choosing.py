"""What a critic's judgement of completions is worth: choosing among finished ones, and stopping.

All of it is counted on completions that ran to their end, so what a choice or a stop would have
cost is known exactly for the sample. Ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


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
