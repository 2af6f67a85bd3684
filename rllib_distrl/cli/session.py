"""What surrounds a command: its errors, its signals, Ray, and libraries that are kept silent.

Errors are one red paragraph and an exit code, without a traceback.

Ctrl-C, SIGTERM and SIGHUP are noted at once and acted on where nothing is half done. A handler that
raises does so in the middle of anything: Python drops what is raised in a destructor or in a
callback from C, and Ray's start breaks half-way. So the handler only notes the signal, and the work
asks for it between two iterations, two chunks of an evaluation, two steps of starting and ending.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import shlex
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

from rich.console import Console
from rich.text import Text

from rllib_distrl.runs.checkpoints import TrainingStopped

FAILURE = 1
USAGE_ERROR = 2
TRACEBACK_VARIABLE = "DISTRL_TRACEBACK"

_RLLIB_HINT = "To suppress all validation errors, set"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# How libraries that are not Python's own say it.
_NO_ROOM_WORDS = ("No space left on device", "Disk quota exceeded", "File too large")
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# A terminal's Ctrl-C may reach a process twice, from the terminal and from a wrapper.
_SAME_PRESS_SECONDS = 0.3
_SHOW_CURSOR = "\x1b[?25h"
_ANSWER_SECONDS = 10.0  # of a Ray cluster


class Interrupted(KeyboardInterrupt):
    """Training stopped because of a signal.

    Attributes:
        signum: The signal that asked for it.
    """

    def __init__(self, signum: int = signal.SIGINT) -> None:
        super().__init__(signum)
        self.signum = signum


def exit_code_of(error: BaseException) -> int:
    """Prints an expected error and returns the exit code.

    Returns:
        2 for bad input, 1 if training had to stop, 130 after Ctrl-C, 128 + N after signal N.

    Raises:
        BaseException: `error` itself, if DISTRL_TRACEBACK=1.
    """
    if os.environ.get(TRACEBACK_VARIABLE) == "1":
        raise error
    if isinstance(error, KeyboardInterrupt):
        return 128 + getattr(error, "signum", signal.SIGINT)
    print_error(message_of(error))
    return FAILURE if isinstance(error, TrainingStopped) else USAGE_ERROR


def message_of(error: BaseException) -> str:
    """Returns the message of an error for a person to read.

    Errors of a Ray worker arrive wrapped in a remote traceback: the cause says it.
    """
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception):
        error = cause
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror}"
    message = str(error).partition(_RLLIB_HINT)[0].strip()
    return message or type(error).__name__


def print_error(message: str) -> None:
    """Prints one red paragraph to stderr."""
    text = Text.assemble(("error: ", "bold red"), (message, "red"))
    Console(stderr=True).print(text, soft_wrap=True)


@contextmanager
def naming_a_full_disk(run: Path) -> Iterator[None]:
    """Says of a write that found no room where it was and how to go on.

    Args:
        run: The run folder.

    Raises:
        TrainingStopped: In place of it.
    """
    try:
        yield
    except Exception as error:
        if not _found_no_room(error):
            raise
        place = getattr(error, "filename", None) or run
        raise TrainingStopped(
            f"{place}: {_reason(error)}. Checkpoints that were written are whole. Make room there, "
            f"then continue with: distrl train {shlex.quote(str(run))} --resume"
        ) from error


def _found_no_room(error: BaseException | None) -> bool:
    if error is None:
        return False
    said = any(words in str(error) for words in _NO_ROOM_WORDS)
    known = isinstance(error, OSError) and error.errno in _NO_ROOM
    return said or known or _found_no_room(error.__cause__)


def _reason(error: BaseException) -> str:
    return next((words for words in _NO_ROOM_WORDS if words in str(error)), str(error))


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


@contextmanager
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
    import psutil
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


_ENVIRONMENT = {
    # Workers inherit these; what a user has set stays.
    "PYTHONWARNINGS": "ignore",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SCHEDULER_EVENTS": "0",
    # Ray's C++ core prints advice about actors as errors; real failures arrive as exceptions.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "GRPC_VERBOSITY": "ERROR",
    "GLOG_minloglevel": "3",
}
# Ray sets the level of "ray.rllib" when it is imported, so its talkative modules are named.
_LOGGERS = (
    "ray",
    "ray._common.deprecation",
    "ray.rllib.algorithms.algorithm",
    "ray.rllib.algorithms.algorithm_config",
    "ray.rllib.core.learner.learner",
    "ray.rllib.env.env_runner_group",
    "ray.rllib.utils.deprecation",
    "ray.tune",
    "transformers",
    "torch",
    "gymnasium",
)


def silence_libraries() -> None:
    """Call before importing any of them."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore")
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def hide_loading_bars() -> None:
    """Hides transformers' progress bars of loading and saving; downloads keep theirs."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def cpus_needed(config: Any) -> int:
    """Returns how many CPUs the actors of an `AlgorithmConfig` reserve, at most."""
    from rllib_distrl.algorithm.cluster import num_aggregators
    from rllib_distrl.settings import RolloutSettings

    most = max(config.num_env_runners, RolloutSettings.of(config.model_config).max_env_runners)
    runners = most * config.num_cpus_per_env_runner
    evaluation = (config.evaluation_num_env_runners or 0) * config.num_cpus_per_env_runner
    per_learner = config.num_cpus_per_learner
    per_learner = 1 if isinstance(per_learner, str) else per_learner
    learners = config.num_learners * per_learner + num_aggregators(config)
    return math.ceil(runners + evaluation + learners)


def check_address() -> None:
    """Refuses a RAY_ADDRESS where nothing listens, which Ray itself notices after minutes.

    Raises:
        ValueError: If so.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    host, _, port = address.rpartition(":")
    if "//" in host or not port.isdigit():  # "auto", "ray://...": Ray knows
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS).close()
    except OSError as error:
        raise ValueError(
            f"RAY_ADDRESS={address}: no Ray cluster answers there ({error}). Start one with "
            "`ray start --head`, or unset RAY_ADDRESS to start one for this command."
        ) from error


@contextmanager
def ray_session(config: Any, interrupts: Interrupts | None = None) -> Iterator[None]:
    """Starts Ray on this machine, or joins the cluster of RAY_ADDRESS; always shuts down.

    A signal that comes while it starts is acted on when it has.

    Ray is told of as many CPUs as the recipe's actors reserve, at least: on fewer cores they
    share, where Ray would otherwise wait for a machine that never comes.

    Raises:
        ValueError: If no cluster answers there, or it refuses this process.
        Interrupted: After a signal.
    """
    import ray

    check_address()
    joining = bool(os.environ.get("RAY_ADDRESS"))
    num_cpus = None if joining else max(os.cpu_count() or 1, cpus_needed(config))
    try:
        with kept_from_ray(), _core_notices_hidden():
            ray.init(
                # Without an address Ray would join any cluster that it finds on this machine.
                address=None if joining else "local",
                num_cpus=num_cpus,
                include_dashboard=None if joining else False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except ConnectionError as error:
        raise ValueError(
            f"{error}. Is the cluster of RAY_ADDRESS running? If it wants a token, as clusters of "
            "ray.init do where `ray get-auth-token` has made one, set RAY_AUTH_MODE=token here too."
        ) from error
    try:
        if interrupts is not None:
            interrupts.install()  # Ray's core takes SIGTERM as well
            interrupts.check()
        yield
    finally:
        shut_ray_down()


@contextmanager
def _core_notices_hidden() -> Iterator[None]:
    """Hides what Ray's C++ core writes to stderr while it starts.

    Ray 2.60 announces there that it has read RAY_BACKEND_LOG_LEVEL. Failures are exceptions.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
