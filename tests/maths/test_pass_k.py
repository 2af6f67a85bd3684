"""pass@k and its relatives against enumeration of every subset."""

from fractions import Fraction
from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rllib_distrl.maths.pass_k import (
    average,
    best_at_k,
    bootstrap_interval,
    distinct_correct,
    pass_at_k,
    passes,
)


def enumerated_pass(marks: list[bool], k: int) -> float:
    subsets = list(combinations(marks, k))
    return sum(any(s) for s in subsets) / len(subsets)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_is_the_mean_over_all_subsets(n):
    for correct in range(n + 1):
        marks = [True] * correct + [False] * (n - correct)
        for k in range(1, n + 1):
            expected = enumerated_pass(marks, k)
            assert pass_at_k(n, [correct], k)[0] == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_by_hand():
    # 4 samples, 1 correct, 2 drawn: 3 of the 6 pairs contain it.
    assert pass_at_k(4, [1, 0, 2, 4], 2) == pytest.approx([0.5, 0.0, 5 / 6, 1.0])
    assert pass_at_k(4, 3, 2)[0] == 1.0  # Only one is wrong, so every pair has a correct one.


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_pass_at_k_against_exact_fractions(data):
    n = data.draw(st.integers(1, 2048))
    correct = data.draw(st.integers(0, n))
    k = data.draw(st.integers(1, n))
    exact = 1 - Fraction(comb(n - correct, k), comb(n, k))
    got = pass_at_k(n, [correct], k)[0]
    assert got == pytest.approx(float(exact), rel=1e-10, abs=1e-300)
    assert 0.0 <= got <= 1.0


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 300), st.data())
def test_pass_at_k_grows_with_k_and_with_correct(n, data):
    k = data.draw(st.integers(1, n - 1))
    values = pass_at_k(n, np.arange(n + 1), k)
    assert (np.diff(values) >= -1e-12).all()
    assert (pass_at_k(n, np.arange(n + 1), k + 1) >= values - 1e-12).all()


def test_pass_at_1_is_the_share_of_correct():
    assert pass_at_k(64, np.arange(65), 1) == pytest.approx(np.arange(65) / 64, rel=1e-13)


@pytest.mark.parametrize("k", [0, 5])
def test_k_outside_the_pool_is_refused(k):
    with pytest.raises(ValueError, match=r"k must lie in \[1, n = 4\]"):
        pass_at_k(4, [1], k)
    with pytest.raises(ValueError, match="k must lie"):
        best_at_k([[0.0, 1.0, 0.0, 0.0]], k)


def test_a_count_beyond_the_pool_is_refused():
    with pytest.raises(ValueError, match="counts must lie in"):
        pass_at_k(4, [5], 1)


def test_best_at_k_by_enumeration_with_graded_scores():
    scores = [0.3, 0.9, 0.3, 0.0, 0.55, 1.0]
    for k in range(1, 7):
        subsets = list(combinations(scores, k))
        expected = sum(map(max, subsets)) / len(subsets)
        assert best_at_k([scores], k)[0] == pytest.approx(expected, abs=1e-12)


def test_best_at_k_is_pass_at_k_for_binary_scores():
    rng = np.random.default_rng(3)
    scores = (rng.random((20, 64)) < rng.random((20, 1))).astype(float)
    for k in (1, 2, 7, 64):
        assert best_at_k(scores, k) == pytest.approx(pass_at_k(64, scores.sum(1), k), abs=1e-12)


def test_average_is_per_problem_and_graded():
    assert average([[0.5, 1.0], [0.0, 0.25]]) == pytest.approx([0.75, 0.125])


def test_only_full_marks_pass():
    assert passes([0.0, 0.999, 1.0, 0.1 * 10, sum([0.1] * 10)]).tolist() == [
        False,
        False,
        True,
        True,
        True,
    ]


def test_distinct_correct_counts_solutions_not_samples():
    assert distinct_correct(["a", "b", "a", "c", "b"], [True, True, True, False, False]) == 2
    assert distinct_correct([], []) == 0


def test_bootstrap_covers_the_mean_of_a_known_law():
    # Beta(2, 3) has mean 0.4. 95 % intervals from 60 problems, 300 repetitions: the number that
    # covers is Binomial(300, ~0.94), sd 0.014; 0.90 and 0.98 are about three of them away.
    rng = np.random.default_rng(11)
    covered = 0
    for seed in range(300):
        low, high = bootstrap_interval(rng.beta(2, 3, size=60), resamples=500, seed=seed)
        covered += bool(low[0] <= 0.4 <= high[0])
    assert 0.90 <= covered / 300 <= 0.98


@pytest.mark.parametrize("k", [1, 16, 64])
@pytest.mark.parametrize("law", [(0.5, 1.5), (2, 2)])
def test_intervals_of_pass_k_cover_also_where_nearly_all_is_solved(law, k):
    # Problems whose chance is Beta(2, 2): pass@64 is .999 and is 1 on most sets of 60 problems.
    rng, every = np.random.default_rng(k), np.random.default_rng(0).beta(*law, 100_000)
    truth, covered, plain = (1 - (1 - every) ** k).mean(), 0, 0
    for seed in range(200):
        values = pass_at_k(64, rng.binomial(64, rng.beta(*law, 60)), k)
        low, high = bootstrap_interval(values, resamples=500, seed=seed, shares=True)
        covered += bool(low[0] <= truth <= high[0])
        low, high = bootstrap_interval(values, resamples=500, seed=seed)
        plain += bool(low[0] <= truth <= high[0])
    assert covered / 200 >= 0.92
    if (law, k) == ((2, 2), 64):
        assert plain / 200 < 0.3


def test_bootstrap_width_matches_the_normal_theory():
    values = np.random.default_rng(0).normal(size=400)
    low, high = bootstrap_interval(values, resamples=4000)
    width = 2 * 1.96 * values.std() / np.sqrt(400)
    assert high[0] - low[0] == pytest.approx(width, rel=0.06)


def test_bootstrap_is_seeded_and_columns_share_resamples():
    values = np.random.default_rng(5).random(30)
    table = np.stack([values, values], axis=1)
    low, high = bootstrap_interval(table, seed=4)
    assert low[0] == low[1] and high[0] == high[1]
    again = bootstrap_interval(table, seed=4)
    other = bootstrap_interval(table, seed=5)
    assert np.array_equal(low, again[0]) and not np.array_equal(low, other[0])


def test_bootstrap_of_a_constant_has_no_width():
    low, high = bootstrap_interval(np.full(7, 0.25))
    assert low[0] == high[0] == pytest.approx(0.25)


def test_bootstrap_without_problems_is_refused():
    with pytest.raises(ValueError, match="0 problems"):
        bootstrap_interval([])
