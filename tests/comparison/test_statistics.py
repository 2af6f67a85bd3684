"""Seeds as the unit: hand-worked numbers, and scipy as the independent oracle."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from rllib_distrl.comparison.statistics import estimate, paired_test, sign_flip_p, value_at


def test_an_estimate_by_hand() -> None:
    found = estimate([0.1, 0.4, 0.4])
    assert found.mean == pytest.approx(0.3)
    assert found.sd == pytest.approx(np.sqrt((0.04 + 0.01 + 0.01) / 2))
    # Of the 27 resamples one holds only the smallest: the 2.5 % quantile is the smallest itself.
    assert (found.low, found.high, found.seeds) == (pytest.approx(0.1), pytest.approx(0.4), 3)


def test_the_interval_is_that_of_the_bootstrap() -> None:
    values = np.random.default_rng(1).normal(size=40)
    wanted = stats.bootstrap((values,), np.mean, method="percentile", random_state=2)
    found = estimate(values.tolist())
    assert found.low == pytest.approx(wanted.confidence_interval.low, abs=0.02)
    assert found.high == pytest.approx(wanted.confidence_interval.high, abs=0.02)


def test_sign_flips_by_hand() -> None:
    # |±1 ±2 ±4| >= 5: only -1 +2 +4 = 5 and +1 +2 +4 = 7, each with its mirror image.
    assert sign_flip_p([-1.0, 2.0, 4.0]) == pytest.approx(4 / 8)
    assert sign_flip_p([1.0, 2.0, 4.0]) == pytest.approx(2 / 8)
    assert sign_flip_p([0.0, 0.0]) == 1.0


@pytest.mark.parametrize("count", [8, 20])
def test_sign_flips_as_scipy_counts_them(count: int) -> None:
    values = np.random.default_rng(count).normal(0.4, 1.0, size=count)
    wanted = stats.permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=100_000, random_state=3
    )
    tolerance = 1e-12 if count == 8 else 0.01
    assert sign_flip_p(values) == pytest.approx(wanted.pvalue, abs=tolerance)


def test_pairs_take_away_what_seeds_have_in_common() -> None:
    baseline = [0.1, 0.5, 0.9, 0.3]
    better = [value + 0.01 for value in baseline]
    test = paired_test(better, baseline)
    assert test.difference.mean == pytest.approx(0.01)
    assert test.difference.sd == pytest.approx(0.0, abs=1e-12)
    assert test.difference.low == pytest.approx(0.01)
    assert test.p == pytest.approx(2 / 2**4)
    with pytest.raises(ValueError, match="same 2 or more seeds, got 1 and 1"):
        paired_test([1.0], [2.0])


def test_the_first_crossing_counts() -> None:
    along, values = [0.2, 0.3, 0.4, 0.3], [0.9, 0.8, 0.6, 0.5]
    assert value_at(0.35, along, values) == pytest.approx(0.7)
    assert value_at(0.3, along, values) == pytest.approx(0.8)
    assert value_at(0.5, along, values) is None
    assert value_at(0.2, [0.2], [0.9]) is None
