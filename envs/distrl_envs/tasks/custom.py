"""A task of one's own: any function that scores a completion."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from distrl_envs.task import PLACE, Grade, Problem, TaskError, checked_number
from distrl_envs.tasks.data_task import PROBLEM, DataTask
from distrl_envs.user_code import load_attribute, named


class ScoreError(TaskError):
    """A user's function failed on a row; that is never a score of 0."""


class CustomTask(DataTask):
    """Problems graded by `score(prompt, completion, row) -> float`.

    `prompt` is the row's problem and `row` a copy of all its fields. A score of `correct_from` or
    more counts as correct, in pass@k too. What the function raises, `sys.exit` included, and what
    it returns that is no finite number, is raised as a `ScoreError` with the row's file and line.
    """

    name = "custom"
    names_answers = False

    def __init__(
        self,
        data: str | Path | Mapping[str, str],
        score: str,
        *,
        step_score: str | None = None,
        correct_from: float = 1.0,
        instruction: str = "{problem}",
        **common: Any,
    ):
        """Loads problems and functions.

        Args:
            data: A file or `hf:name/split`, or one for each split; see `DataTask`.
            score: `module:function`, called as `function(prompt, completion, row)`.
            step_score: `module:function` for a reward at each step, called as
                `function(prompt, completion_ids, row)` with the tokens so far.
            correct_from: Lowest score that counts as correct.
            instruction: Prompt around `{problem}`.
            **common: What every task over data takes; see `DataTask`.

        Raises:
            ValueError: If the data has faults or a function cannot be found.
        """
        super().__init__(data, {"problem": PROBLEM}, instruction=instruction, **common)
        self.correct_from = correct_from
        self._score, self._step_score = score, step_score
        self._functions: dict[str, Callable[..., Any]] = {}
        for location in filter(None, (score, step_score)):
            self._function(location)
        self.has_step_reward = self.has_step_reward or step_score is not None

    def __getstate__(self) -> dict[str, Any]:
        """Functions travel by name."""
        return {**super().__getstate__(), "_functions": {}}

    def grade(self, problem: Problem, completion: str, *, truncated: bool = False) -> Grade:
        """The function's score.

        Raises:
            ScoreError: If the function raises or returns no finite number.
        """
        score = self._call(self._score, problem, completion)
        if score >= self.correct_from:
            return Grade(score, "correct")
        return Grade(score, "too_long" if truncated else "wrong")

    def grading_key(self, problem: Problem) -> str:
        """As for any task; the source of the function's module and `correct_from` belong to it."""
        module = sys.modules[self._function(self._score).__module__]
        file = getattr(module, "__file__", None)
        source = Path(file).read_bytes() if file else b""
        own = blake2b(source + repr(self.correct_from).encode(), digest_size=8).hexdigest()
        return f"{super().grading_key(problem)}-{own}"

    def step_reward(self, problem: Problem, completion_ids: Sequence[int]) -> float:
        """The step function's value less the length penalty.

        Raises:
            ScoreError: If the function raises or returns no finite number.
        """
        reward = super().step_reward(problem, completion_ids)
        if self._step_score is not None:
            reward += self._call(self._step_score, problem, completion_ids)
        return reward

    def _call(self, location: str, problem: Problem, completion: Any) -> float:
        # A copy of its own for each call: what a function does to the row ends with the call.
        row = copy.deepcopy({name: v for name, v in problem.data.items() if name != PLACE})
        where = f"{location} on row {problem.row} ({problem.data[PLACE]})"
        try:
            score = self._function(location)(problem.prompt, completion, row)
        except (Exception, SystemExit) as error:
            raise ScoreError(f"{where} failed: {named(error)}") from error
        try:
            return checked_number(score, "a score of")
        except ValueError as error:
            raise ScoreError(f"{where} returned no score. {error}") from None

    def _function(self, location: str) -> Callable[..., Any]:
        if location not in self._functions:
            found = load_attribute(location)
            if not callable(found):
                raise ValueError(f"Got the function {location!r}; it must be module:function.")
            self._functions[location] = found
        return self._functions[location]
