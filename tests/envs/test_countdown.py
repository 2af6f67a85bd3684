import math
from collections import Counter
from itertools import islice, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrl_envs.task import Problem, split_of
from distrl_envs.tasks.countdown import CountdownTask

PROBLEM = Problem(0, "3 4 7 9 -> 24 :", {"numbers": (3, 4, 7, 9), "target": 24}, "3 4 7 9|24")
SOLVED = "3 * 4 = 12 , 9 - 7 = 2 , 12 * 2 = 24"
TASK = CountdownTask()


def all_solutions(pool, target):
    """Every sequence of steps, by trying them all with Python's own arithmetic."""
    if len(pool) == 1:
        if pool[0] == target:
            yield []
        return
    for i in range(len(pool)):
        for j in range(len(pool)):
            if i == j:
                continue
            rest = [x for k, x in enumerate(pool) if k != i and k != j]
            for op in "+-*":
                value = eval(f"{pool[i]}{op}{pool[j]}")
                if 0 <= value <= 99:
                    for steps in all_solutions([*rest, value], target):
                        yield [f"{pool[i]} {op} {pool[j]} = {value}", *steps]


def is_valid(text, numbers, target):
    """An evaluator written another way: balances of a ledger instead of a pool."""
    balance = Counter(numbers)
    steps = text.split(" , ")
    for position, step in enumerate(steps):
        left, equals, right = step.partition(" = ")
        tokens = left.split(" ")
        if not equals or len(tokens) != 3 or tokens[1] not in ("+", "-", "*"):
            return False
        if not all(x.isdecimal() and x.isascii() for x in (tokens[0], tokens[2], right)):
            return False
        if eval(f"int('{tokens[0]}') {tokens[1]} int('{tokens[2]}')") != int(right):
            return False
        if int(right) > 99:
            return False
        balance.subtract([int(tokens[0]), int(tokens[2])])
        if min(balance.values()) < 0:
            return False
        balance[int(right)] += 1
        if position == len(steps) - 1 and int(right) != target:
            return False
    return sum(balance.values()) == 1


@pytest.mark.parametrize("numbers", [3, 4])
def test_every_solution_of_a_few_problems_is_correct(numbers):
    task = CountdownTask(numbers=numbers)
    for row in range(8):
        problem = task.problem(row)
        count = 0
        for steps in all_solutions(list(problem.data["numbers"]), problem.data["target"]):
            grade = task.grade(problem, " , ".join(steps))
            assert (grade.score, grade.status) == (1.0, "correct"), steps
            count += 1
        assert count > 0, "the generator promised a solution"


def test_mutated_solutions_agree_with_an_independent_evaluator():
    rng = np.random.default_rng(0)
    verdicts = Counter()
    words = [*map(str, range(0, 100, 7)), "+", "-", "*", "=", ",", "100", "108"]
    for row in range(30):
        problem = TASK.problem(row)
        numbers, target = problem.data["numbers"], problem.data["target"]
        for steps in islice(all_solutions(list(numbers), target), 5):
            tokens = " , ".join(steps).split(" ")
            for _ in range(20):
                mutant = list(tokens)
                place = int(rng.integers(len(mutant)))
                kind = rng.integers(4)
                if kind == 0:
                    mutant[place] = words[rng.integers(len(words))]
                elif kind == 1:
                    del mutant[place]
                elif kind == 2:
                    mutant.insert(place, words[rng.integers(len(words))])
                else:
                    other = int(rng.integers(len(mutant)))
                    mutant[place], mutant[other] = mutant[other], mutant[place]
                text = " ".join(mutant)
                expected = float(is_valid(text, numbers, target))
                assert TASK.grade(problem, text).score == expected, (problem.prompt, text)
                verdicts[expected] += 1
    assert verdicts[0.0] > 1000 and verdicts[1.0] > 20, "both verdicts must have been tried"


@pytest.mark.parametrize(
    ("completion", "status"),
    [
        (SOLVED, "correct"),
        ("3*4=12,9-7=2,12*2=24", "correct"),
        ("3 × 4 = 12\n9 − 7 = 2\n12 × 2 = 24\n", "correct"),
        ("3 * 4 = 12,\n9 - 7 = 2,\n\n2 * 12 = 24", "correct"),
        (f"{SOLVED}.", "correct"),
        (f"<answer>{SOLVED}</answer> I used <answer> and </answer> tags.", "correct"),
        ("So: <answer>1 + 1 = 2</answer> no, <answer>\n" + SOLVED + "\n</answer> done", "correct"),
        ("3 * 4 = 12 , 9 - 7 = 2", "wrong"),  # a number left over
        ("9 - 3 = 6 , 6 * 4 = 24", "wrong"),  # the target, but the 7 is left over
        ("3 * 7 = 21 , 21 + 3 = 24", "wrong"),  # one reused, two unused
        ("3 * 4 = 12 , 12 + 12 = 24", "wrong"),  # a result used twice
        ("3 * 8 = 24", "wrong"),  # a foreign number
        ("3 * 4 = 13 , 9 - 7 = 2 , 13 + 2 = 15", "wrong"),  # miscalculated
        ("3 * 4 = 12 , 9 - 7 = 2 , 12 + 2 = 14", "wrong"),  # another target
        ("3 * 4 = 12 , 9 - 7 = 2 , 12 * 2 = 24 ,", "wrong"),  # trailing garbage
        (SOLVED + " <pad>", "wrong"),
        (SOLVED + " , 24 + 0 = 24", "wrong"),
        (SOLVED + " ok", "wrong"),
        ("first " + SOLVED, "wrong"),
        ("3 * 4 = 12 , , 9 - 7 = 2 , 12 * 2 = 24", "wrong"),
        ("", "no_answer"),
        ("24", "no_answer"),
        ("3 / 1 = 3", "no_answer"),
        ("<answer></answer>", "no_answer"),
    ],
)
def test_verdicts(completion, status):
    grade = TASK.grade(PROBLEM, completion)
    assert grade.status == status
    assert grade.score == float(status == "correct")


@pytest.mark.parametrize(
    ("numbers", "target", "completion"),
    [
        ((4, 9, 25), 91, "4 * 25 = 100 , 100 - 9 = 91"),  # right, but through 100
        ((1, 2, 12), 11, "1 - 2 = -1 , 12 + -1 = 11"),  # right, but through -1
        ((2, 9, 90), 88, "2 - 90 = 88 , 88 + 9 = 97"),  # subtraction has a direction
        ((3, 9), 6, "3 - 9 = 6"),
    ],
)
def test_intermediate_results_stay_between_0_and_99(numbers, target, completion):
    problem = Problem(0, "", {"numbers": numbers, "target": target}, "")
    assert TASK.grade(problem, completion).score == 0.0


def test_0_and_99_are_allowed_on_the_way():
    problem = Problem(0, "", {"numbers": (9, 11, 1, 1), "target": 99}, "")
    assert TASK.grade(problem, "1 - 1 = 0 , 9 * 11 = 99 , 99 + 0 = 99").score == 1.0


def test_a_cut_completion_is_graded_as_it_stands():
    assert TASK.grade(PROBLEM, SOLVED, truncated=True).status == "correct"
    assert TASK.grade(PROBLEM, SOLVED[:-3], truncated=True).status == "too_long"
    assert TASK.grade(PROBLEM, "", truncated=True) == TASK.grade(PROBLEM, "x", truncated=True)


def test_answers_that_differ_in_spelling_only_are_one_answer():
    spellings = ["3*4=12,9-7=2,12*2=24", "3 × 4 = 12\n9 - 7 = 2\n12 × 2 = 24", SOLVED]
    assert {TASK.grade(PROBLEM, text).answer for text in spellings} == {SOLVED}


@given(st.one_of(st.text(), st.text(alphabet="0123456789+-*=×, \n<answer>/"), st.binary()))
def test_grading_never_raises(text):
    text = text.decode("utf-8", "surrogateescape") if isinstance(text, bytes) else text
    grade = TASK.grade(PROBLEM, text)
    assert grade.score == float(grade.status == "correct")
    assert TASK.grade_many([PROBLEM], [text], [False]) == [grade]


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "hostile", [" " * 300_000, "\n," * 100_000, "9" * 300_000, "1+1=2," * 50_000, "1 " * 99_999]
)
def test_grading_time_is_about_linear(hostile):
    assert TASK.grade(PROBLEM, hostile).score == 0.0


@pytest.mark.parametrize("numbers", [2, 3, 4, 5, 6])
def test_solutions_by_search_and_by_construction_are_valid(numbers):
    task = CountdownTask(numbers=numbers, split="validation")
    rng = np.random.default_rng(0)
    for _ in range(20):
        problem, solution = task.sample_solved(rng)
        assert is_valid(solution, problem.data["numbers"], problem.data["target"])
        found = task.solution(problem, rng)
        assert is_valid(found, problem.data["numbers"], problem.data["target"])
        assert split_of(problem.key) == "validation"
        assert task.grade(problem, solution).score == 1.0


def test_the_search_reaches_every_solution():
    expected = {" , ".join(steps) for steps in all_solutions([2, 3, 7], 42)}
    rng = np.random.default_rng(0)
    problem = Problem(0, "", {"numbers": (2, 3, 7), "target": 42}, "")
    assert {TASK.solution(problem, rng) for _ in range(40 * len(expected))} == expected


def test_the_search_reports_what_cannot_be_solved():
    problem = Problem(0, "1 1 -> 99 :", {"numbers": (1, 1), "target": 99}, "")
    with pytest.raises(ValueError, match="1 1 -> 99"):
        TASK.solution(problem, np.random.default_rng(0))


def test_problems_keep_to_the_rules():
    for row in range(300):
        problem = TASK.problem(row)
        numbers, target = problem.data["numbers"], problem.data["target"]
        assert len(numbers) == 4 and all(1 <= n <= 9 for n in numbers)
        assert 10 <= target <= 99
        assert problem.prompt == f"{' '.join(map(str, numbers))} -> {target} :"
        assert problem.key == f"{' '.join(map(str, sorted(numbers)))}|{target}"


@pytest.mark.parametrize("numbers", [0, 1, 7])
def test_impossible_difficulties_are_refused(numbers):
    with pytest.raises(ValueError, match=r"numbers=\d.*2\.\.6"):
        CountdownTask(numbers=numbers)


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        (SOLVED, 1.0),
        ("3 * 4 = 12 , 9 - 7 = 2 , 12 + 2 = 14", 0.3 + 0.4 * 0.5),  # 10 away
        ("3 * 4 = 12 , 9 + 7 = 16 , 16 - 12 = 4", 0.3),  # 20 away is not close
        ("3 * 4 = 12 , 9 + 7 = 16 , 12 + 16 = 28", 0.3 + 0.4 * 0.8),
        ("3 * 4 = 12 , 9 - 7 = 2 , 12 * 2 = 25", 0.2),
        ("3 * 4 = 12 , 9 - 8 = 1 , 12 * 2 = 24", 0.1),
        ("3 * 4 = 11 , 9 - 7 = 2 , 12 * 2 = 24", 0.0),
        ("3 * 4 = 12", 0.1),
        ("3 * 4 = 12 , 9 - 7 =", 0.0),
        (SOLVED + " , 24 + 0 = 24", 0.7),  # solved, then spoilt
        ("", 0.0),
        ("24", 0.0),
    ],
)
def test_partial_credit_by_hand(completion, score):
    task = CountdownTask(partial_credit=True)
    grade = task.grade(PROBLEM, completion)
    assert grade.score == pytest.approx(score, abs=1e-12)
    strict = TASK.grade(PROBLEM, completion)
    assert (grade.status, grade.answer) == (strict.status, strict.answer)
    assert task.grade(PROBLEM, completion, truncated=True).score == grade.score


def test_partial_credit_does_not_change_the_problems():
    graded = CountdownTask("validation", seed=3, partial_credit=True)
    assert [graded.problem(row) for row in range(5)] == [
        CountdownTask("validation", seed=3).problem(row) for row in range(5)
    ]


@given(st.one_of(st.text(), st.text(alphabet="0123456789+-*=, \n")))
def test_only_a_solution_gets_full_partial_credit(text):
    grade = CountdownTask(partial_credit=True).grade(PROBLEM, text)
    assert grade.score == 1.0 if grade.status == "correct" else 0.0 <= grade.score <= 0.7 + 1e-12


def test_what_a_critic_is_told_of_an_answer_by_hand():
    # Behind 3 * 4 these are legal: 2 + 12, 12 + 2, 12 - 2, 2 * 12, 12 * 2; two of the five give 14.
    task = CountdownTask(numbers=3)
    problem = Problem(0, "2 3 4 -> 14 :", {"numbers": (2, 3, 4), "target": 14}, "")
    said = {
        # text: valid, reachable, success, steps, place
        "3 * 4": (1, 1, 2 / 5, 0, 3 / 5),
        "3 * 4 =": (1, 1, 2 / 5, 0, 4 / 5),
        "3 * 4 = 12": (1, 1, 2 / 5, 1 / 2, 1),
        "3 * 4 = 12 ,": (1, 1, 2 / 5, 1 / 2, 0),
        "3 * 4 = 12 , 12": (1, 1, 1 / 3, 1 / 2, 1 / 5),  # of 12 + 2, 12 - 2, 12 * 2
        "3 * 4 = 12 , 2": (1, 1, 1 / 2, 1 / 2, 1 / 5),  # of 2 + 12, 2 * 12: 2 - 12 is not legal
        "3 * 4 = 12 , 12 -": (1, 0, 0, 1 / 2, 2 / 5),
        "3 * 4 = 12 , 12 + 2 = 14": (1, 1, 1, 1, 1),
        "3 * 4 = 12 , 12 + 2 = 14 ,": (0, 0, 0, 1, 0),  # nothing is left to combine
        "3 * 4 = 13": (0, 0, 0, 1 / 2, 1),
        "2 - 3": (0, 0, 0, 0, 3 / 5),  # negative
        "3 4": (0, 0, 0, 0, 0),
        "<answer>3 * 4 = 12\n12 +": (1, 1, 1, 1 / 2, 2 / 5),
    }
    found = task.critic_observation(problem, (), list(said))
    for text, row, wanted in zip(said, found, said.values(), strict=True):
        valid, reachable, success, log_success, steps, place = row
        assert (valid, reachable, success, steps, place) == pytest.approx(wanted), text
        assert log_success == pytest.approx(math.log(success) / 10 if success else -2.0), text
    assert len(task.critic_numbers) == len(found[0])


def test_success_of_uniform_play_is_the_share_of_games_that_win():
    task = CountdownTask(numbers=3)
    problem = task.problem(4)
    rng, wins, games = np.random.default_rng(0), 0, 4000
    for _ in range(games):
        pool = list(problem.data["numbers"])
        while len(pool) > 1:
            legal = [
                (i, j, value)
                for i, j in permutations(range(len(pool)), 2)
                for value in (pool[i] + pool[j], pool[i] - pool[j], pool[i] * pool[j])
                if 0 <= value <= 99
            ]
            i, j, value = legal[rng.integers(len(legal))]
            pool = [n for k, n in enumerate(pool) if k not in (i, j)] + [value]
        wins += pool[0] == problem.data["target"]
    (row,) = task.critic_observation(problem, (), [""])
    assert row[2] == pytest.approx(wins / games, abs=4 * math.sqrt(row[2] / games))
