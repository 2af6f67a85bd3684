"""Seeds as the unit: means, intervals and paired tests. NumPy on plain arrays."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rllib_distrl.maths.pass_k import bootstrap_interval

_EXACT_SEEDS = 14  # up to so many pairs all sign patterns are counted; 2^14 of them
_RANDOM_SIGNS = 1 << 14


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: Over the seeds.
        sd: Sample standard deviation (n − 1); 0 for one seed.
        low: Lower end of the 95 % percentile bootstrap interval over the seeds.
        high: Its upper end.
        seeds: How many there are.
    """

    mean: float
    sd: float
    low: float
    high: float
    seeds: int


def estimate(values: Sequence[float]) -> Estimate:
    """Mean, spread and interval of one number per seed.

    The bootstrap over few seeds is too narrow: with 3 of them its 95 % interval covers about
    three quarters. It says how the seeds differ, not more.

    Args:
        values: (S,), one per seed.

    Raises:
        ValueError: For no values.
    """
    numbers = np.asarray(values, dtype=np.float64)
    low, high = bootstrap_interval(numbers)
    sd = float(numbers.std(ddof=1)) if len(numbers) > 1 else 0.0
    return Estimate(float(numbers.mean()), sd, float(low[0]), float(high[0]), len(numbers))


@dataclass(frozen=True)
class PairedTest:
    """A difference to the baseline, seed by seed.

    Attributes:
        difference: Mean and interval of (contender − baseline).
        p: Of the two-sided sign-flip test that the differences are symmetric around 0.
    """

    difference: Estimate
    p: float


def paired_test(values: Sequence[float], baseline: Sequence[float]) -> PairedTest:
    """Compares two recipes on the same seeds.

    Args:
        values: (S,), one per seed.
        baseline: (S,), of the same seeds in the same order.

    Raises:
        ValueError: For different numbers of seeds, or fewer than 2.
    """
    if len(values) != len(baseline) or len(values) < 2:
        raise ValueError(
            f"a paired test needs the same 2 or more seeds, got {len(values)} and {len(baseline)}"
        )
    differences = np.asarray(values, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    return PairedTest(estimate(differences.tolist()), sign_flip_p(differences))


def sign_flip_p(differences: npt.ArrayLike, *, seed: int = 0) -> float:
    """Two-sided p of the sign-flip permutation test (Fisher 1935).

    The share of sign patterns whose mean is at least as far from 0 as the observed one. Exact up
    to 14 pairs, else over 2^14 random patterns and the observed one. The smallest p of S pairs is
    2^(1−S): .25 for 3, .0078 for 8.

    Args:
        differences: (S,).
        seed: Of the random patterns.

    Returns:
        In (0, 1].
    """
    values = np.asarray(differences, dtype=np.float64)
    count = len(values)
    if count <= _EXACT_SEEDS:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=count)))
    else:
        drawn = np.random.default_rng(seed).choice((1.0, -1.0), size=(_RANDOM_SIGNS, count))
        signs = np.concatenate([np.ones((1, count)), drawn])
    sums = np.abs(signs @ values)
    return float((sums >= sums[0] * (1.0 - 1e-12)).mean())


def value_at(level: float, along: Sequence[float], values: Sequence[float]) -> float | None:
    """Where a path first crosses a level: pass@k at a given avg@k along training.

    Args:
        level: Of `along`.
        along: (P,) the quantity to match, in the order of training.
        values: (P,) the quantity to read.

    Returns:
        `values`, interpolated linearly between the two points around the first crossing; None
        where the path stays on one side.
    """
    points = list(zip(along, values, strict=True))
    for (a0, v0), (a1, v1) in itertools.pairwise(points):
        if min(a0, a1) <= level <= max(a0, a1):
            share = 0.0 if a1 == a0 else (level - a0) / (a1 - a0)
            return v0 + share * (v1 - v0)
    return None
