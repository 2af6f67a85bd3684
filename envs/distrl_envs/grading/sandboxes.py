"""The server of sandboxes as its users see it: sandboxes are opened, and let go."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

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
