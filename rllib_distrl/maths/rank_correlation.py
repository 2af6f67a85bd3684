"""Spearman's rank correlation, raw and given other quantities."""

import numpy as np
from scipy import stats
from torch import Tensor

# Spread is a bump over the value (√(V(1 − V)) for 0/1 returns), which no straight line in the
# ranks of V removes; a quartic does.
_CONTROL_DEGREE = 4


def rank_correlation(x: Tensor, y: Tensor) -> float:
    """Spearman's ρ.

    Args:
        x: (K,).
        y: (K,).

    Returns:
        In [−1, 1]; NaN where one of them is constant.
    """
    if len(x.unique()) < 2 or len(y.unique()) < 2:
        return float("nan")
    return float(stats.spearmanr(x.numpy(), y.numpy()).statistic)


def partial_rank_correlation(x: Tensor, y: Tensor, *given: Tensor) -> float:
    """Correlation of the ranks of x and y that the ranks of other quantities do not explain.

    Both are regressed on the sum of a polynomial of degree 4 in the rank of each of these (our
    choice: the usual straight line would leave most of a bump-shaped dependence in, and flatter).

    Args:
        x: (K,), such as the spread.
        y: (K,), such as |V − empirical return|.
        *given: (K,) each, such as V and the position in the completion; at least one.

    Returns:
        In [−1, 1]; NaN where nothing is left of one of them.
    """
    powers = [np.ones(len(x))]
    for control in given:
        place = stats.rankdata(control.numpy())
        place = 2 * (place - place.mean()) / max(len(place), 1)
        powers += [place**degree for degree in range(1, _CONTROL_DEGREE + 1)]
    basis = np.stack(powers, axis=1)
    ranks = np.stack([stats.rankdata(x.numpy()), stats.rankdata(y.numpy())], axis=1)
    left = ranks - basis @ np.linalg.lstsq(basis, ranks)[0]
    # What is left of a perfectly explained rank is rounding, not signal.
    left[:, (left**2).mean(0) < 1e-12 * (ranks**2).mean(0)] = 0.0
    left -= left.mean(0)
    norm = float(np.sqrt(np.prod((left**2).sum(0))))
    return float(left[:, 0] @ left[:, 1]) / norm if norm > 0 else float("nan")
