import pytest

from distrl_envs.task import Grade
from rllib_distrl.rollout.pool_metrics import join_pools, pool_metrics, pool_record

RIGHT, OTHER_RIGHT = Grade(1.0, "correct", "2/4"), Grade(1.0, "correct", "1/2")
WRONG, SILENT = Grade(0.0, "wrong", "3"), Grade(0.0, "no_answer", None)


def test_a_pool_of_four_by_hand():
    # One of four is right. Pairs: 3 of 6 hold it, and then it stands against "3" (a tie, 1/2),
    # another "3" (1/2), or nothing (1).
    metrics = pool_metrics([RIGHT, WRONG, WRONG, SILENT])
    assert metrics == pytest.approx(
        {
            "avg@4": 0.25,
            "pass@1": 0.25,
            "pass@2": 0.5,
            "pass@4": 1.0,
            "best@1": 0.25,
            "best@2": 0.5,
            "best@4": 1.0,
            "maj@1": 0.25,
            "maj@2": (0.5 + 0.5 + 1.0) / 6,
            "maj@4": 0.0,
            "distinct_correct": 1.0,
            "unparsable": 0.25,
        }
    )


def test_partial_credit_counts_for_the_best_but_not_as_passed():
    metrics = pool_metrics([RIGHT, Grade(0.5, "partial", "3"), WRONG, SILENT])
    assert metrics["avg@4"] == pytest.approx(0.375)
    # Pairs by their best: 1, 1, 1, 0.5, 0.5, 0.
    assert metrics["best@2"] == pytest.approx(4.0 / 6)
    assert metrics["pass@2"] == pytest.approx(0.5)


def test_equivalent_answers_vote_together():
    grades = [RIGHT, OTHER_RIGHT, WRONG]
    assert pool_metrics(grades)["maj@2"] == pytest.approx((1.0 + 0.5 + 0.5) / 3)
    assert pool_metrics([*grades, WRONG])["maj@4"] == 0.0
    together = pool_metrics([*grades, WRONG], lambda one, other: "/" in one and "/" in other)
    assert together["maj@4"] == pytest.approx(0.5)  # Two votes each.
    assert together["distinct_correct"] == 2.0


def test_correct_is_what_the_task_says_and_votes_need_answers():
    enough = Grade(0.7, "correct")  # correct_from = 0.5
    metrics = pool_metrics([enough, Grade(-1.0, "wrong")], votes=False)
    assert (metrics["pass@1"], metrics["pass@2"]) == (0.5, 1.0)
    assert metrics["best@2"] == pytest.approx(0.7)
    assert not [name for name in metrics if name.startswith("maj")]


def test_pools_are_kept_as_counts_and_joined_by_problem():
    half, passed = Grade(0.5, "partial", "3"), Grade(0.7, "correct")
    one = pool_record(7, 0, [RIGHT, WRONG, half, WRONG])
    assert one == [7, 0, 1, [[0.0, 2], [0.5, 1], [1.0, 1]]]
    other = pool_record(2, 0, [passed, WRONG, WRONG, WRONG])
    again = pool_record(7, 1, [RIGHT, RIGHT, RIGHT, WRONG])
    # The first is there twice, as it is when a validation was held again.
    assert join_pools([one, again, other, one]) == [
        [2, 1, [[0.0, 3], [0.7, 1]]],
        [7, 4, [[0.0, 3], [0.5, 1], [1.0, 4]]],
    ]
    assert join_pools([]) == []
