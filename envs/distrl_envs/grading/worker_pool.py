"""Worker processes that can be killed: one pipe each, a deadline per job, respawned on expiry."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STARTUP_TIMEOUT = 120.0
"""Seconds in which a worker must have imported what it needs, on a very busy machine too."""
MOST_REPLY_BYTES = 1 << 16


class WorkerDied(Exception):
    """The worker ended without an answer."""


class WorkerTimedOut(Exception):
    """The worker did not answer before the deadline."""


class Worker:
    """One process, started at once and read from when it is first needed.

    A fresh interpreter, never a fork: the parent may be a Ray actor with threads and locks.
    """

    def __init__(self, command: Sequence[str]):
        """Starts the process without waiting for it."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        environment["PYTHONHASHSEED"] = "0"  # Sets have one order in all workers.
        self.jobs = 0
        self._ready = False
        self._buffer = b""
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            # An interrupt at the terminal goes to the parent alone, which then closes its workers.
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def ready(self, timeout: float) -> bool:
        """Whether the worker has reported within so many seconds that it is ready.

        Raises:
            RuntimeError: If it could not start.
        """
        if self._ready:
            return True
        try:
            message = self._read(time.monotonic() + timeout)
        except WorkerTimedOut:
            return False
        except WorkerDied as error:
            raise RuntimeError("A grading worker ended while it was starting.") from error
        if message != "ready":
            raise RuntimeError(f"A grading worker could not start: {message['error']}")
        self._ready = True
        return True

    def ask(self, payload: Sequence[Any], timeout: float) -> Any:
        """Sends a job and waits for its reply.

        Raises:
            WorkerDied: If the process ended.
            WorkerTimedOut: If it did not reply within `timeout` seconds from now.
        """
        self.jobs += 1
        deadline = time.monotonic() + timeout
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps([self.jobs, *payload]).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise WorkerDied("its pipe is closed") from error
        job, reply = self._read(deadline)
        assert job == self.jobs
        return reply

    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def kill(self) -> None:
        """Ends the process and collects it."""
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]
        self._process.wait()

    def _read(self, deadline: float) -> Any:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        poller = select.poll()
        poller.register(descriptor, select.POLLIN | select.POLLHUP)
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if not poller.poll(max(0.0, left) * 1_000):
                raise WorkerTimedOut
            data = os.read(descriptor, MOST_REPLY_BYTES)
            if not data or len(self._buffer) > MOST_REPLY_BYTES:
                raise WorkerDied("it closed its pipe")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)


class WorkerPool:
    """A bounded number of workers shared by any number of threads.

    Workers are started when first needed and replaced after `jobs_per_worker` jobs, after a job
    that outlives its deadline, and when they die.
    """

    def __init__(self, script: Path, arguments: Sequence[str], size: int, jobs_per_worker: int):
        """Sets the pool up without starting anything.

        Args:
            script: Python file that each worker runs.
            arguments: Its command line.
            size: How many workers may run at once.
            jobs_per_worker: Jobs after which a worker is replaced.
        """
        self._command = [sys.executable, str(script), *arguments]
        self.size = size
        self._jobs_per_worker = jobs_per_worker
        self._reset()

    def run(self, payload: Sequence[Any], timeout: float) -> Any:
        """Has a worker do a job; waits for a free one first, which is not counted as its time.

        Args:
            payload: Anything JSON can hold.
            timeout: Seconds from the moment the job is handed to the worker.

        Raises:
            WorkerDied: If the worker ended while it had the job.
            WorkerTimedOut: If it did not reply in time; it is killed.
            RuntimeError: If no worker can be started.
        """
        if os.getpid() != self._owner:
            # A forked copy: the workers answer to the process that started them.
            self._reset()
        worker = self._take()
        healthy = False
        try:
            reply = worker.ask(payload, timeout)
            healthy = True
            return reply
        finally:
            self._give_back(worker, healthy)

    def start(self) -> None:
        """Starts all workers now, without waiting for them."""
        with self._condition:
            while len(self.workers) < self.size:
                self._idle.append(self._new())

    def close(self) -> None:
        """Ends all workers; the next job starts new ones."""
        with self._condition:
            _kill_all(self.workers)
            self._idle.clear()
            self._condition.notify_all()

    def pids(self) -> list[int]:
        """Process ids of the workers."""
        with self._condition:
            return [worker.pid for worker in self.workers]

    def _reset(self) -> None:
        self._owner = os.getpid()
        self._condition = threading.Condition()
        self.workers: set[Worker] = set()
        self._idle: list[Worker] = []
        self._finalizer = weakref.finalize(self, _kill_all, self.workers)

    def _new(self) -> Worker:
        worker = Worker(self._command)
        self.workers.add(worker)
        return worker

    def _take(self) -> Worker:
        while True:
            worker = self._reserve()
            try:
                started = worker.ready(STARTUP_TIMEOUT)
            except BaseException:
                self._drop(worker)
                raise
            if started and worker.alive():
                return worker
            # It died while nobody used it: no job is lost.
            self._drop(worker)

    def _reserve(self) -> Worker:
        with self._condition:
            while not self._idle and len(self.workers) >= self.size:
                self._condition.wait()
            if self._idle:
                # Those that are still starting come last.
                first = next((w for w in reversed(self._idle) if _is_ready(w)), self._idle[0])
                self._idle.remove(first)
                return first
            return self._new()

    def _give_back(self, worker: Worker, healthy: bool) -> None:
        with self._condition:
            if worker not in self.workers:
                return  # The pool was closed meanwhile.
            if healthy and worker.jobs < self._jobs_per_worker:
                self._idle.append(worker)
            else:
                self.workers.discard(worker)
                worker.kill()
                self._idle.append(self._new())
            self._condition.notify()

    def _drop(self, worker: Worker) -> None:
        with self._condition:
            if worker in self.workers:
                self.workers.discard(worker)
                worker.kill()
            self._condition.notify()


def _is_ready(worker: Worker) -> bool:
    try:
        return worker.ready(0.0)
    except RuntimeError:
        return False


def _kill_all(workers: set[Worker]) -> None:
    while workers:
        workers.pop().kill()
