"""What the command line does with errors: one red paragraph, an exit code, no traceback."""

from __future__ import annotations

import os
import signal

from rich.console import Console
from rich.text import Text

from rllib_distrl.runs.checkpoints import TrainingStopped

FAILURE = 1
USAGE_ERROR = 2
TRACEBACK_VARIABLE = "DISTRL_TRACEBACK"

_RLLIB_HINT = "To suppress all validation errors, set"


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
