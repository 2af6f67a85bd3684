"""Grading of programs by their tests, held and compared where the program cannot reach."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from distrl_envs.grading.code_blocks import extract_program
from distrl_envs.grading.code_tests import Test, check_tests, wanted_names
from distrl_envs.grading.code_wire import Channel, Closed, Malformed
from distrl_envs.grading.sandboxes import STARTUP_GRACE, Sandboxes, how_it_ended, let_go
from distrl_envs.task import Grade


@dataclass(frozen=True)
class Run:
    """How a program ended.

    Attributes:
        passed: Number of tests passed.
        end: "finished", "exited" (by itself, before its tests were over), "timeout", "killed" (by
            a signal) or "lost" (the sandbox itself ended).
        isolated: What the system allowed to be kept from the program: "files", "network" and
            "processes" of others, or "landlock", which keeps files without such rights.
        unchecked: Number of tests that ended without having checked anything.
    """

    passed: int
    end: str
    isolated: tuple[str, ...] = ()
    unchecked: int = 0


class CodeGrader:
    """Runs the program of a completion against unit tests.

    The program runs in a sandbox and only answers with values and output. The tests, and what they
    expect, are in another sandbox, which asks and compares: nothing that the program does to its
    own process changes more than its answers. Both have limits on time, memory, files and
    processes and, where the system allows, processes, network and files of their own; see
    docs/tasks.md for what holds where it does not. All that a program started or wrote is gone
    when `grade` returns. Works from any thread, and pickles as its settings. Leaving the context
    ends the server of sandboxes, which is started when first needed.
    """

    def __init__(
        self,
        *,
        timeout: float = 6.0,
        workers: int | None = None,
        memory_mb: int = 512,
        file_mb: int = 16,
        disk_mb: int = 64,
        processes: int = 8,
        max_program_chars: int = 100_000,
        partial_credit: bool = False,
        ignore_unfinished_thinking: bool = True,
        namespaces: bool = True,
    ):
        """Sets the limits; nothing is started.

        Args:
            timeout: Seconds for a program and all its tests.
            workers: Programs at a time in `grade_many`; by default half the cores.
            memory_mb: Address space of each process, beyond what the interpreter takes.
            file_mb: Largest file it may write.
            disk_mb: All that it may write, where it has files of its own.
            processes: How many processes and threads it may have.
            max_program_chars: Longer programs are graded `too_long` without being run.
            partial_credit: Whether the score is the share of tests passed instead of all or none.
                A test then has half of the time that is left, the last one all of it.
            ignore_unfinished_thinking: Whether what stands in a `<think>` that is never closed is
                no program.
            namespaces: Whether to use the system's namespaces where it has them.

        Raises:
            ValueError: If a limit is not positive.
        """
        self._settings: dict[str, Any] = {
            "timeout": timeout, "workers": workers, "memory_mb": memory_mb, "file_mb": file_mb,
            "disk_mb": disk_mb, "processes": processes, "max_program_chars": max_program_chars,
            "partial_credit": partial_credit,
            "ignore_unfinished_thinking": ignore_unfinished_thinking, "namespaces": namespaces,
        }  # fmt: skip
        limits = ("timeout", "memory_mb", "file_mb", "disk_mb", "processes", "max_program_chars")
        for name in limits:
            if self._settings[name] <= 0:
                raise ValueError(f"Got {name}={self._settings[name]}; it must be above 0.")
        if workers is not None and workers < 1:
            raise ValueError(f"Got workers={workers}; it must be at least 1.")
        self.timeout = timeout
        self.workers = workers or max(1, (os.cpu_count() or 1) // 2)
        self.max_program_chars = max_program_chars
        self.partial_credit = partial_credit
        self.ignore_unfinished_thinking = ignore_unfinished_thinking
        self._sandboxes = Sandboxes(
            {
                "timeout": timeout,
                "memory_bytes": memory_mb << 20,
                "file_bytes": file_mb << 20,
                "disk_bytes": disk_mb << 20,
                "processes": processes,
                "namespaces": namespaces,
            }
        )
        self._slots = threading.BoundedSemaphore(self.workers)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles as its settings."""
        return _rebuild, (self._settings,)

    def __enter__(self) -> CodeGrader:
        """The grader itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the server of sandboxes."""
        self.close()

    def close(self) -> None:
        """Ends the server of sandboxes; the next program starts another."""
        self._sandboxes.close()

    def grade(
        self, completion: str, tests: Sequence[Test], entry_point: str | None = None
    ) -> Grade:
        """Grades one completion.

        Args:
            completion: Any text; `extract_program` finds the program in it.
            tests: Statements such as `assert f(1) == 2`, calls `{"input": [1], "output": 2}` of
                the entry point (see `same` for what is equal), or runs of the program as a script
                `{"stdin": "1", "stdout": "2"}`, whose output is compared by tokens, or with
                `"compare": "exact"` all but the newlines at its end.
            entry_point: Function that calls go to, and that `check(candidate)` checks.

        Returns:
            `correct` where all tests pass, `wrong` where one fails or the program exits by itself,
            `unchecked` where one ends without having checked anything, `no_answer` without a
            program, `too_long`, `timeout`, or `worker_died` where the program was killed by a
            signal. `answer` is the program.

        Raises:
            ValueError: If there are no tests, one cannot be run or checks nothing, or there are
                calls without an entry point.
        """
        check_tests(tests, entry_point)
        program = extract_program(
            completion,
            entry_point,
            wanted_names(tests, entry_point),
            ignore_unfinished_thinking=self.ignore_unfinished_thinking,
        )
        if program is None:
            return Grade(0.0, "no_answer")
        if len(program) > self.max_program_chars:
            return Grade(0.0, "too_long")
        run = self._run(program, tests, entry_point)
        if run.passed == len(tests):
            return Grade(1.0, "correct", program)
        share = run.passed / len(tests) if self.partial_credit else 0.0
        if run.end in ("timeout", "killed", "lost"):
            return Grade(share, "timeout" if run.end == "timeout" else "worker_died", program)
        return Grade(share, "unchecked" if run.unchecked else "wrong", program)

    def grade_many(
        self,
        completions: Sequence[str],
        tests: Sequence[Sequence[Test]],
        entry_points: Sequence[str | None],
    ) -> list[Grade]:
        """Grades completions in order, `workers` at a time.

        Raises:
            ValueError: As `grade`, or if the lengths differ.
        """
        jobs = list(zip(completions, tests, entry_points, strict=True))
        with ThreadPoolExecutor(self.workers) as threads:
            return list(threads.map(lambda job: self.grade(*job), jobs))

    def run(self, program: str, tests: Sequence[Test], entry_point: str | None = None) -> Run:
        """Runs a program and its tests: without partial credit, up to the first that fails.

        Raises:
            ValueError: As `grade`.
        """
        check_tests(tests, entry_point)
        return self._run(program, tests, entry_point)

    def _run(self, program: str, tests: Sequence[Test], entry_point: str | None) -> Run:
        job = {
            "program": program,
            "tests": [test if isinstance(test, str) else dict(test) for test in tests],
            "entry_point": entry_point,
            "stop": not self.partial_credit,
        }
        with self._slots:
            examination = _Examination(self._sandboxes, job, self.timeout)
            return examination.run()


class _Examination:
    """One program and its tests, in as many sandboxes as it takes."""

    def __init__(self, sandboxes: Sandboxes, job: dict[str, Any], timeout: float):
        self._sandboxes = sandboxes
        self._job = job
        self._left = timeout
        self._checks: list[tuple[bool, int]] = []
        self._loaded = False

    def run(self) -> Run:
        end, worst = "", "finished"
        while end not in ("finished", "no program"):
            self._loaded = False
            end = self._session()
            if end != "finished":
                worst = end if worst == "finished" else worst
            if self._job["stop"] or not self._loaded or self._left <= 0:
                break
            if end not in ("finished", "no program"):
                # It did not survive this test; the others get another sandbox.
                self._checks.append((False, 1))
                if len(self._checks) == len(self._job["tests"]):
                    break
        passed = sum(passed for passed, _ in self._checks)
        unchecked = sum(not checks for _, checks in self._checks)
        end = "exited" if worst == "no program" else worst
        return Run(passed, end, self._sandboxes.isolated, unchecked)

    def _session(self) -> str:
        """Runs tests in a sandbox until one ends it, or all are done: how it ended."""
        ours, examiner = socket.socketpair()
        asking, asked = socket.socketpair()
        leashes = self._sandboxes.open({"program": [asked], "examiner": [asking, examiner]})
        for theirs in (examiner, asking, asked):
            theirs.close()
        channel = Channel(ours)
        try:
            channel.receive(time.monotonic() + STARTUP_GRACE)
            end = self._follow(channel)
            return how_it_ended(leashes[0]) if end == "gone" else end
        except TimeoutError:
            return "timeout"
        except (Closed, Malformed):
            return "lost"
        finally:
            channel.close()
            let_go(leashes)

    def _follow(self, channel: Channel) -> str:
        """Takes the examiner's reports down, each before its deadline."""
        began = time.monotonic()
        try:
            channel.send({**self._job, "first": len(self._checks)}, began + self._left)
            deadline = began + self._left
            while True:
                report = channel.receive(deadline)
                if "end" in report:
                    return report["end"]
                if "loaded" in report:
                    self._loaded = True
                else:
                    self._checks.append((report["passed"], report["checks"]))
                deadline = self._deadline(began + self._left)
        finally:
            self._left -= time.monotonic() - began

    def _deadline(self, last: float) -> float:
        """Of the next test: one that never ends must leave time to those after it."""
        if self._job["stop"] or len(self._checks) + 1 >= len(self._job["tests"]):
            return last
        return (time.monotonic() + last) / 2.0


def _rebuild(settings: dict[str, Any]) -> CodeGrader:
    return CodeGrader(**settings)
