import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrl_envs.task import Problem
from distrl_envs.tasks.arithmetic import ArithmeticTask

TASK = ArithmeticTask()
SUM = TASK.posed(0, 472, "+", 95)
DIFFERENCE = TASK.posed(0, 502, "-", 95)


def test_working_by_hand():
    rng = np.random.default_rng(0)
    assert SUM.prompt == "4 7 2 + 0 9 5 :"
    assert TASK.solution(SUM, rng) == ("2 + 5 + 0 = 7 , 7 + 9 + 0 = 6 , 4 + 0 + 1 = 5 -> 5 6 7")
    assert TASK.solution(DIFFERENCE, rng) == (
        "2 - 5 - 0 = 7 , 0 - 9 - 1 = 0 , 5 - 0 - 1 = 4 -> 4 0 7"
    )


def test_every_column_of_the_working_is_true_modulo_10():
    rng = np.random.default_rng(0)
    for _ in range(200):
        _, solution = TASK.sample_solved(rng)
        working = solution.partition(" -> ")[0]
        for column in working.split(" , "):
            left, right = column.split(" = ")
            assert eval(left) % 10 == int(right)


@pytest.mark.parametrize("digits", [1, 2, 5, 12])
def test_problems_are_true_and_their_solutions_correct(digits):
    task = ArithmeticTask(digits=digits)
    rng = np.random.default_rng(0)
    symbols = set()
    for _ in range(100):
        problem, solution = task.sample_solved(rng)
        asked = problem.prompt.removesuffix(" :").split(" ")
        symbol = asked[digits]
        left, right = int("".join(asked[:digits])), int("".join(asked[digits + 1 :]))
        truth = left + right if symbol == "+" else left - right
        assert truth >= 0
        assert int(solution.rpartition("->")[2].replace(" ", "")) == truth
        assert task.grade(problem, solution).score == 1.0
        assert task.grade(problem, f"-> {truth + 1}").status == "wrong"
        symbols.add(symbol)
    assert symbols == {"+", "-"}


def test_either_order_of_a_sum_is_one_problem_but_not_of_a_difference():
    assert TASK.posed(0, 1, "+", 2).key == TASK.posed(0, 2, "+", 1).key
    assert TASK.posed(0, 3, "-", 2).key != TASK.posed(0, 3, "+", 2).key


@pytest.mark.parametrize(
    ("completion", "status"),
    [
        ("-> 5 6 7", "correct"),
        ("-> 567", "correct"),
        ("→ 567.", "correct"),
        ("anything at all -> 9 -> 0 5 6 7\n", "correct"),
        ("-> 5 6 8", "wrong"),
        ("-> 5 6", "wrong"),
        ("-> 5 6 7 7", "wrong"),
        ("5 6 7", "no_answer"),
        ("-> 567 I think", "no_answer"),
        ("-> 567 ->", "no_answer"),
        ("->", "no_answer"),
        ("-> 5\n67", "no_answer"),
        ("-> -567", "no_answer"),
        ("", "no_answer"),
    ],
)
def test_verdicts(completion, status):
    grade = TASK.grade(SUM, completion)
    assert grade.status == status
    assert grade.score == float(status == "correct")


def test_zero_and_leading_zeros():
    problem = TASK.posed(0, 5, "-", 5)
    assert TASK.grade(problem, "-> 0").answer == "0"
    assert TASK.grade(problem, "-> 0 0 0").score == 1.0


def test_a_cut_completion_is_graded_as_it_stands():
    assert TASK.grade(SUM, "-> 567", truncated=True).status == "correct"
    assert TASK.grade(SUM, "-> 56", truncated=True).status == "too_long"
    assert TASK.grade(SUM, "2 + 5", truncated=True).status == "too_long"


@given(st.one_of(st.text(), st.text(alphabet="0123456789->+ \n").map("->".__add__)))
def test_grading_never_raises(text):
    grade = TASK.grade(SUM, text)
    assert grade.score == float(grade.status == "correct")


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "hostile", ["-> " + "9" * 300_000, "-> " + "9 " * 200_000 + "x", "->" * 99_999]
)
def test_grading_time_is_about_linear(hostile):
    assert TASK.grade(SUM, hostile).score == 0.0


@pytest.mark.parametrize("digits", [0, 13])
def test_impossible_difficulties_are_refused(digits):
    with pytest.raises(ValueError, match=rf"digits={digits}.*1\.\.12"):
        ArithmeticTask(digits=digits)


def test_the_instruction_asks_for_what_the_grader_reads():
    assert "472 + 95" in TASK.instruction(SUM)
    stated = TASK.instruction(SUM).rpartition("as in: ")[2]
    made = Problem(0, "", {"result": 42}, "")
    assert TASK.grade(made, stated).score == 1.0


def test_what_a_critic_is_told_by_hand():
    data = {"left": 47, "symbol": "+", "right": 25, "result": 72}
    problem = Problem(0, "4 7 + 2 5 :", data, "2|25+47")
    # The right working has 18 words: 7 + 5 + 0 = 2 , 4 + 2 + 1 = 7 -> 7 2
    said = {
        # text: agrees, words of the working, answering, right, digits of the result
        "": (1, 0, 0, 0, 0),
        "7 + 5 + 0 = 2 , 4": (1, 9, 0, 0, 0),
        "7 + 5 + 0 = 3 ,": (0, 6, 0, 0, 0),
        "7 + 5 + 0 = 2 , 4 + 2 + 1 = 7 ->": (1, 16, 1, 1, 0),
        "7 + 5 + 0 = 2 , 4 + 2 + 1 = 7 -> 7": (1, 17, 1, 1, 1),
        "-> 7 2": (0, 0, 1, 1, 2),
        "-> 8": (0, 0, 1, 0, 0),
    }
    found = ArithmeticTask(digits=2).critic_observation(problem, (), list(said))
    for row, (agrees, words, *flags, digits) in zip(found, said.values(), strict=True):
        assert row == pytest.approx((agrees, words / 18, *flags, digits / 2))
