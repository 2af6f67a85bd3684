"""Facts as JSON: what structure is worth, and what the task asks."""

import json

import numpy as np
import pytest

from distrl_envs import make_task
from distrl_envs.grading.structure_reward import checked_weights, structure_of
from distrl_envs.tasks.json_record import JsonRecordTask

RIGHT = {"name": "Mara", "age": 34, "city": "Lima"}


@pytest.mark.parametrize(
    ("text", "checks"),
    [
        ('{"name": "Mara", "age": 34, "city": "Lima"}', (1, 1, 1, 1)),
        (' {"city": "Lima", "age": 34, "name": "Mara"}\n', (1, 1, 1, 1)),
        ('Here: {"name": "Mara", "age": 34, "city": "Lima"} done', (1, 1, 1, 0)),
        ('{"name": "Mara", "age": "34", "city": "Lima"}', (1, 2 / 3, 2 / 3, 1)),
        ('{"name": "Mara", "age": 35, "city": "Lima"}', (1, 1, 2 / 3, 1)),
        ('{"name": "Mara", "age": 34, "city": "Lima", "sex": "f"}', (1, 3 / 4, 1, 1)),
        ('{"name": "Ana", "name": "Mara", "age": 34, "city": "Lima"}', (1, 1, 1, 0)),
        ('{"name": "Mara", "age": NaN, "city": "Lima"}', (1, 2 / 3, 2 / 3, 0)),
        ("{}", (1, 0, 0, 1)),
        ('["name"]', (0, 0, 0, 0)),
        ("", (0, 0, 0, 0)),
        ("{" * 100_000, (0, 0, 0, 0)),
        ('{"name": ' + "[" * 100_000 + "]" * 100_000 + "}", (0, 0, 0, 0)),
        ('{"age": ' + "1" * 5_000 + "}", (0, 0, 0, 0)),
    ],
)
def test_checks_by_hand(text, checks):
    assert structure_of(text, RIGHT)[:4] == pytest.approx(checks)


def test_true_is_no_number():
    assert structure_of('{"age": true}', {"age": 1})[:4] == (1, 0, 0, 1)


def test_the_reward_is_the_weighted_mean_of_the_checks():
    found = structure_of('{"name": "Mara", "age": 35, "city": "Lima", "x": 1}', RIGHT)
    weights = checked_weights({"schema": 1.0, "content": 3.0})
    assert found.reward(weights) == pytest.approx((3 / 4 + 3 * 2 / 3) / 4)


@pytest.mark.parametrize(
    ("weights", "words"),
    [({"parser": 1.0}, "'parser'"), ({"parse": -1.0}, ">= 0"), ({"parse": 0.0}, "above 0")],
)
def test_weights_that_make_no_sense_are_refused(weights, words):
    with pytest.raises(ValueError, match=words):
        make_task("json_record", weights=weights)


@pytest.mark.parametrize("fields", [2, 3, 5])
def test_solutions_are_correct_and_the_prompt_names_every_field_and_fact(fields):
    task, rng = JsonRecordTask(fields=fields), np.random.default_rng(0)
    for row in range(50):
        problem = task.problem(row)
        record = problem.data["record"]
        assert len(record) == fields
        for name, value in record.items():
            assert f'"{name}"' in problem.prompt
            assert isinstance(value, bool) or str(value) in problem.prompt
        if fields > 3:
            assert ("is not a member" in problem.prompt) is not record["member"]
        grade = task.grade(problem, task.solution(problem, rng))
        assert (grade.score, grade.status) == (1.0, "correct")
        wrong = json.dumps({**record, "age": record["age"] + 1})
        graded = task.grade(problem, wrong)
        assert graded.status == "wrong"
        assert graded.score == pytest.approx(0.4 + 0.6 * (fields - 1) / fields)
    assert task.grade(problem, "no").status == "no_answer"
    assert task.grade(problem, '{"name"', truncated=True).status == "too_long"


def test_it_has_no_tokenizer_of_its_own_and_refuses_other_sizes():
    with pytest.raises(ValueError, match="has no tokenizer of its own"):
        JsonRecordTask().tokenizer()
    with pytest.raises(ValueError, match="fields=6"):
        JsonRecordTask(fields=6)
