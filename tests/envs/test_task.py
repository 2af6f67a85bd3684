import importlib
import pickle
from collections import Counter

import numpy as np
import pytest

from distrl_envs import TASKS, Grade, Problem, Task, distinct_rows, make_task
from distrl_envs.task import SPLITS, Draws, split_of

GENERATED = (
    "countdown", "arithmetic", "graph_path", "sums", "blackjack", "mastermind", "countdown_check",
)  # fmt: skip
EASIEST = {
    "countdown": {"numbers": 2}, "arithmetic": {"digits": 1}, "graph_path": {"nodes": 4},
    "sums": {"largest": 9}, "blackjack": {}, "mastermind": {},
    "countdown_check": {"numbers": 2},
}  # fmt: skip


class ListTask(Task):
    name = "list"

    def __init__(self, keys):
        self.keys = keys

    def __len__(self):
        return len(self.keys)

    def problem(self, row):
        self.check_row(row)
        return Problem(row, self.keys[row], {}, self.keys[row])

    def grade(self, problem, completion, *, truncated=False):
        return Grade(float(completion == problem.key), "correct")


@pytest.mark.parametrize("name", GENERATED)
def test_splits_do_not_overlap_and_have_their_shares(name):
    keys = {}
    for split in SPLITS:
        for seed in (0, 1):
            task = make_task(name, split=split, seed=seed)
            keys.setdefault(split, set()).update(task.problem(row).key for row in range(1500))
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not keys[one] & keys[other]
    drawn = Counter(split_of(str(i)) for i in range(20_000))
    assert drawn["train"] == pytest.approx(14_000, rel=0.03)
    assert drawn["validation"] == pytest.approx(3_000, rel=0.07)
    assert drawn["test"] == pytest.approx(3_000, rel=0.07)


@pytest.mark.parametrize("name", GENERATED)
def test_a_row_is_the_same_problem_wherever_it_is_asked_for(name):
    task = make_task(name)
    forwards = [task.problem(row) for row in range(50)]
    copy = pickle.loads(pickle.dumps(make_task(name)))
    assert [copy.problem(row) for row in reversed(range(50))] == forwards[::-1]
    assert [problem.row for problem in forwards] == list(range(50))
    other_seed = [make_task(name, seed=1).problem(row).key for row in range(50)]
    assert sum(a == b.key for a, b in zip(other_seed, forwards, strict=True)) < 5


def test_rows_are_pinned():
    """What a row holds must not change between versions: evaluations would not compare."""
    first = {name: make_task(name, split="test").problem(0).prompt for name in GENERATED}
    assert first["countdown"] == "2 2 4 7 -> 84 :"
    assert first["arithmetic"] == "5 3 3 + 3 0 7 :"
    assert first["graph_path"].endswith("16 75 , 75 7 ; 72 -> 98 :")
    assert first["sums"] == "25 + 16 ="
    assert first["blackjack"] == "3 10 ; 13 , 0 -> 10 :"
    assert first["countdown_check"] == "1 5 8 8 -> 23 :"
    assert first["mastermind"] == "1 3 -> 1 , 0 :"


@pytest.mark.parametrize("name", GENERATED)
def test_rows_out_of_range_are_refused(name):
    task = make_task(name)
    for row in (-1, len(task)):
        with pytest.raises(ValueError, match=f"row {row} .*0..2147483646"):
            task.problem(row)
    assert task.problem(len(task) - 1).row == len(task) - 1


@pytest.mark.parametrize("name", GENERATED)
def test_an_unknown_split_is_refused(name):
    with pytest.raises(ValueError, match=r"'dev'.*train, validation, test"):
        make_task(name, split="dev")


def test_unknown_tasks_and_arguments_are_refused():
    with pytest.raises(ValueError, match=r"'countdwn'.*countdown, arithmetic, graph_path"):
        make_task("countdwn")
    with pytest.raises(ValueError, match="nowhere_at_all"):
        make_task("nowhere_at_all:Task")
    with pytest.raises(ValueError, match="digits"):
        make_task("countdown", digits=3)


def test_every_task_can_be_imported():
    for location in TASKS.values():
        module, _, name = location.partition(":")
        assert issubclass(getattr(importlib.import_module(module), name), Task)


def test_a_task_of_ones_own_by_module_and_class():
    made = make_task("distrl_envs.tasks.countdown:CountdownTask", numbers=3)
    assert len(made.problem(0).data["numbers"]) == 3


@pytest.mark.parametrize("name", GENERATED)
def test_distinct_rows_are_the_first_of_their_problems(name):
    task = make_task(name, **EASIEST[name], split="test")
    rows = distinct_rows(task, 5)
    seen = set()
    expected = []
    for row in range(rows[-1] + 1):
        key = task.problem(row).key
        if key not in seen:
            expected.append(row)
        seen.add(key)
    assert rows == expected


def test_distinct_rows_of_a_list():
    task = ListTask(["a", "b", "a", "c", "b"])
    assert distinct_rows(task, 3) == [0, 1, 3]
    assert distinct_rows(ListTask("abcdef"), 6, patience=1) == [0, 1, 2, 3, 4, 5]
    assert distinct_rows(task, 4) == [0, 1, 3]  # All that there are.


def test_distinct_rows_gives_up_on_a_generator_that_is_exhausted():
    task = make_task("countdown", numbers=2, split="test")
    with pytest.raises(ValueError, match="Asked for 1000 different problems"):
        distinct_rows(task, 1000, patience=300)


def test_grade_many_keeps_order_and_refuses_unequal_lengths():
    task = ListTask(["a", "b"])
    problems = [task.problem(0), task.problem(1)]
    assert [g.score for g in task.grade_many(problems, ["a", "a"], [False] * 2)] == [1.0, 0.0]
    with pytest.raises(ValueError):
        task.grade_many(problems, ["a"], [False])


def test_a_task_without_a_tokenizer_says_so():
    with pytest.raises(ValueError, match="'list' has no tokenizer"):
        ListTask([]).tokenizer()


def test_draws_are_uniform_and_independent_of_one_another():
    draws = Draws(b"uniform")
    counts = np.zeros((7, 7))
    for _ in range(7_000):
        counts[draws.below(7), draws.below(7)] += 1
    expected = 7_000 / 49
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 90  # 48 degrees of freedom: exceeded once in 5,000
    again = Draws(b"uniform")
    assert [again.below(10) for _ in range(100)] != [Draws(b"other").below(10)] * 100


def test_samples_are_distinct_and_cover_all_orders():
    draws = Draws(b"sample")
    orders = Counter(tuple(draws.sample(3, 2)) for _ in range(1_200))
    assert set(orders) == {(a, b) for a in range(3) for b in range(3) if a != b}
    assert min(orders.values()) > 140
