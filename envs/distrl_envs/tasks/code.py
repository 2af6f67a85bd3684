"""Programs: a Python function that must pass unit tests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from distrl_envs.data import Column
from distrl_envs.grading.code_grader import CodeGrader, check_tests
from distrl_envs.task import Grade, Problem
from distrl_envs.tasks.data_task import PROBLEM, DataTask

INSTRUCTION = (
    "{problem}\n\nWrite your final program in Python, complete with its imports, in one block that "
    "starts with ```python and ends with ```."
)


class CodeTask(DataTask):
    """Problems that ask for a Python function.

    Each row has a `problem`, `tests` (a list of statements such as `assert f(1) == 2`, or of calls
    `{"input": [1], "output": 2}`; a string is read as JSON, else as one statement) and, for calls,
    the `entry_point`. The program of a completion is its last fenced block; see `CodeGrader`.
    """

    name = "code"

    def __init__(
        self,
        data: str | Path | Mapping[str, str],
        *,
        instruction: str = INSTRUCTION,
        timeout: float = 6.0,
        workers: int | None = None,
        memory_mb: int = 512,
        partial_credit: bool = False,
        **common: Any,
    ):
        """Loads the problems.

        Args:
            data: A file or `hf:name/split`, or one for each split; see `DataTask`.
            instruction: Prompt around `{problem}`.
            timeout: Seconds for a program and all its tests.
            workers: Programs run at a time; by default half the cores.
            memory_mb: Address space of a program.
            partial_credit: Whether the score is the share of tests passed.
            **common: What every task over data takes; see `DataTask`.

        Raises:
            ValueError: If the data has faults or an argument is out of bounds.
        """
        columns = {
            "problem": PROBLEM,
            "tests": Column((str, list), convert=_tests),
            "entry_point": Column(required=False),
        }
        super().__init__(
            data,
            columns,
            instruction=instruction,
            check=lambda row: check_tests(row["tests"], row["entry_point"]),
            **common,
        )
        self._grader = (timeout, workers, memory_mb, partial_credit)

    @property
    def grader(self) -> CodeGrader:
        """The grader that this process shares among tasks with the same settings."""
        return shared_grader(*self._grader)

    def grade(self, problem: Problem, completion: str, *, truncated: bool = False) -> Grade:
        """1.0 where all tests pass; `too_long` where a cut-off completion has no program."""
        return self.grade_many([problem], [completion], [truncated])[0]

    def grade_many(
        self, problems: Sequence[Problem], completions: Sequence[str], truncated: Sequence[bool]
    ) -> list[Grade]:
        """Grades a batch, several programs at a time."""
        tests = [problem.data["tests"] for problem in problems]
        entries = [problem.data["entry_point"] for problem in problems]
        grades = self.grader.grade_many(completions, tests, entries)
        return [
            replace(grade, status="too_long") if cut and grade.status == "no_answer" else grade
            for grade, cut in zip(grades, truncated, strict=True)
        ]


@lru_cache(maxsize=16)
def shared_grader(
    timeout: float, workers: int | None, memory_mb: int, partial_credit: bool
) -> CodeGrader:
    """One grader per process and settings, which bounds the programs run at a time."""
    return CodeGrader(
        timeout=timeout, workers=workers, memory_mb=memory_mb, partial_credit=partial_credit
    )


def _tests(value: Any) -> list[Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return [value]
    if not isinstance(value, list) or not all(isinstance(test, str | dict) for test in value):
        raise ValueError(f"holds {value!r:.60}; it must be a list of statements or calls")
    return value
