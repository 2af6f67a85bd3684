"""Reasoning Gym's generators as tasks: its own answers are right, others are less."""

import pickle

import pytest

pytest.importorskip("reasoning_gym")

from reasoning_gym.factory import DATASETS

from distrl_envs import TokenEnv
from distrl_envs.task import split_of
from distrl_envs.tasks import make_task
from tests.envs.byte_tokenizer import byte_tokenizer

QUICK = ("leg_counting", "isomorphic_strings", "acre", "graph_color", "sokoban")
"""An integer, one whose problems depend on the order of sets, one that makes all problems
beforehand, one with many right answers, a game."""
NO_ANSWER = {"boxnet", "rush_hour"}
"""Generators that name no right answer."""
CONFIGS = {
    "composite": {"datasets": [{"name": "lcm", "weight": 1.0}, {"name": "gcd", "weight": 1}]}
}
RAISES = {"prime_factorization"}
"""Generators whose verifiers raise over words."""
BROKEN = {"game_of_life_halting"}
"""Generators that are refused: their verifiers take anything for right."""


def gym(name, **options):
    return make_task(f"reasoning_gym:{name}", workers=1, **options)


def check(name):
    task = gym(name, config=CONFIGS.get(name))
    problems = [task.problem(row) for row in range(2)]
    if name in NO_ANSWER:
        assert {problem.data["answer"] for problem in problems} == {None}
        return
    own = [task.grade(problem, f"I think so. {task.solution(problem)}") for problem in problems]
    assert [(grade.score, grade.status) for grade in own] == [(1.0, "correct")] * 2
    for problem in problems:
        grade = task.grade(problem, "<answer>surely not this</answer>")
        assert 0.0 <= grade.score < 1.0
        assert grade.status == ("verifier_error" if name in RAISES else "wrong")


def test_a_verifier_that_raises_is_counted_apart():
    check("prime_factorization")


@pytest.mark.parametrize("name", QUICK)
def test_its_own_answer_is_right_and_another_is_less(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(DATASETS) - set(QUICK) - BROKEN))
def test_all_generators(name):
    check(name)


def test_problems_depend_on_the_row_alone_and_splits_do_not_overlap():
    keys = {}
    for split in ("train", "validation", "test"):
        task = gym("leg_counting", split=split)
        keys[split] = {task.problem(row).key for row in range(20)}
        assert all(split_of(key) == split for key in keys[split])
        again = pickle.loads(pickle.dumps(task))
        assert again.problem(7) == task.problem(7)
        assert again.grade(again.problem(7), task.solution(task.problem(7))).score == 1.0
    assert len(set().union(*keys.values())) == 60
    assert gym("leg_counting", seed=1).problem(0).key != gym("leg_counting").problem(0).key


def test_config_and_levels_change_the_problems():
    words = [
        len(gym("leg_counting", level=level).problem(0).prompt.split(",")) for level in (0, 20)
    ]
    assert words[1] >= words[0] + 5  # From 1-2 animals up to 21.
    one = gym(
        "leg_counting", level={"num_animals": 4}, config={"max_instances": 2, "min_instances": 2}
    )
    assert one.problem(0).prompt.split("you have")[1].count(" 2 ") >= 1
    assert gym("power_function").problem(0).prompt


def test_the_last_tags_hold_the_answer():
    task = gym("leg_counting")
    problem = task.problem(0)
    right = task.solution(problem)
    for text, status in [
        (f"<answer>1</answer> no, {right}", "correct"),
        (f"<answer>draft {right}", "correct"),
        (f"{right} or <answer>1</answer>", "wrong"),
        (problem.data["answer"], "no_answer"),
        ("<answer></answer>", "no_answer"),
    ]:
        assert task.grade(problem, text).status == status, text
    assert task.grade(problem, "<answer>29", truncated=True).status == "too_long"


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("leg_countin", {}, "nearest are leg_counting"),
        ("leg_counting", {"config": {"animals": 3}}, "does not take"),
        ("leg_counting", {"config": {"seed": 3}}, "set the task's seed"),
        ("leg_counting", {"level": {"legs": 1}}, r"the curriculum has \['num_animals'"),
        ("leg_counting", {"level": {"num_animals": 99}}, "must be in 0..35"),
        ("composite", {}, "datasets"),
        ("game_of_life_halting", {}, "cannot be trained on"),
        ("leg_counting", {"instruction": "{problem}"}, "between <answer> and"),
        ("leg_counting", {"levels": 1}, "does not take"),
    ],
)
def test_what_does_not_exist_is_refused(name, options, words):
    with pytest.raises(ValueError, match=words):
        gym(name, **options)


def test_in_the_environment():
    env = TokenEnv(
        "reasoning_gym:chain_sum", tokenizer=byte_tokenizer(), task_config={"workers": 1}
    )
    _, info = env.reset(options={"row": 3})
    assert env.tokenizer.decode(info["prompt_ids"]).endswith("between <answer> and </answer>.")
    answer = env.task.solution(info["problem"])
    assert (
        env.grade_many([3], [[*env.tokenizer.encode(answer), env.eos_token_id]])[0].grade.score == 1
    )
