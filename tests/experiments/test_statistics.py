"""Intervals over seeds and problems, exact tests and their correction: by hand and by truth."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy import stats

from rllib_distrl.experiments.statistics import estimate, seeds_needed, sign_flips


def test_an_estimate_by_hand() -> None:
    found = estimate([0.1, 0.4, 0.4])
    assert found.mean == pytest.approx(0.3)
    assert found.sd == pytest.approx(np.sqrt((0.04 + 0.01 + 0.01) / 2))
    # Student's t at 2 degrees of freedom is 4.3027, the standard error .1.
    assert (found.low, found.high) == pytest.approx((-0.130265, 0.730265), abs=1e-6)
    assert found.seeds == 3
    assert found.holds_zero and not estimate([0.1, 0.2, 0.15]).holds_zero
    alone = estimate([0.1])
    assert np.isnan(alone.low) and alone.holds_zero
    with pytest.raises(ValueError, match="there are no seeds"):
        estimate([])


def drawn(rng: np.random.Generator, seeds: int, sd: tuple[float, float, float]) -> np.ndarray:
    """(S, 60) a seed's part, a problem's part and what is of both, around 0."""
    shapes = ((seeds, 1), (1, 60), (seeds, 60))
    return sum(rng.normal(0, one, shape) for one, shape in zip(sd, shapes, strict=True))


# Standard deviations of seeds, problems, and both: little of the first, little of the second, ….
PARTS = [(0.02, 0.3, 0.1), (0.05, 0.0, 0.3), (0.03, 0.2, 0.4)]


@pytest.mark.parametrize("seeds", [3, 8])
@pytest.mark.parametrize("sd", PARTS)
def test_intervals_over_seeds_and_problems_cover_the_truth(
    seeds: int, sd: tuple[float, float, float]
) -> None:
    rng = np.random.default_rng(seeds)
    tables = [drawn(rng, seeds, sd) for _ in range(400)]
    crossed = [estimate(table.mean(1), table) for table in tables]
    covered = np.mean([found.low <= 0 <= found.high for found in crossed])
    assert 0.92 <= covered <= 0.99
    if sd[1] == 0.3:  # the seeds alone do not know that other problems would tell otherwise
        alone = [estimate(table.mean(1)) for table in tables]
        assert np.mean([found.low <= 0 <= found.high for found in alone]) < 0.85


def test_student_covers_and_the_percentile_bootstrap_does_not() -> None:
    rng = np.random.default_rng(1)
    samples = rng.normal(size=(1000, 3))
    found = [estimate(sample) for sample in samples]
    assert np.mean([one.low <= 0 <= one.high for one in found]) == pytest.approx(0.95, abs=0.02)
    means = samples[:, rng.integers(0, 3, (500, 3))].mean(-1)
    low, high = np.quantile(means, [0.025, 0.975], axis=1)
    assert np.mean((low <= 0) & (high >= 0)) < 0.8


def test_sign_flips_by_hand() -> None:
    # |±1 ±2 ±4| >= 5: only -1 +2 +4 = 5 and +1 +2 +4 = 7, each with its mirror image.
    found = sign_flips([[-1.0, 2.0, 4.0], [1.0, 2.0, 4.0], [0.0, 0.0, 0.0]])
    assert found.p.tolist() == [4 / 8, 2 / 8, 1.0]
    # The largest, then the larger of two, then one: Holm multiplies by 3, 2 and 1.
    assert found.holm.tolist() == [1.0, 0.75, 1.0]
    # Scaled to the same length these are the same patterns, so the larger of the two is the second
    # in the two patterns where it is 7, and the first reaches its 5 in four of the eight.
    assert found.corrected.tolist() == [0.5, 0.25 + 0.25, 1.0]


@pytest.mark.parametrize("count", [8, 20])
def test_sign_flips_as_scipy_counts_them(count: int) -> None:
    values = np.random.default_rng(count).normal(0.4, 1.0, size=count)
    wanted = stats.permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=100_000, random_state=3
    )
    found = sign_flips([values])
    assert found.p[0] == pytest.approx(wanted.pvalue, abs=1e-12 if count == 8 else 0.01)
    assert found.p[0] == found.corrected[0] == found.holm[0]


def test_the_correction_is_the_law_of_the_largest_going_down() -> None:
    table = np.random.default_rng(5).normal([[1.2], [0.5], [0.0], [0.8]], 1.0, (4, 8))
    found = sign_flips(table)
    size = np.sqrt((table**2).sum(1))
    flipped = np.abs([table @ np.array(signs) / size for signs in product((1, -1), repeat=8)])
    observed, wanted, before = np.abs(table.sum(1) / size), {}, 0.0
    for place, one in enumerate(left := list(np.argsort(-observed))):
        largest = flipped[:, left[place:]].max(1)
        before = wanted[one] = max(before, float(np.mean(largest >= observed[one] - 1e-9)))
    assert found.corrected.tolist() == pytest.approx([wanted[one] for one in range(4)])
    assert (found.p <= found.corrected).all()


def test_twenty_comparisons_of_nothing_seldom_make_one_clear() -> None:
    rng = np.random.default_rng(7)
    made = [sign_flips(rng.normal(size=(20, 8)) + rng.normal(size=(1, 8))) for _ in range(400)]
    assert np.mean([(one.p <= 0.05).any() for one in made]) > 0.3
    assert np.mean([(one.corrected <= 0.05).any() for one in made]) <= 0.075
    # Holm's bound, with 8 seeds, cannot make any of 20 clear, whatever the numbers are.
    assert not any((one.holm <= 0.05).any() for one in made)
    assert sign_flips(rng.normal(3.0, 0.1, size=(20, 8))).corrected.max() == pytest.approx(2 / 2**8)


def test_seeds_that_holms_bound_needs() -> None:
    assert seeds_needed(1) == 6  # 2^-5 = .031; 5 seeds have .0625
    assert seeds_needed(6) == 8  # 6 x .0078 = .047
    assert seeds_needed(7) == 9
