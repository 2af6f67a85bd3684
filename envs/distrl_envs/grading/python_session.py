"""Python for a model to use: blocks of code in a sandbox, one after another."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from distrl_envs.grading.code_wire import Channel, Closed, Malformed
from distrl_envs.grading.sandboxes import STARTUP_GRACE, Sandboxes, how_it_ended, let_go

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
