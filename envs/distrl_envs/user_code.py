"""Code of the user's: finding it by name, and saying where it failed."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Collection
from importlib import import_module
from types import FrameType
from typing import Any


def search_working_directory() -> str:
    """Lets imports look into the working directory, last, and returns it.

    A console script does not have it on its path; Ray's workers have their driver's.
    """
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    return here


def load_attribute(location: str) -> Any:
    """What `module:attribute` names; the working directory is searched last.

    Args:
        location: `module:attribute`; the attribute may be dotted.

    Raises:
        ValueError: If there is no such module or attribute, or the module fails while it is
            imported: with what it raised, and where.
    """
    module, _, attribute = location.partition(":")
    if not re.fullmatch(r"\w+(\.\w+)*:\w+(\.\w+)*", location):
        raise ValueError(
            f"Got {location!r}; it must be module:name, where the module is what Python imports: "
            "my_module:name for a file my_module.py in the working directory."
        )
    here = search_working_directory()
    try:
        found = import_module(module)
        for name in attribute.split("."):
            found = getattr(found, name)
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"{location!r} could not be imported: {named(error)}{_place(error)}. Is its module "
            f"installed, on PYTHONPATH or in the working directory ({here})?"
        ) from error
    return found


def named(error: BaseException) -> str:
    """An exception as type and text."""
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def report(error: BaseException, own: Collection[str] = ()) -> str:
    """What was raised and where, for a process that only gets text: each exception once.

    Args:
        error: The exception, with what caused it.
        own: Top-level packages whose frames are left out around those of user code.

    Returns:
        Type and text, then the tracebacks of `error` and its causes; of an error that does
        nothing but say where another one was raised, only the other's.
    """
    lines = [named(error)]
    cause = error.__cause__
    if cause is None or not str(error).endswith(named(cause)):
        lines += _traceback(error, own)
    elif cause is not None:
        lines += _traceback(cause, own)
        cause = cause.__cause__
    while cause is not None:
        lines += [f"caused by {named(cause)}", *_traceback(cause, own)]
        cause = cause.__cause__
    return "\n".join(lines)


def source_of(function: Any) -> str:
    """File and line of a function as ` (file:line)`; empty where it is not written in Python."""
    code = getattr(function, "__code__", None)
    return f" ({code.co_filename}:{code.co_firstlineno})" if code else ""


def _traceback(error: BaseException, own: Collection[str]) -> list[str]:
    frames = list(traceback.walk_tb(error.__traceback__))
    users = [number for number, (frame, _) in enumerate(frames) if _package(frame) not in own]
    if not users:
        return []
    kept = traceback.StackSummary.extract(iter(frames[users[0] : users[-1] + 1]))
    return ["Traceback (most recent call last):", "".join(kept.format()).rstrip()]


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__")).partition(".")[0]


def _place(error: BaseException) -> str:
    """File and line of the deepest frame that is not the import system's."""
    places = [
        f"{frame.filename}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if "importlib" not in frame.filename and frame.filename != __file__
    ]
    if isinstance(error, SyntaxError) and error.filename:
        places.append(f"{error.filename}:{error.lineno}")
    return f" ({places[-1]})" if places else ""
