from itertools import combinations

import numpy as np
import pytest

from rllib_distrl.maths.choosing import best_by_value, majority_at_k, stopping, weighted_vote


def test_best_by_value_by_hand():
    # Ranked by value the scores are 1, 0, .5. Of the three pairs two hold the first.
    values, scores = [0.2, 0.9, 0.5], [0.5, 1.0, 0.0]
    assert best_by_value(values, scores, 1) == pytest.approx(0.5)
    assert best_by_value(values, scores, 2) == pytest.approx((1 + 1 + 0) / 3)
    assert best_by_value(values, scores, 3) == 1.0
    assert best_by_value([0.5, 0.5, 0.1], [1.0, 0.0, 0.3], 3) == 0.5  # a tie


@pytest.mark.parametrize("k", [1, 2, 4, 7])
def test_best_by_value_is_the_mean_over_all_subsets(k):
    rng = np.random.default_rng(k)
    values, scores = rng.integers(0, 4, 7) / 4, rng.random(7)
    picked = []
    for subset in combinations(range(7), k):
        top = max(values[i] for i in subset)
        # Ties of all n, not of the subset alone: over subsets the means agree.
        picked.append(np.mean([scores[i] for i in subset if values[i] == top]))
    assert best_by_value(values, scores, k) == pytest.approx(np.mean(picked))


def test_weighted_votes_by_hand():
    labels, scores = [0, 0, 1, -1], [0.0, 0.0, 1.0, 1.0]
    assert weighted_vote(labels, scores, [0.1, 0.2, 0.4, 9.0]) == 1.0  # .3 against .4
    assert weighted_vote(labels, scores, [0.3, 0.2, 0.4, 9.0]) == 0.0
    assert weighted_vote(labels, scores, [0.25, 0.25, 0.5, 0.0]) == 0.5  # a tie
    assert weighted_vote([-1, -1], [1.0, 1.0], [1.0, 1.0]) == 0.0
    with pytest.raises(ValueError, match="must not be negative; got -1"):
        weighted_vote(labels, scores, [-1.0, 0.0, 0.0, 0.0])


def test_equal_weights_are_a_majority_of_all():
    rng = np.random.default_rng(0)
    for _ in range(20):
        labels, scores = rng.integers(-1, 4, 9), rng.random(9)
        wanted = majority_at_k(labels, scores, 9)
        assert weighted_vote(labels, scores, np.full(9, 0.3)) == pytest.approx(wanted)


def test_stopping_by_hand():
    upper = [
        [0.9, 0.05, 0.5, 0.02],  # stopped before its second token: 3 of 4 saved; it had failed
        [0.9, 0.9],  # runs on
        [0.04, 0.9, 0.9, 0.9],  # stopped at once, wrongly: it had succeeded
    ]
    found = stopping(upper, [0.0, 1.0, 1.0], 0.1)
    assert found.stopped == pytest.approx(2 / 3)
    assert found.tokens_saved == pytest.approx((3 + 4) / 10)
    assert found.false_stops == pytest.approx(1 / 2)
    assert found.score_lost == pytest.approx(1 / 2)
    none = stopping(upper, [0.0, 1.0, 1.0], 0.01)
    assert (none.stopped, none.tokens_saved, none.score_lost) == (0, 0, 0)
    assert np.isnan(none.false_stops)
    with pytest.raises(ValueError, match="got 3 completions and 2 scores"):
        stopping(upper, [0.0, 1.0], 0.1)
