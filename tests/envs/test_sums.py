"""Sums in plain language: what is asked, and which number is the answer."""

import numpy as np
import pytest

from distrl_envs import make_task
from distrl_envs.task import SPLITS, Problem
from distrl_envs.tasks.sums import SumsTask

TASK = SumsTask()
SUM = Problem(0, "17 + 20 =", {"left": 17, "right": 20, "result": 37}, "17+20")


def test_problems_are_true_and_their_solutions_correct():
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(300):
        problem, solution = TASK.sample_solved(rng)
        left, plus, right, equals = problem.prompt.split()
        assert (plus, equals) == ("+", "=")
        assert int(left) + int(right) == int(solution) <= 98
        assert TASK.grade(problem, solution).score == 1.0
        assert problem.key == "+".join(map(str, sorted((int(left), int(right)))))
        seen |= {int(left), int(right)}
    assert seen == set(range(50))


def test_the_question_in_english():
    assert TASK.instruction(SUM) == "Calculate 17 + 20. Give only the result."


@pytest.mark.parametrize(
    ("completion", "status", "answer"),
    [
        ("37", "correct", "37"),
        ("The answer is 37.", "correct", "37"),
        ("17 + 20 = 37", "correct", "37"),
        ("037.0", "correct", "37"),
        ("37 is 17 + 20", "wrong", "20"),
        ("37.5", "wrong", "37.5"),
        ("370", "wrong", "370"),
        ("It is easy.", "no_answer", None),
        ("", "no_answer", None),
        ("\u0663\u0667", "no_answer", None),
    ],
)
def test_the_last_number_is_the_answer(completion, status, answer):
    grade = TASK.grade(SUM, completion)
    assert (grade.status, grade.answer, grade.score) == (status, answer, status == "correct")


def test_what_is_cut_before_its_answer_is_too_long():
    assert TASK.grade(SUM, "To add 17 and", truncated=True).status == "too_long"
    assert TASK.grade(SUM, "It is 37 so", truncated=True).status == "correct"


def test_splits_share_the_pairs_of_either_order():
    keys = {
        split: {SumsTask(split, largest=9).problem(i).key for i in range(400)} for split in SPLITS
    }
    assert sum(map(len, keys.values())) == 55 == len(set.union(*keys.values()))


@pytest.mark.parametrize("largest", [8, 50])
def test_a_largest_number_out_of_bounds_is_refused(largest):
    with pytest.raises(ValueError, match=rf"largest={largest}; Sums takes 9..49"):
        make_task("sums", largest=largest)
