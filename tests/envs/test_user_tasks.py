"""Tasks of a user: found in the working directory, and named where they fail."""

import sys

import numpy as np
import pytest
import torch

from distrl_envs import Grade, Problem, Task, TokenEnv
from distrl_envs.task import TaskError
from distrl_envs.tokenizers import small_tokenizer

MODULE = """
from distrl_envs import Grade, Problem, Task
from distrl_envs.tokenizers import small_tokenizer


class Mine(Task):
    max_prompt_tokens = max_completion_tokens = 4

    def __init__(self, split="train", seed=0):
        pass

    def __len__(self):
        return 3

    def problem(self, row):
        return Problem(row, f"{row} 1", {"place": f"rows.csv:{row + 2}"}, str(row))

    def tokenizer(self):
        return small_tokenizer()

    def grade(self, problem, completion, *, truncated=False):
        return Grade(problem.row / 0, "wrong")
"""


class Mine(Task):
    """Does whatever it is told to do."""

    max_prompt_tokens = max_completion_tokens = 4

    def __init__(self, **methods):
        self.__dict__.update(methods)
        self.has_step_reward = "step_reward" in methods

    def __len__(self):
        return 3

    def problem(self, row):
        return Problem(row, f"{row} 1", {"place": f"rows.csv:{row + 2}"}, str(row))

    def tokenizer(self):
        return small_tokenizer()

    def grade(self, problem, completion, *, truncated=False):
        return self.answer(problem)


def finish(task, row=1):
    env = TokenEnv(task)
    env.reset(options={"row": row})
    return env.step(env.eos_token_id)


def leave(*_):
    sys.exit(3)


BAD_ANSWERS = {
    "a float": (lambda _: 1.0, r"returned 1\.0 \(float\)"),
    "a tuple": (lambda _: (1.0, "correct"), r"returned \(1\.0, 'correct'\) \(tuple\)"),
    "nothing": (lambda _: None, r"returned None \(NoneType\)"),
    "no score": (lambda _: Grade(None, "wrong"), r"Got score None \(NoneType\)"),
    "text": (lambda _: Grade("0.5", "wrong"), r"Got score '0\.5' \(str\)"),
    "nan": (lambda _: Grade(float("nan"), "wrong"), r"Got score nan \(float\)"),
    "inf": (lambda _: Grade(np.float32("inf"), "wrong"), "Got score inf"),
    "too much": (lambda _: Grade(1e300, "wrong"), r"Got score 1e\+300"),
    "two": (lambda _: Grade(np.zeros(2), "wrong"), "Got score array"),
    "no status": (lambda _: Grade(1.0, None), "Got status None"),
    "an answer": (lambda _: Grade(1.0, "correct", 7), "Got answer 7"),
    "an error": (lambda _: {}["key"], "KeyError: 'key'"),
    "an exit": (leave, "SystemExit: 3"),
}


@pytest.mark.parametrize("kind", BAD_ANSWERS)
def test_a_bad_grade_is_refused_with_row_and_file(kind):
    answer, reason = BAD_ANSWERS[kind]
    where = rf"Mine\.grade\(\) \({__file__}:\d+\) on row 1 \(rows\.csv:3\) .*"
    for call in (
        lambda: finish(Mine(answer=answer)),
        lambda: TokenEnv(Mine(answer=answer)).grade_many([1, 2], [[5], [5]]),
    ):
        with pytest.raises(TaskError, match=where + reason):
            call()


@pytest.mark.parametrize(
    "score", [1, True, np.float32(0.5), np.array(0.5), torch.tensor(0.5), -2.5]
)
def test_any_finite_number_is_a_score(score):
    grade = finish(Mine(answer=lambda _: Grade(score, "my own status")))[-1]["grade"]
    assert type(grade.score) is float
    assert grade.score == float(score)


@pytest.mark.parametrize("reward", [None, "0.5", float("nan"), (1,)])
def test_a_bad_step_reward_is_refused(reward):
    task = Mine(answer=lambda _: Grade(1.0, "correct"), step_reward=lambda *_: reward)
    with pytest.raises(TaskError, match=r"step_reward\(\).* on row 1 after 1 tokens failed: Value"):
        finish(task)


def test_a_bad_problem_and_a_wrong_number_of_grades_are_refused():
    with pytest.raises(TaskError, match=r"problem\(\).* of row 0 returned '1 2'"):
        finish(Mine(problem=lambda _: "1 2"))
    with pytest.raises(TaskError, match=r"problem\(\).* of row 0 failed: SystemExit: 3"):
        finish(Mine(problem=leave))
    few = Mine(grade_many=lambda *_: [])
    with pytest.raises(TaskError, match=r"to row 2 .* returned 0 grades for 2 completions"):
        TokenEnv(few).grade_many([1, 2], [[5], [5]])


def test_a_task_without_problems_is_refused():
    class Empty(Mine):
        def __len__(self):
            return 0

    with pytest.raises(ValueError, match="holds no problems in its split 'train'"):
        TokenEnv(Empty())


def test_a_module_in_the_working_directory_is_found(tmp_path, monkeypatch):
    (tmp_path / "task_lying_here.py").write_text(MODULE)
    (tmp_path / "task_that_breaks.py").write_text("value = 1\nother = vlaue\n")
    (tmp_path / "task_that_leaves.py").write_text("import sys\nsys.exit('bye')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    env = TokenEnv("task_lying_here:Mine")
    env.reset(options={"row": 2})
    with pytest.raises(TaskError, match=r"task_lying_here.py:\d+\) on row 2 .*ZeroDivision"):
        env.step(env.eos_token_id)
    with pytest.raises(ValueError, match=r"NameError.*task_that_breaks.py:2\)"):
        TokenEnv("task_that_breaks:Mine")
    with pytest.raises(ValueError, match=r"SystemExit: bye .*task_that_leaves.py:2\)"):
        TokenEnv("task_that_leaves:Mine")
    with pytest.raises(ValueError, match=f"working directory .{tmp_path}"):
        TokenEnv("task_that_is_nowhere:Mine")


def test_what_fails_while_a_task_is_built_is_not_called_a_wrong_argument(tmp_path, monkeypatch):
    built = MODULE.replace("        pass", "        len(3)")
    (tmp_path / "task_not_built.py").write_text(built)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TaskError, match=r"could not be built: TypeError: object of type 'int'"):
        TokenEnv("task_not_built:Mine")
    with pytest.raises(ValueError, match=r"does not take .*colour"):
        TokenEnv("task_not_built:Mine", task_config={"colour": "red"})
