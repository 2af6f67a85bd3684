"""Spearman's rank correlation, raw and given other quantities, of tensors or arrays."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

if TYPE_CHECKING:
    from torch import Tensor

    Vector = Tensor | np.ndarray  # reports have arrays, and do without torch

# Spread is a bump over the value (√(V(1 − V)) for 0/1 returns), which no straight line in the
# ranks of V removes; a quartic does.
_CONTROL_DEGREE = 4


def rank_correlation(x: Vector, y: Vector) -> float:
    """Spearman's ρ.

    Args:
        x: (K,).
        y: (K,).

    Returns:
        In [−1, 1]; NaN where one of them is constant.
    """
    x, y = np.asarray(x), np.asarray(y)
    if len(np.unique(x)) < 2 or len(np.unique(y)) < 2:
        return float("nan")
    found: Any = stats.spearmanr(x, y)
    return float(found.statistic)


def partial_rank_correlation(x: Vector, y: Vector, *given: Vector) -> float:
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
        place = stats.rankdata(np.asarray(control))
        place = 2 * (place - place.mean()) / max(len(place), 1)
        powers += [place**degree for degree in range(1, _CONTROL_DEGREE + 1)]
    basis = np.stack(powers, axis=1)
    ranks = np.stack([stats.rankdata(np.asarray(x)), stats.rankdata(np.asarray(y))], axis=1)
    left = ranks - basis @ np.linalg.lstsq(basis, ranks)[0]
    # What is left of a perfectly explained rank is rounding, not signal.
    left[:, (left**2).mean(0) < 1e-12 * (ranks**2).mean(0)] = 0.0
    left -= left.mean(0)
    norm = float(np.sqrt(np.prod((left**2).sum(0))))
    return float(left[:, 0] @ left[:, 1]) / norm if norm > 0 else float("nan")


def ignorance_metrics(
    spread: Vector,
    values: Vector,
    mean_returns: Vector,
    positions: Vector | None = None,
    *,
    name: str = "quantile_spread",
) -> dict[str, float]:
    """Does the spread say where the value is wrong? Over states with many continuations each.

    The raw correlation is mostly the Bernoulli noise of sampling, which is large where V(1 − V)
    is, and the one given V may be no more than the position in the completion: late in it little
    is open. The one given both is the one to read.

    Args:
        spread: (K,), spread of the quantiles, or another uncertainty, at K states.
        values: (K,), V.
        mean_returns: (K,), mean return of the continuations from each state.
        positions: (K,), tokens of the completion before each state; None: not looked at.
        name: What the metrics' names begin with.

    Returns:
        `NAME_error_correlation`, `NAME_error_partial_correlation` given V, and
        `NAME_error_partial_correlation_given_position` given V and position, finite ones only.
    """
    error = abs(values - mean_returns)
    found = {
        f"{name}_error_correlation": rank_correlation(spread, error),
        f"{name}_error_partial_correlation": partial_rank_correlation(spread, error, values),
    }
    if positions is not None:
        known = partial_rank_correlation(spread, error, values, positions)
        found[f"{name}_error_partial_correlation_given_position"] = known
    return {name: value for name, value in found.items() if math.isfinite(value)}
