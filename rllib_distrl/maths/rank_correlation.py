"""Spearman's rank correlation, raw and given other quantities."""

import torch
from torch import Tensor

# Spread is a bump over the value (√(V(1 − V)) for 0/1 returns), which no straight line in the
# ranks of V removes; a quartic does.
_CONTROL_DEGREE = 4


def average_ranks(values: Tensor) -> Tensor:
    """Ranks from 1; equal values share the mean of their ranks.

    Args:
        values: (K,).

    Returns:
        (K,), float64.
    """
    _, index, counts = torch.unique(values, sorted=True, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[index]


def rank_correlation(x: Tensor, y: Tensor) -> float:
    """Spearman's ρ.

    Args:
        x: (K,).
        y: (K,).

    Returns:
        In [−1, 1]; NaN where one of them is constant.
    """
    return _correlation(average_ranks(x), average_ranks(y))


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
    powers = [torch.ones_like(x, dtype=torch.float64)]
    for control in given:
        place = average_ranks(control)
        place = 2 * (place - place.mean()) / max(len(place), 1)
        powers += [place**degree for degree in range(1, _CONTROL_DEGREE + 1)]
    basis = torch.stack(powers, dim=1)
    ranks = torch.stack([average_ranks(x), average_ranks(y)], dim=1)
    left = ranks - basis @ torch.linalg.lstsq(basis, ranks, driver="gelsd").solution
    # What is left of a perfectly explained rank is rounding, not signal.
    left[:, left.square().mean(0) < 1e-12 * ranks.square().mean(0)] = 0.0
    return _correlation(left[:, 0], left[:, 1])


def _correlation(x: Tensor, y: Tensor) -> float:
    x, y = x - x.mean(), y - y.mean()
    norm = float(x.square().sum() * y.square().sum()) ** 0.5
    return float((x * y).sum()) / norm if norm > 0 else float("nan")
