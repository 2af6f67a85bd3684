"""How much a law of returns knows about a state that its mean does not."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

MEAN_BINS = 20
"""States are put into so many groups of neighbouring means and equal weight (our choice)."""


def headroom(
    means: npt.ArrayLike,
    values: npt.ArrayLike,
    weights: npt.ArrayLike,
    bins: int = MEAN_BINS,
) -> float:
    """R² of a functional of the law, from the law less that from its mean, across states.

    The law itself gives R² = 1, so this is Σ w (v − v̄(b))² / Σ w (v − v̄)²: the share of the
    variance of v that is left within groups b of states with (nearly) the same mean. 0 says that a
    critic of the mean could give the functional too, 1 that it knows nothing of it. Our choice.

    Args:
        means: The mean of the return in each state, (S,).
        values: The functional: standard deviation, a quantile, …, (S,).
        weights: How often each state is met, (S,), at least 0.
        bins: Groups of the mean; states with one mean stay together.

    Raises:
        ValueError: If the functional is the same in all states: there is nothing to know.
    """
    m, v, w = (np.asarray(a, dtype=np.float64) for a in (means, values, weights))
    w = w / w.sum()
    return _open_share(m, v, v, w, bins)


def sampled_headroom(
    returns: npt.ArrayLike,
    functional: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]],
    bins: int = MEAN_BINS,
) -> float:
    """`headroom` of states of equal weight that are known by samples of their returns.

    A third of a state's samples tells its mean, and each of the others the functional: of the
    products of their deviations the noise of neither is a part. The noise of the mean puts states
    into the wrong group, so that this is rather too much than too little. Our choice.

    Args:
        returns: Independent returns of each state, (S, n), n at least 6.
        functional: From (S, m) returns to (S,).
        bins: Groups of the mean.

    Raises:
        ValueError: For fewer returns, or a functional that is the same in all states.
    """
    r = np.asarray(returns, dtype=np.float64)
    third = r.shape[1] // 3
    if third < 2:
        raise ValueError(f"Got {r.shape[1]} returns of each state: at least 6 are needed.")
    first, second, rest = r[:, :third], r[:, third : 2 * third], r[:, 2 * third :]
    w = np.full(len(r), 1 / len(r))
    return _open_share(rest.mean(1), functional(first), functional(second), w, bins)


def _open_share(
    m: npt.NDArray[np.float64],
    one: npt.NDArray[np.float64],
    other: npt.NDArray[np.float64],
    w: npt.NDArray[np.float64],
    bins: int,
) -> float:
    """The covariance of two functionals within groups of means over that of all states."""
    # Up to rounding: equal laws that were summed in another order have one mean.
    _, group = np.unique(m.round(9), return_inverse=True)
    mass = np.bincount(group, w)
    bin_of = np.minimum((bins * (np.cumsum(mass) - mass / 2)).astype(int), bins - 1)[group]
    total = w @ ((one - w @ one) * (other - w @ other))
    if not total > 1e-18:
        raise ValueError(f"Got the functional {one[0]} in all {len(one)} states: it must vary.")
    per_bin = np.bincount(bin_of, w, bins)
    share = np.where(per_bin > 0, per_bin, 1.0)
    off = [v - (np.bincount(bin_of, w * v, bins) / share)[bin_of] for v in (one, other)]
    return float(w @ (off[0] * off[1]) / total)
