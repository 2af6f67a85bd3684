"""Reasoning Gym: over a hundred generators of problems, each with its own verifier."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

from distrl_envs.grading import gym_worker, worker_loop
from distrl_envs.grading.worker_pool import WorkerDied, WorkerPool, WorkerTimedOut
from distrl_envs.task import (
    GENERATED_ROWS,
    SPLITS,
    Draws,
    Grade,
    Problem,
    Task,
    split_of,
)

INSTRUCTION = "{problem}\n\nGive your final answer between <answer> and </answer>."
MOST_DRAWS = 500
"""Problems of other splits in a row after which a generator is taken to have none of this one."""
MAKING_TIMEOUT = 60.0
"""Seconds for making one problem."""
MADE_AT_ONCE = 2_000
"""Problems of the few generators that make them all when they are built."""
ALARM_SLACK = 2.0
MEMORY_BYTES = 4 << 30
JOBS_PER_WORKER = 2_000
_ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
RIGHT = 1.0 - 1e-9


class ReasoningGymTask(Task):
    """Problems of one generator of Reasoning Gym, graded by its verifier (Stojanovski et al. 2025).

    A hash of the question decides the split, so that splits are disjoint across seeds. The answer
    of a completion is what stands between its last answer tags; its score is the verifier's, which
    for many generators grades partly right answers between 0 and 1. Verifiers run in processes that
    are killed at a deadline.
    """

    has_solutions = True

    def __init__(
        self,
        generator: str,
        *,
        split: str = "train",
        seed: int = 0,
        config: Mapping[str, Any] | None = None,
        level: int | Mapping[str, int] | None = None,
        instruction: str = INSTRUCTION,
        timeout: float = 10.0,
        workers: int | None = None,
    ):
        """Builds the generator.

        Args:
            generator: Its name, `leg_counting` for instance.
            split: One of `SPLITS`.
            seed: Which problems are made.
            config: Arguments of the generator's configuration, except its seed and size.
            level: Of the generator's curriculum, for all attributes or by the attribute's name.
            instruction: Prompt around `{problem}`, which asks for the tags.
            timeout: Seconds for one verdict.
            workers: Worker processes; by default half the cores.

        Raises:
            ValueError: If the library is missing, or a name or an argument is unknown.
        """
        if split not in SPLITS:
            raise ValueError(f"Got split {split!r}; it must be one of {', '.join(SPLITS)}.")
        if fixed := sorted(set(config or {}) & {"seed", "size"}):
            raise ValueError(f"Got config with {fixed}: set the task's seed; its size has no end.")
        if "{problem}" not in instruction or "<answer>" not in instruction:
            raise ValueError(
                f"Got the instruction {instruction!r}; it must contain {{problem}} and ask for the "
                "answer between <answer> and </answer>, where it is looked for."
            )
        self.name = f"reasoning_gym:{generator}"  # as a recipe names it
        self.split, self.generator = split, generator
        self._instruction = instruction
        self._grader = (timeout, workers)
        self._asked = (
            generator,
            json.dumps({**(config or {}), "seed": int(seed), "size": MADE_AT_ONCE}),
            json.dumps(-1 if level is None else level),
        )
        gym_worker.build_dataset(generator, json.loads(self._asked[1]), json.loads(self._asked[2]))

    def __len__(self) -> int:
        """A fixed large number of rows; distant rows may hold the same problem."""
        return GENERATED_ROWS

    def problem(self, row: int) -> Problem:
        """The first problem of the split at indices that depend on the row alone.

        Raises:
            ValueError: If the generator makes no problem of this split.
        """
        self.check_row(row)
        draws = Draws(f"{self.name}|{self.split}|{row}".encode())
        for _ in range(MOST_DRAWS):
            index = draws.below(Draws.LARGEST) * Draws.LARGEST + draws.below(Draws.LARGEST)
            question, answer = self._ask("make", index, MAKING_TIMEOUT)
            key = " ".join(question.split())
            if split_of(key) == self.split:
                return Problem(int(row), question, {"index": index, "answer": answer}, key)
        raise ValueError(
            f"The generator {self.generator!r} has made no problem of the split {self.split!r} in "
            f"{MOST_DRAWS} draws: it has too few different ones. Give it a larger config or level."
        )

    def solution(self, problem: Problem) -> str:
        """The generator's own answer, as a completion.

        Raises:
            ValueError: If it names none.
        """
        if problem.data["answer"] is None:
            raise ValueError(f"The generator {self.generator!r} names no answer of its own.")
        return f"<answer>{problem.data['answer']}</answer>"

    def worked_solution(self, problem: Problem) -> str:
        """The generator's own answer alone."""
        return self.solution(problem)

    def instruction(self, problem: Problem) -> str:
        """The question within the task's instruction."""
        return self._instruction.replace("{problem}", problem.prompt)

    def describe_splits(self) -> str:
        """Problems are made up as they are needed."""
        return "Problems are made up; a hash of each decides its split: 70, 15 and 15 %"

    def grade(self, problem: Problem, completion: str, *, truncated: bool = False) -> Grade:
        """The verifier's score; `correct` where it is 1, `verifier_error` where it raises."""
        return self.grade_many([problem], [completion], [truncated])[0]

    def grade_many(
        self, problems: Sequence[Problem], completions: Sequence[str], truncated: Sequence[bool]
    ) -> list[Grade]:
        """Grades a batch, all workers at once."""
        jobs = list(zip(problems, completions, truncated, strict=True))
        with ThreadPoolExecutor(shared_pool(*self._grader).size) as threads:
            return list(threads.map(lambda job: self._grade(*job), jobs))

    def _grade(self, problem: Problem, completion: str, cut: bool) -> Grade:
        found = _ANSWER.findall(completion)
        answer = found[-1].strip() if found else ""
        if not answer:
            return Grade(0.0, "too_long" if cut else "no_answer")
        try:
            score = self._ask("score", problem.data["index"], self._grader[0], answer)
        except (WorkerTimedOut, WorkerDied) as failure:
            status = "timeout" if isinstance(failure, WorkerTimedOut) else "worker_died"
            return Grade(0.0, status, answer)
        if score is None:  # Most often malformed text, and never a silent "wrong".
            return Grade(0.0, "verifier_error", answer)
        return Grade(score, "correct" if score >= RIGHT else "wrong", answer)

    def _ask(self, what: str, index: int, timeout: float, *answer: str) -> Any:
        return shared_pool(*self._grader).run((what, *self._asked, index, *answer), timeout)


@lru_cache(maxsize=8)
def shared_pool(timeout: float, workers: int | None) -> WorkerPool:
    """One pool per process and settings."""
    size = workers or max(1, min(8, (os.cpu_count() or 1) // 2))
    arguments = ["gym_worker", str(MEMORY_BYTES), str(max(timeout, MAKING_TIMEOUT) + ALARM_SLACK)]
    return WorkerPool(Path(worker_loop.__file__), arguments, size, JOBS_PER_WORKER)
