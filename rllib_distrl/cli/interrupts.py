"""Ctrl-C, SIGTERM and SIGHUP: noted at once, acted on where nothing is half done.

A handler that raises does so in the middle of anything: Python drops what is raised in a
destructor or in a callback from C, and Ray's start breaks half-way. So the handler only notes the
signal, and the work asks for it between two iterations, two chunks of an evaluation, two steps of
starting and ending.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

import psutil

from rllib_distrl.cli.errors import Interrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# A terminal's Ctrl-C may reach a process twice, from the terminal and from a wrapper.
_SAME_PRESS_SECONDS = 0.3
_SHOW_CURSOR = "\x1b[?25h"


class Interrupts:
    """While active, signals are noted; `check` raises `Interrupted` once one is.

    A second Ctrl-C ends the process on the spot, as a kill would. A second SIGTERM or SIGHUP does
    not: who sends these has SIGKILL. Signals that were ignored stay so (`nohup`, jobs in the
    background).

    Attributes:
        last_words: Printed when a second Ctrl-C ends the process.
    """

    def __init__(self, announcement: str, last_words: str = "Stopped.") -> None:
        """Prepares the handlers.

        Args:
            announcement: Printed when the first signal is noted.
            last_words: See the attribute.
        """
        self._announcement = announcement
        self.last_words = last_words
        self._noted: tuple[int, float] | None = None
        self._previous: dict[int, Any] = {}
        self._terminals: list[int] = []

    def __enter__(self) -> Self:
        """Takes the signals over; outside of the main thread they stay with whoever has them."""
        if threading.current_thread() is threading.main_thread():
            heard = {signum: signal.getsignal(signum) for signum in _SIGNALS}
            self._previous = {
                n: handler for n, handler in heard.items() if handler != signal.SIG_IGN
            }
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        self.install()
        return self

    def install(self) -> None:
        """Sets the handlers, again where a library has put its own in their place."""
        for signum in self._previous:
            signal.signal(signum, self._note)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    @property
    def pending(self) -> bool:
        """Whether a signal was noted."""
        return self._noted is not None

    def check(self) -> None:
        """Raises `Interrupted` if a signal was noted: nothing is half done here."""
        if self._noted is not None:
            raise Interrupted(self._noted[0])

    def _note(self, signum: int, frame: FrameType | None) -> None:
        """Runs between any two bytecodes, so it takes no lock and prints by the system's call."""
        now = time.monotonic()
        if self._noted is None:
            self._noted = signum, now
            if signum == signal.SIGHUP:
                self._leave_terminal()
            _say(self._announcement)
        elif signum == signal.SIGINT and now - self._noted[1] > _SAME_PRESS_SECONDS:
            self._end(signum)

    def _leave_terminal(self) -> None:
        """Writes to nowhere from now on: a terminal that has hung up makes every print an error."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in self._terminals:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)

    def _end(self, signum: int) -> NoReturn:
        _say(self.last_words, _SHOW_CURSOR if self._terminals else "")
        os._exit(128 + signum)


@contextlib.contextmanager
def kept_from_ray() -> Iterator[None]:
    """Within it Ray starts: its processes hear none of the three signals.

    Terminals and job schedulers send them to every process, and the checkpoint needs Ray's. A
    signal that comes meanwhile is delivered at the end. Ray 2.60 takes SIGTERM, and exits on it in
    the middle of starting: it is kept from that. It also ends its processes with it:
    `shut_ray_down` does otherwise.
    """
    from ray._private import utils

    theirs = utils.set_sigterm_handler
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # which Ray's processes inherit
    utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = theirs
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def shut_ray_down() -> None:
    """Ends Ray whose processes `kept_from_ray` has made deaf.

    Ray 2.60 (_private/node.py) asks each by SIGTERM and waits a second before it kills it. What
    its raylet has started would notice its end by itself, a while later.
    """
    import ray
    from ray._private import worker

    node: Any = worker.global_worker.node
    infos = [info for some in node.all_processes.values() for info in some] if node else []
    below = []
    for info in infos:
        info.process.terminate = info.process.kill
        with contextlib.suppress(psutil.NoSuchProcess):
            below += psutil.Process(info.process.pid).children(recursive=True)
    ray.shutdown()
    for process in below:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _say(*parts: str) -> None:
    with contextlib.suppress(OSError):
        os.write(1, ("\n".join(parts) + "\n").encode())
