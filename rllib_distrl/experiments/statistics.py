"""Means over seeds and problems, exact paired tests, and reading a noisy path at a level.

NumPy and SciPy on plain arrays; nothing here knows of recipes. S seeds, P problems, C comparisons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy import stats
from scipy.optimize import isotonic_regression

FloatArray = npt.NDArray[np.float64]

SIGNIFICANT = 0.05  # two-sided; the intervals are those of 95 %
_PATTERNS = 1 << 14  # of signs: all of them up to 14 seeds, so many random ones beyond
_RESAMPLES = 400  # of the problems; they give a variance, not a quantile
_ROUNDING = 1e-9
_BANDWIDTH = 1.0  # of the fit through validations, in their median distance
_GRID_POINTS = 61  # between the first and the last validation, where the fit is read


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, and over problems where these are known.

    Attributes:
        mean: Over the seeds.
        sd: Sample standard deviation of the seeds (n − 1); 0 for one seed.
        low: Lower end of the 95 % interval; NaN for one seed.
        high: Its upper end.
        seeds: How many there are.
    """

    mean: float
    sd: float
    low: float
    high: float
    seeds: int

    @property
    def holds_zero(self) -> bool:
        """Whether the interval does, or there is none."""
        return not (self.low > 0 or self.high < 0)


def estimate(values: Sequence[float], problems: npt.ArrayLike | None = None) -> Estimate:
    """Mean, spread and t-interval of one number per seed.

    Without `problems` the interval is Student's over the seeds: what other seeds would give on
    these problems. With them it is that of two crossed factors, what other seeds on other problems
    would give. With D_sp the value of seed s on problem p, the variance of the mean is

        V = V_seeds + V_problems − V_both,

    V_seeds from the seeds' means, V_problems from means over problems that are drawn again, the
    same ones for all seeds, and V_both what the two count twice, from how seeds differ as problems
    are drawn again (the crossed random effects of Cornfield and Tukey 1956; the resampling is our
    choice). The degrees of freedom are Satterthwaite's (1946).

    Args:
        values: (S,), one per seed.
        problems: (S, P), of the same seeds on P problems; rows have the mean `values`.

    Raises:
        ValueError: For no values.
    """
    numbers = np.asarray(values, dtype=np.float64)
    count = len(numbers)
    if count == 0:
        raise ValueError("there are no seeds: finish a run at least")
    mean = float(numbers.mean())
    if count == 1:
        return Estimate(mean, 0.0, float("nan"), float("nan"), 1)
    sd = float(numbers.std(ddof=1))
    variance, freedom = sd**2 / count, float(count - 1)
    if problems is not None:
        table = np.asarray(problems, dtype=np.float64)
        variance, freedom = _crossed_variance(variance, table)
    half = float(stats.t.ppf(1 - SIGNIFICANT / 2, freedom)) * variance**0.5
    return Estimate(mean, sd, mean - half, mean + half, count)


def _crossed_variance(of_seeds: float, table: FloatArray) -> tuple[float, float]:
    """Variance of the mean over both factors, and its degrees of freedom."""
    seeds, problems = table.shape
    if problems < 2:
        return of_seeds, float(seeds - 1)
    draws = _draws(problems)
    means = draws @ table.T / problems  # (R, S): each seed on problems drawn again
    unbiased = problems / (problems - 1)  # a resample varies by (P − 1) / P too little
    of_problems = means.mean(1).var(ddof=1) * unbiased
    apart = means - means.mean(1, keepdims=True)
    of_both = apart.var(0, ddof=1).sum() * unbiased / (seeds * (seeds - 1))
    total = max(of_seeds + of_problems - of_both, of_seeds, of_problems)
    if total == 0.0:
        return 0.0, float(seeds - 1)
    parts = of_seeds**2 / (seeds - 1) + of_problems**2 / (problems - 1)
    parts += of_both**2 / ((seeds - 1) * (problems - 1))
    # Not below the seeds' own: an estimated variance of problems takes no knowledge away.
    return total, max(total**2 / parts, float(seeds - 1))


@lru_cache(maxsize=8)
def _draws(problems: int) -> FloatArray:
    """(R, P) how often each problem is in a set of as many that are drawn again."""
    law = np.full(problems, 1.0 / problems)
    drawn = np.random.default_rng(0).multinomial(problems, law, size=_RESAMPLES)
    return drawn.astype(np.float64)


@dataclass(frozen=True)
class PairedTest:
    """A difference to the baseline, seed by seed.

    Attributes:
        difference: Mean and interval of (contender − baseline).
        p: Of the exact sign-flip test, see `sign_flips`.
        corrected: The same p for all comparisons that were made together.
    """

    difference: Estimate
    p: float
    corrected: float

    @property
    def clear(self) -> bool:
        """Whether it is told from 0: by the corrected test, and the interval is off 0 too."""
        return self.corrected <= SIGNIFICANT and not self.difference.holds_zero


@dataclass(frozen=True)
class SignFlips:
    """What the sign-flip test says of comparisons on the same seeds.

    Attributes:
        p: (C,) two-sided, each for itself.
        corrected: (C,) by the step-down law of the largest statistic.
        holm: (C,) by Holm's bound.
    """

    p: FloatArray
    corrected: FloatArray
    holm: FloatArray


def sign_flips(differences: npt.ArrayLike) -> SignFlips:
    """Exact two-sided paired permutation tests (Fisher 1935), corrected for their number.

    Under the null hypothesis the differences of a seed are as likely with the opposite sign. The
    statistic is |mean| / root mean square, which orders the sign patterns as |mean| and Student's
    |t| do. All 2^S patterns are counted up to 14 seeds, so the smallest p is 2^(1−S): .25 for 3
    seeds, .0078 for 8; beyond, 2^14 random ones and the observed one.

    Holm (1979) goes down from the largest statistic and takes the p's at worst to add up; with 8
    seeds and 7 comparisons it can reject nothing, whatever the numbers are. `corrected` takes the
    same steps, but in each has the law of the largest statistic among those left, from the same
    sign patterns, flipped for all comparisons of a seed at once (Westfall and Young 1993, step-down
    maxT; the error over all comparisons is held by Romano and Wolf 2005).

    Args:
        differences: (C, S); 0 where a seed is missing from a comparison.

    Returns:
        p's in (0, 1]; 1 where all differences are 0.
    """
    table = np.atleast_2d(np.asarray(differences, dtype=np.float64))
    tests, seeds = table.shape
    size = np.sqrt((table**2).sum(1, keepdims=True))
    table = table / np.where(size > 0, size, 1.0)
    if seeds < 2:
        one = np.ones(tests)
        return SignFlips(one, one, one)
    found = stats.permutation_test(
        (table,), np.sum, permutation_type="samples", vectorized=True, axis=1,
        n_resamples=_PATTERNS, rng=np.random.default_rng(0),
    )  # fmt: skip
    null = np.abs(found.null_distribution).reshape(-1, tests)
    if seeds > np.log2(_PATTERNS):  # random patterns: the observed one is one more
        null = np.concatenate([null, np.abs(table.sum(1))[None]])
    observed = np.abs(table.sum(1)) - _ROUNDING
    p = (null >= observed).mean(0)
    order = np.argsort(-observed, kind="stable")
    largest = np.maximum.accumulate(null[:, order[::-1]], axis=1)[:, ::-1]
    steps = (largest >= observed[order]).mean(0)
    corrected, holm = np.empty(tests), np.empty(tests)
    corrected[order] = np.maximum.accumulate(steps)
    by_p = np.argsort(p, kind="stable")
    holm[by_p] = np.minimum(np.maximum.accumulate((tests - np.arange(tests)) * p[by_p]), 1.0)
    return SignFlips(p, corrected, holm)


def seeds_needed(comparisons: int) -> int:
    """Seeds by which Holm's bound could call one of so many comparisons clear: 2^(1−S) C ≤ .05."""
    return int(np.ceil(1 + np.log2(comparisons / SIGNIFICANT)))


@dataclass(frozen=True)
class ValidationFit:
    """A smooth fit through the validations of a run: its average score along training.

    Both the average score and what is read there are fitted over the tokens generated, each by a
    local quadratic (Cleveland 1979) with Gaussian weights, and the average is made to rise by
    isotonic regression, so that it has a score once. Where a noisy path first crosses a level is
    where it was noisy upwards; a fit has no such selection. The degree and the bandwidth are our
    choice: on simulated runs of 4 to 11 validations they have a fifth less variance than the first
    crossing and no bias to speak of, where a local straight line is off by up to a point and a
    wider quadratic by enough to spoil intervals (tests/experiments/test_equal_average.py).

    Attributes:
        tokens: (V,) of the validations, ascending.
        averages: (V,) average scores there.
    """

    tokens: tuple[float, ...]
    averages: tuple[float, ...]

    @property
    def span(self) -> tuple[float, float] | None:
        """Average scores at both ends of the fit; None for fewer than 2 validations."""
        if len(self.tokens) < 2:
            return None
        fitted = self._rising()
        return round(float(fitted[0]), 9), round(float(fitted[-1]), 9)

    def read(self, levels: Sequence[float], values: Sequence[float]) -> FloatArray:
        """What another metric of the validations was where the average score was at a level.

        Args:
            levels: (L,) of the average score.
            values: (V,) of the metric.

        Returns:
            (L,) of the fit; NaN where it does not reach the level.
        """
        if self.span is None:
            return np.full(len(levels), np.nan)
        return self._reader(levels) @ np.asarray(values, dtype=np.float64)

    def read_problems(
        self, levels: Sequence[float], values: npt.ArrayLike, averages: npt.ArrayLike
    ) -> FloatArray:
        """What `read` finds, as a mean over problems that may be drawn again.

        Other problems have another value at the same time, and reach the level at another time. To
        first order a problem p adds to what is read at the level a

            y_p = v_p(t) − (dv / da) (a_p(t) − a),    t where the fitted average is at a,

        with v_p and a_p the fits of its value and its average score. The slope is a difference
        over as much as other problems move the average, one standard error to both sides within
        the span, so that a stretch where the average hardly rises does not make it large (the
        delta method; the width of the difference is our choice).

        Args:
            levels: (L,) of the average score.
            values: (V, P) of the metric at the validations, problem by problem.
            averages: (V, P) the average scores of the same.

        Returns:
            (L, P) with the mean over P that `read` gives of the means; NaN where it has none.
        """
        wanted, table = np.asarray(levels, dtype=np.float64), np.asarray(values, dtype=np.float64)
        if self.span is None:
            return np.full((len(wanted), table.shape[1]), np.nan)
        reader = self._reader(levels)
        of_values, of_averages = reader @ table, reader @ np.asarray(averages, dtype=np.float64)
        width = of_averages.std(1, ddof=1) / table.shape[1] ** 0.5
        ends = np.stack([wanted - width, wanted + width]).clip(*self.span)
        low, high = (self._reader(end.tolist()) @ table.mean(1) for end in ends)
        apart = ends[1] - ends[0]
        slope = np.divide(high - low, apart, out=np.zeros_like(apart), where=apart > _ROUNDING)
        return of_values - slope[:, None] * (of_averages - of_averages.mean(1, keepdims=True))

    def _reader(self, levels: Sequence[float]) -> FloatArray:
        """(L, V) what takes values at the validations to what is read; NaN beyond the fit."""
        wanted, rising = np.asarray(levels, dtype=np.float64), self._rising()
        steps, place = np.unique(rising, return_inverse=True)
        # A stretch where the average stands still is read in its middle.
        middles = np.equal.outer(np.arange(len(steps)), place).astype(np.float64)
        middles /= middles.sum(1, keepdims=True)
        hats = [np.interp(wanted, steps, corner) for corner in np.eye(len(steps))]
        low, high = self.span or (np.inf, -np.inf)
        inside = (wanted >= low - _ROUNDING) & (wanted <= high + _ROUNDING)
        found = np.stack(hats, axis=-1) @ middles @ _smoother(self.tokens)
        return np.where(inside[:, None], found, np.nan)

    def _rising(self) -> FloatArray:
        fitted = _smoother(self.tokens) @ np.asarray(self.averages, dtype=np.float64)
        return np.asarray(isotonic_regression(fitted).x, dtype=np.float64)


@lru_cache(maxsize=1024)
def _smoother(tokens: tuple[float, ...]) -> FloatArray:
    """(G, V) what takes values at the validations to the fit on a grid between their ends."""
    places = np.asarray(tokens)
    grid = np.linspace(places[0], places[-1], _GRID_POINTS)
    width = _BANDWIDTH * float(np.median(np.diff(places)))
    apart = (places - grid[:, None]) / width
    powers = np.stack([apart**degree for degree in range(min(3, len(places)))], axis=-1)
    root = np.exp(-(apart**2) / 4)[..., None]  # of the weights, for least squares
    return (np.linalg.pinv(root * powers) * root.swapaxes(1, 2))[:, 0]
