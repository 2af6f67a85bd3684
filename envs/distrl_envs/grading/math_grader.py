"""Grading of mathematical answers, with workers that can be killed."""

from __future__ import annotations

import os
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

from distrl_envs.grading.extraction import extract_answer, without_unfinished_thinking
from distrl_envs.grading.normal_form import normalise, unwrapped
from distrl_envs.grading.plain_numbers import MOST_DIGITS, canonical, quick_verdict
from distrl_envs.grading.worker_pool import WorkerDied, WorkerPool, WorkerTimedOut
from distrl_envs.task import Grade

WORKER_SCRIPT = Path(__file__).with_name("worker_loop.py")
ALARM_SLACK = 2.0
"""Seconds after its deadline at which a worker without a parent ends itself."""
SHOWN_CHARACTERS = 500
"""Length at which the answer in a verdict is cut."""


class MathGrader:
    """Compares the answer of a completion with a gold answer.

    Equal texts and written-out numbers are compared in process, exactly. All else goes to a pool of
    worker processes, where it is read in full or not at all: what is not understood is not equal,
    and math-verify is only asked about sums, products, integrals and limits. A worker that has not
    replied `timeout` seconds after it was handed the job is killed and
    replaced, so `grade` never hangs, and it never raises on a completion.

    Use it from any thread, from Ray actors and, through `asyncio.to_thread`, from coroutines. It
    pickles as its settings. Workers start on first use; leaving the context ends them.
    """

    def __init__(
        self,
        *,
        timeout: float = 3.0,
        workers: int | None = None,
        answer_pattern: str | None = None,
        ignore_unfinished_thinking: bool = True,
        max_answer_chars: int = 2_000,
        memory_mb: int = 2_048,
        jobs_per_worker: int = 2_000,
        cache_size: int = 65_536,
    ):
        r"""Sets the grader up; nothing is started yet.

        Args:
            timeout: Seconds a worker has for one comparison.
            workers: Processes at most; by default half the cores, between 1 and 8.
            answer_pattern: Regular expression whose last match holds the answer, in its first
                group; by default the last balanced `\boxed{}`.
            ignore_unfinished_thinking: Whether what follows a `<think>` that is never closed is no
                answer.
            max_answer_chars: Answers longer than this that differ from the gold in more than
                spelling are graded `too_long`.
            memory_mb: Address space of a worker.
            jobs_per_worker: Comparisons after which a worker is replaced.
            cache_size: How many verdicts of workers are remembered, timeouts among them.

        Raises:
            ValueError: If a value is out of bounds or the pattern is no regular expression.
        """
        self._settings: dict[str, Any] = {
            "timeout": timeout, "workers": workers, "answer_pattern": answer_pattern,
            "ignore_unfinished_thinking": ignore_unfinished_thinking,
            "max_answer_chars": max_answer_chars, "memory_mb": memory_mb,
            "jobs_per_worker": jobs_per_worker, "cache_size": cache_size,
        }  # fmt: skip
        for name in ("timeout", "max_answer_chars", "memory_mb", "jobs_per_worker", "cache_size"):
            if self._settings[name] <= 0:
                raise ValueError(f"Got {name}={self._settings[name]}; it must be above 0.")
        if workers is not None and workers < 1:
            raise ValueError(f"Got workers={workers}; it must be at least 1.")
        self.pattern = compile_pattern(answer_pattern)
        self.timeout = timeout
        self.workers = workers or max(1, min(8, (os.cpu_count() or 1) // 2))
        self.max_answer_chars = max_answer_chars
        arguments = ["math_worker", str(memory_mb << 20), str(timeout + ALARM_SLACK)]
        self.pool = WorkerPool(WORKER_SCRIPT, arguments, self.workers, jobs_per_worker)
        self._cache: OrderedDict[tuple[str, str], bool | None] = OrderedDict()
        self._cache_size = cache_size
        self._cache_lock = threading.Lock()

    def __enter__(self) -> MathGrader:
        """Starts the workers."""
        self.pool.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Ends the workers."""
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles as its settings."""
        return _rebuild, (self._settings,)

    def close(self) -> None:
        """Ends the workers; a later comparison starts new ones."""
        self.pool.close()

    def grade(self, completion: str, gold: str) -> Grade:
        """Grades one completion.

        Args:
            completion: What the model wrote, any text.
            gold: The right answer, bare, between dollars or in a box.

        Returns:
            1.0 and `correct`, or 0.0 and `wrong`, `no_answer`, `too_long`, `timeout` or
            `worker_died`. `answer` is in a normal form; that of a correct one is the gold's.

        Raises:
            ValueError: If the gold is empty.
            RuntimeError: If no worker can be started.
        """
        return self.grade_many([completion], [gold])[0]

    def grade_many(self, completions: Sequence[str], golds: Sequence[str]) -> list[Grade]:
        """Grades completions against their golds, in order, all workers at once.

        Raises:
            ValueError: If the lengths differ or a gold is empty.
            RuntimeError: If no worker can be started.
        """
        grades: list[Grade | None] = []
        waiting: dict[tuple[str, str], list[int]] = {}
        for completion, gold in zip(completions, golds, strict=True):
            found = self.extract(completion)
            grade, pair = self._quick_grade(gold_form(gold), found)
            if grade is None:
                waiting.setdefault(pair, []).append(len(grades))
            grades.append(grade)
        for pair, grade in zip(waiting, self._compare_all(list(waiting)), strict=True):
            for index in waiting[pair]:
                grades[index] = grade
        return [grade for grade in grades if grade is not None]

    def extract(self, completion: str) -> str | None:
        """The answer that a completion states, or None where it states none."""
        if self._settings["ignore_unfinished_thinking"]:
            completion = without_unfinished_thinking(completion)
        return extract_answer(completion, self.pattern)

    def same_answer(self, one: str, other: str) -> bool:
        """Whether two answers in normal form are the same; what cannot be decided is not.

        Raises:
            RuntimeError: If no worker can be started.
        """
        grade, pair = self._quick_grade(one, other)
        return (grade or self._compare(pair)).score == 1.0

    def _quick_grade(self, gold: str, found: str | None) -> tuple[Grade | None, tuple[str, str]]:
        """The verdict, where it needs no worker, and the two normalised sides.

        What it does in the caller's time is linear in the length of what was found.
        """
        found = unwrapped(unwrapped(" ".join((found or "").split())), "()", kept=1)
        if len(found) > max(self.max_answer_chars, MOST_DIGITS):
            if found == gold:
                return Grade(1.0, "correct", gold[:SHOWN_CHARACTERS]), (gold, found)
            return Grade(0.0, "too_long", found[:SHOWN_CHARACTERS]), (gold, found)
        answer = normalise(found)
        pair = (gold, answer)
        if not answer:
            return Grade(0.0, "no_answer", None), pair
        verdict = quick_verdict(gold, answer)
        if verdict is None and len(answer) > self.max_answer_chars:
            return Grade(0.0, "too_long", answer[:SHOWN_CHARACTERS]), pair
        if verdict is not None:
            return _decided(pair, verdict), pair
        return self._remembered(pair), pair

    def _compare_all(self, pairs: Sequence[tuple[str, str]]) -> list[Grade]:
        if len(pairs) < 2 or self.workers < 2:
            return [self._compare(pair) for pair in pairs]
        with ThreadPoolExecutor(min(self.workers, len(pairs))) as threads:
            return list(threads.map(self._compare, pairs))

    def _compare(self, pair: tuple[str, str]) -> Grade:
        try:
            verdict = bool(self.pool.run(pair, self.timeout))
        except WorkerTimedOut:
            verdict = None
        except WorkerDied:
            return Grade(0.0, "worker_died", pair[1][:SHOWN_CHARACTERS])
        with self._cache_lock:
            self._cache[pair] = verdict
            if len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)
        return _decided(pair, verdict)

    def _remembered(self, pair: tuple[str, str]) -> Grade | None:
        with self._cache_lock:
            if pair not in self._cache:
                return None
            self._cache.move_to_end(pair)
            return _decided(pair, self._cache[pair])


def compile_pattern(pattern: str | None) -> re.Pattern[str] | None:
    """A regular expression in which the dot may match line ends too; see `extract_answer`.

    Raises:
        ValueError: If it is not valid.
    """
    if pattern is None:
        return None
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"Got the pattern {pattern!r}, no regular expression: {error}.") from error


@lru_cache(maxsize=65_536)
def gold_form(gold: str) -> str:
    """The normal form of a gold answer.

    Raises:
        ValueError: If it is empty.
    """
    boxed = extract_answer(gold) if "\\boxed" in gold else None
    form = normalise(boxed or gold)
    if not form:
        raise ValueError(f"Got the gold {gold!r}, which holds no answer: correct the data.")
    return form


def _decided(pair: tuple[str, str], verdict: bool | None) -> Grade:
    if verdict:
        return Grade(1.0, "correct", canonical(pair[0])[:SHOWN_CHARACTERS])
    status = "timeout" if verdict is None else "wrong"
    return Grade(0.0, status, canonical(pair[1])[:SHOWN_CHARACTERS])


def _rebuild(settings: dict[str, Any]) -> MathGrader:
    return MathGrader(**settings)
