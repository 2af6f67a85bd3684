"""maj@k by hand and against the enumeration of every subset."""

import time
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rllib_distrl.maths.choosing import group_answers, majority_at_k


def enumerated_majority(labels, scores, k):
    """Every subset votes; ties share; no votes score 0."""
    means = {g: np.mean([s for x, s in zip(labels, scores, strict=True) if x == g]) for g in labels}
    total, count = 0.0, 0
    for subset in combinations(labels, k):
        count += 1
        votes = Counter(g for g in subset if g >= 0)
        if votes:
            top = max(votes.values())
            winners = [g for g, v in votes.items() if v == top]
            total += sum(means[g] for g in winners) / len(winners)
    return total / count


def test_majority_of_the_whole_pool_by_hand():
    labels, scores = [0, 0, 1, 1, 1, -1], [1, 1, 0, 0, 0, 0]
    assert majority_at_k(labels, scores, 6) == 0.0
    # A tie of the right answer with one wrong answer is worth a half.
    assert majority_at_k([0, 0, 1, 1], [1, 1, 0, 0], 4) == 0.5
    # No answer has no vote: one right answer beats three without any.
    assert majority_at_k([-1, 0, -1, -1], [0, 1, 0, 0], 4) == 1.0


def test_majority_of_pairs_by_hand():
    # Labels A A B: AA wins for A (1), AB twice is a tie (1/2 each): (1 + .5 + .5) / 3.
    assert majority_at_k([0, 0, 1], [1, 1, 0], 2) == pytest.approx(2 / 3)
    # A, B and one silent: {A,B} tie .5, {A,-} 1, {B,-} 0.
    assert majority_at_k([0, 1, -1], [1, 0, 0], 2) == pytest.approx(0.5)


def test_majority_of_one_is_the_average_score():
    labels = [0, 1, 1, -1, 2, 0, 0, 3]
    scores = [1, 0, 0, 0, 0.5, 1, 1, 0]
    assert majority_at_k(labels, scores, 1) == pytest.approx(np.mean(scores))


def test_nobody_votes():
    assert majority_at_k([-1, -1, -1], [0, 0, 0], 2) == 0.0


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_majority_against_enumeration(data):
    n = data.draw(st.integers(1, 10))
    groups = data.draw(st.integers(1, 5))
    labels = data.draw(st.lists(st.integers(-1, groups - 1), min_size=n, max_size=n))
    worth = data.draw(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=n, max_size=n))
    scores = [w if g >= 0 else 0.0 for g, w in zip(labels, worth, strict=True)]
    k = data.draw(st.integers(1, n))
    expected = enumerated_majority(labels, scores, k)
    assert majority_at_k(labels, scores, k) == pytest.approx(expected, abs=1e-10)


def test_majority_of_a_large_pool_against_sampled_subsets():
    rng = np.random.default_rng(1)
    labels = rng.choice([-1, 0, 1, 2, 3, 4], p=[0.1, 0.34, 0.3, 0.2, 0.05, 0.01], size=1024)
    scores = (labels == 0).astype(float)
    for k in (16, 128):
        hits = 0.0
        for _ in range(4000):
            votes = Counter(x for x in rng.choice(labels, size=k, replace=False) if x >= 0)
            top = max(votes.values())
            hits += (votes[0] == top) / sum(v == top for v in votes.values())
        got = majority_at_k(labels, scores, k)
        assert got == pytest.approx(hits / 4000, abs=4 * 0.5 / np.sqrt(4000))


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="k must lie"):
        majority_at_k([0, 1], [1, 0], 3)
    with pytest.raises(ValueError, match="must both be"):
        majority_at_k([0, 1], [1, 0, 0], 1)


def test_answers_are_grouped_by_equality_unless_told_otherwise():
    assert group_answers(["1/2", None, "0.5", "1/2"]).tolist() == [0, -1, 1, 0]

    def same_number(a, b):
        return eval(a) == eval(b)

    answers = ["1/2", None, "0.5", "3", "1/2", "3.0"]
    assert group_answers(answers, same_number).tolist() == [0, -1, 0, 1, 0, 1]


def test_groups_are_compared_with_the_first_of_each():
    def same(one, other):
        return abs(one - other) <= 1

    assert group_answers([1, 2, None, 3, 2, 4], same).tolist() == [0, 0, -1, 1, 0, 1]
    # What comes after 64 groups is compared with those only.
    assert group_answers([*range(0, 132, 2), 130, 131, 1], same).tolist()[-4:] == [65, 65, 66, 0]


def test_comparisons_have_a_budget_of_seconds():
    calls = []

    def slow(one, other):
        calls.append((one, other))
        time.sleep(0.05)
        return one % 2 == other % 2

    assert group_answers(range(60), slow, seconds=0.2).tolist()[:4] == [0, 1, 0, 1]
    assert len(calls) <= 5
    assert group_answers(range(6), slow, seconds=60.0).tolist() == [0, 1] * 3
