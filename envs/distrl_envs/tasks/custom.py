"""A task of one's own: any function that scores a completion."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from distrl_envs.data import Column
from distrl_envs.task import Grade, Problem
from distrl_envs.tasks.data_task import PLACE, DataTask


class ScoreError(RuntimeError):
    """A user's function failed on a row; that is never a score of 0."""


class CustomTask(DataTask):
    """Problems graded by `score(prompt, completion, row) -> float`.

    `prompt` is the row's problem and `row` all its fields. A score of `correct_from` or more counts
    as correct. What the function raises, and what it returns that is no finite number, is raised
    as a `ScoreError` with the file and line of the row.
    """

    name = "custom"

    def __init__(
        self,
        data: str | Path,
        score: str,
        *,
        step_score: str | None = None,
        correct_from: float = 1.0,
        instruction: str = "{problem}",
        **common: Any,
    ):
        """Loads problems and functions.

        Args:
            data: A file or `hf:name/split`; see `distrl_envs.data.load_data`.
            score: `module:function`, called as `function(prompt, completion, row)`.
            step_score: `module:function` for a reward at each step, called as
                `function(prompt, completion_ids, row)` with the tokens so far.
            correct_from: Lowest score that counts as correct.
            instruction: Prompt around `{problem}`.
            **common: What every task over data takes; see `DataTask`.

        Raises:
            ValueError: If the data has faults or a function cannot be found.
        """
        super().__init__(data, {"problem": Column()}, instruction=instruction, **common)
        self.correct_from = correct_from
        self._score, self._step_score = score, step_score
        self._functions: dict[str, Callable[..., Any]] = {}
        for location in filter(None, (score, step_score)):
            self._function(location)
        self.has_step_reward = self.has_step_reward or step_score is not None

    def __getstate__(self) -> dict[str, Any]:
        """Functions travel by name."""
        return {**self.__dict__, "_functions": {}}

    def grade(self, problem: Problem, completion: str, *, truncated: bool = False) -> Grade:
        """The function's score.

        Raises:
            ScoreError: If the function raises or returns no finite number.
        """
        score = self._call(self._score, problem, completion)
        if score >= self.correct_from:
            return Grade(score, "correct")
        return Grade(score, "too_long" if truncated else "wrong")

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
        row = {name: value for name, value in problem.data.items() if name != PLACE}
        where = f"{location} on row {problem.row} ({problem.data[PLACE]})"
        try:
            score = float(self._function(location)(problem.prompt, completion, row))
        except Exception as error:
            raise ScoreError(f"{where} failed: {type(error).__name__}: {error}") from error
        if not math.isfinite(score):
            raise ScoreError(f"{where} returned {score}; a score must be a finite number.")
        return score

    def _function(self, location: str) -> Callable[..., Any]:
        if location not in self._functions:
            module, _, attribute = location.partition(":")
            try:
                found = getattr(import_module(module), attribute) if attribute else None
            except (ImportError, AttributeError) as error:
                raise ValueError(
                    f"The function {location!r} could not be imported: {error}. Is its module "
                    "installed or on PYTHONPATH?"
                ) from error
            if not callable(found):
                raise ValueError(f"Got the function {location!r}; it must be module:function.")
            self._functions[location] = found
        return self._functions[location]
