"""How much a law of returns knows about a state that its mean does not."""

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
    # Up to rounding: equal laws that were summed in another order have one mean.
    _, group = np.unique(m.round(9), return_inverse=True)
    mass = np.bincount(group, w)
    bin_of = np.minimum((bins * (np.cumsum(mass) - mass / 2)).astype(int), bins - 1)[group]
    total = w @ (v - w @ v) ** 2
    if not total > 1e-18:
        raise ValueError(f"Got the functional {v[0]} in all {len(v)} states: it must vary.")
    per_bin = np.bincount(bin_of, w, bins)
    centre = np.bincount(bin_of, w * v, bins) / np.where(per_bin > 0, per_bin, 1.0)
    return float(w @ (v - centre[bin_of]) ** 2 / total)
