"""The server of sandboxes as its users see it, and Python for a model to use, block by block."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from distrl_envs.grading.code_wire import Channel, Closed, Malformed

SANDBOX_SCRIPT = Path(__file__).with_name("code_sandbox.py")
STARTUP_TIMEOUT = 120.0
"""Seconds in which the server of sandboxes must have started, on a very busy machine too."""
STARTUP_GRACE = 30.0
"""Seconds beyond the deadline that starting and ending a sandbox may take on a busy machine."""


class Sandboxes:
    """The server of sandboxes, started when first needed and again if it died."""

    def __init__(self, settings: dict[str, Any]):
        """Sets the limits of each sandbox; nothing is started.

        Args:
            settings: `timeout` (seconds of processor time), `memory_bytes`, `file_bytes`,
                `disk_bytes`, `processes` and `namespaces`, as `CodeGrader` explains them.
        """
        self.isolated: tuple[str, ...] = ()
        self._settings = settings
        self._lock = threading.Lock()
        self._owner = 0
        self._control: socket.socket | None = None

    def open(self, sandboxes: dict[str, list[socket.socket]]) -> list[socket.socket]:
        """Opens sandboxes by their roles, each with its sockets: the leashes, to be let go."""
        leashes = []
        for role, talks in sandboxes.items():
            leash, guard = socket.socketpair()
            descriptors = [guard.fileno(), *(talk.fileno() for talk in talks)]
            try:
                socket.send_fds(self._server(), [role.encode()], descriptors)
            except OSError:
                self.close()
                socket.send_fds(self._server(), [role.encode()], descriptors)
            guard.close()
            leashes.append(leash)
        return leashes

    def close(self) -> None:
        """Ends the server; the next sandbox starts another."""
        with self._lock:
            if self._control is not None and self._owner == os.getpid():
                self._finalizer()
            self._control = None

    def _server(self) -> socket.socket:
        with self._lock:
            if self._control is None or self._owner != os.getpid():
                # A forked copy does not share the server of the process that it comes from.
                self._start()
            assert self._control is not None
            return self._control

    def _start(self) -> None:
        control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        process = subprocess.Popen(
            # Neither the working folder nor the user's adds modules; the environment is this one.
            [sys.executable, "-P", "-s", str(SANDBOX_SCRIPT), json.dumps(self._settings)],
            stdin=theirs.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={
                "PATH": os.defpath,
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
                "LANG": "C.UTF-8",
                "PYTHONHASHSEED": "0",  # Sets have one order in all sandboxes.
            },
            start_new_session=True,
        )
        theirs.close()
        self._finalizer = weakref.finalize(self, _end, control, process)
        control.settimeout(STARTUP_TIMEOUT)
        try:
            isolated = control.recv(256)
        except OSError as error:
            self._finalizer()
            raise RuntimeError("The server of sandboxes did not start in time.") from error
        if not isolated:
            self._finalizer()
            raise RuntimeError("The server of sandboxes ended while it was starting.")
        control.settimeout(None)
        self.isolated = tuple(json.loads(isolated))
        self._control, self._owner = control, os.getpid()


def _end(control: socket.socket, process: subprocess.Popen[bytes]) -> None:
    control.close()
    process.kill()
    process.wait()


def how_it_ended(leash: socket.socket) -> str:
    """Of a sandbox whose program is gone: "timeout", "killed" (by a signal) or "exited"."""
    with contextlib.suppress(OSError):
        leash.send(b"?")
        leash.shutdown(socket.SHUT_WR)
        leash.settimeout(STARTUP_GRACE)
        status = int(leash.recv(32) or b"0")
        if os.WIFSIGNALED(status):
            return "timeout" if os.WTERMSIG(status) == signal.SIGXCPU else "killed"
    return "exited"


def let_go(leashes: list[socket.socket]) -> None:
    """Has sandboxes ended, and waits until nothing of them is left."""
    for leash in leashes:
        with contextlib.suppress(OSError):
            leash.shutdown(socket.SHUT_WR)
    for leash in leashes:
        with contextlib.suppress(OSError):
            leash.settimeout(STARTUP_GRACE)
            while leash.recv(32):
                pass
        leash.close()


FILE_BYTES, DISK_BYTES = 16 << 20, 64 << 20
PROCESSES = 8
CPU_SHARE = 64
"""Processor time of a sandbox in deadlines; the clock is what ends a block."""
REPLAY_SHARE = 2.0
"""Deadlines that a block may take when it is run again, on a busier machine."""


class Ran(NamedTuple):
    """What became of a block.

    Attributes:
        text: What it printed; empty where it came to no end.
        status: "ok", "error" (it raised), "cut" (it printed too much), "timeout" or "died".
        number: Which block of those given it was that came to no end, from 1.
    """

    text: str
    status: str
    number: int


class PythonSessions:
    """Runs sequences of blocks, each in a sandbox of its own, `workers` at a time.

    Nothing of a session outlives `run`; what blocks printed is what Python writes to its standard
    output and error streams. The sandbox is that of `CodeGrader`. Works from any thread.
    """

    def __init__(self, timeout: float, memory_mb: int, workers: int | None):
        """Sets the limits; nothing is started.

        Args:
            timeout: Seconds for a block.
            memory_mb: Address space beyond what the interpreter takes.
            workers: Sessions at a time; by default half the cores.
        """
        self._timeout = timeout
        self._slots = threading.BoundedSemaphore(workers or max(1, (os.cpu_count() or 1) // 2))
        self._sandboxes = Sandboxes(
            {
                "timeout": timeout * CPU_SHARE, "memory_bytes": memory_mb << 20,
                "file_bytes": FILE_BYTES, "disk_bytes": DISK_BYTES, "processes": PROCESSES,
                "namespaces": True,
            }
        )  # fmt: skip

    def run(self, blocks: Sequence[str], most: int) -> Ran:
        """Runs blocks in order in one namespace: what became of the last, or the first without end.

        Args:
            blocks: Code; the last is the new one, those before it have run before.
            most: Characters that are kept of what a block prints.
        """
        with self._slots:
            ours, theirs = socket.socketpair()
            leashes = self._sandboxes.open({"session": [theirs]})
            theirs.close()
            channel = Channel(ours)
            try:
                return self._converse(channel, leashes[0], blocks, most)
            finally:
                channel.close()
                let_go(leashes)

    def close(self) -> None:
        """Ends the server of sandboxes; the next block starts another."""
        self._sandboxes.close()

    def _converse(
        self, channel: Channel, leash: socket.socket, blocks: Sequence[str], most: int
    ) -> Ran:
        number, reply = 0, {}
        try:
            channel.receive(time.monotonic() + STARTUP_GRACE)
            for number, block in enumerate(blocks, start=1):
                share = 1.0 if number == len(blocks) else REPLAY_SHARE
                deadline = time.monotonic() + self._timeout * share
                channel.send({"code": block, "most": most}, deadline)
                reply = _checked(channel.receive(deadline), most)
        except TimeoutError:
            return Ran("", "timeout", number)
        except Closed:
            end = how_it_ended(leash)
            return Ran("", "timeout" if end == "timeout" else "died", number)
        except Malformed:
            return Ran("", "died", number)
        return Ran(reply["text"], reply["status"], number)


def _checked(reply: Any, most: int) -> dict[str, str]:
    """A reply, for the code may have written into its place.

    Raises:
        Malformed: If it is none.
    """
    text = reply.get("text") if isinstance(reply, dict) else None
    if not isinstance(text, str) or reply.get("status") not in ("ok", "error", "cut"):
        raise Malformed("no reply")
    return {"text": text[: 2 * most], "status": reply["status"]}


@lru_cache(maxsize=8)
def shared_sessions(timeout: float, memory_mb: int, workers: int | None) -> PythonSessions:
    """One per process and settings, which bounds the sessions at a time."""
    return PythonSessions(timeout, memory_mb, workers)
