"""Programs: a Python function, or a script, that must pass its tests."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from distrl_envs.data import Column
from distrl_envs.grading.code_grader import CodeGrader
from distrl_envs.grading.code_tests import check_tests, in_child, normal_tests
from distrl_envs.task import Grade, Problem
from distrl_envs.tasks.data_task import PROBLEM, DataTask

INSTRUCTION = (
    "{problem}\n\nWrite your final program in Python, complete with its imports, in one block that "
    "starts with ```python and ends with ```."
)


class CodeTask(DataTask):
    """Problems that ask for a Python program.

    Each row has a `problem`, `tests` in a form of `CodeGrader.grade` or one of those in which they
    are published (see `normal_tests`), for calls and `check(candidate)` the `entry_point`, and if
    need be `test_imports` and `test_setup_code`, which go before every statement. The rows of
    `data` are marked: `in_child` says why a test has to be judged where the program is, and is
    None where all are judged out of its reach.
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
        ignore_unfinished_thinking: bool = True,
        only_outside: bool = False,
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
            ignore_unfinished_thinking: Whether what stands in a `<think>` that is never closed is
                no program.
            only_outside: Whether rows are faults of which a test has to be judged where the
                program is.
            **common: What every task over data takes; see `DataTask`.

        Raises:
            ValueError: If the data has faults or an argument is out of bounds.
        """
        columns = {
            "problem": PROBLEM,
            "tests": Column((str, list, dict)),
            "entry_point": Column(required=False),
            "test_imports": Column((list,), required=False),
            "test_setup_code": Column(required=False),
        }
        super().__init__(
            data,
            columns,
            instruction=instruction,
            check=lambda row: _prepare(row, only_outside),
            **common,
        )
        self._grader = (timeout, workers, memory_mb, partial_credit, ignore_unfinished_thinking)

    @property
    def grader(self) -> CodeGrader:
        """The grader that this process shares among tasks with the same settings."""
        return shared_grader(*self._grader)

    def grade(self, problem: Problem, completion: str, *, truncated: bool = False) -> Grade:
        """1.0 where all tests pass; `too_long` where a cut-off completion has no whole program."""
        return self.grade_many([problem], [completion], [truncated])[0]

    def grade_many(
        self, problems: Sequence[Problem], completions: Sequence[str], truncated: Sequence[bool]
    ) -> list[Grade]:
        """Grades a batch, several programs at a time."""
        tests = [problem.data["tests"] for problem in problems]
        entries = [problem.data["entry_point"] for problem in problems]
        grades = self.grader.grade_many(completions, tests, entries)
        return [
            replace(grade, status="too_long") if cut and not _is_whole(grade) else grade
            for grade, cut in zip(grades, truncated, strict=True)
        ]


@lru_cache(maxsize=16)
def shared_grader(
    timeout: float,
    workers: int | None,
    memory_mb: int,
    partial_credit: bool,
    ignore_unfinished_thinking: bool,
) -> CodeGrader:
    """One grader per process and settings, which bounds the programs run at a time."""
    return CodeGrader(
        timeout=timeout,
        workers=workers,
        memory_mb=memory_mb,
        partial_credit=partial_credit,
        ignore_unfinished_thinking=ignore_unfinished_thinking,
    )


def _is_whole(grade: Grade) -> bool:
    """Whether there is a program, and one that Python reads to its end."""
    if grade.status != "wrong":
        return grade.status != "no_answer"
    try:
        ast.parse(grade.answer or "")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _prepare(row: dict[str, Any], only_outside: bool) -> None:
    """Brings the tests of a row into the grader's form, and refuses those that cannot serve."""
    tests, named = normal_tests(row["tests"])
    before = "\n".join([*(row["test_imports"] or ()), row["test_setup_code"] or ""]).strip()
    if before:
        tests = [f"{before}\n{test}" if isinstance(test, str) else test for test in tests]
    row["tests"] = tests
    row["entry_point"] = row["entry_point"] or named
    check_tests(tests, row["entry_point"])
    row["in_child"] = in_child(tests, row["entry_point"])
    if only_outside and row["in_child"] is not None:
        raise ValueError(
            f"has a test that must be judged where the program is, for {row['in_child']}: write "
            "it as calls and comparisons of plain values, or set only_outside = false."
        )
