"""Tools that a model may call between its turns, by name."""

from __future__ import annotations

import ast
import inspect
import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from distrl_envs.grading import tool_worker
from distrl_envs.grading.code_session import shortened
from distrl_envs.grading.sandboxes import shared_sessions
from distrl_envs.grading.worker_pool import WorkerDied, WorkerPool, WorkerTimedOut
from distrl_envs.user_code import load_attribute

LEAST_CHARACTERS = 100
"""A shorter reply could not say what is wrong."""
LARGEST_EXPRESSION = 1_000
LARGEST_BITS = 10_000
"""Of numerators and denominators on the way to a calculator's result."""
LARGEST_EXPONENT = 1_000
EXPONENT = re.compile(r"[eE]([-+]?[0-9_]+)")
DECIMALS = 10
MEMORY_BYTES = 8 << 30
"""Address space of a process that runs a tool of one's own."""
ALARM_SLACK = 10.0
JOBS_PER_WORKER = 10_000
SPELLINGS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-"})


class Call(NamedTuple):
    """A call that was made before.

    Attributes:
        text: What the tool was given.
        status: Of its result.
    """

    text: str
    status: str


class Result(NamedTuple):
    """What a tool says.

    Attributes:
        text: For the model to read; bounded, and never empty.
        status: "ok", "cut" (too much was said), "error" (the call was at fault), "timeout", "died".
    """

    text: str
    status: str = "ok"


class Tool(ABC):
    """Something that answers texts.

    A call depends on its text and the earlier calls of the episode alone: a tool keeps nothing.

    Attributes:
        name: What the model calls it by.
        description: A sentence that tells the model what to write, and what comes back.
    """

    name: str
    description: str

    @abstractmethod
    def __call__(self, text: str, earlier: Sequence[Call] = ()) -> Result:
        """The result of a call; whatever the text, it comes within the deadline, and is bounded."""


class Calculator(Tool):
    """Arithmetic, exact: `+ - * / // % **` (also `^`), brackets, and decimals as fractions."""

    name = "calculator"
    description = (
        "write an expression with + - * / ** and brackets, for instance (2 + 3) / 4; you get its "
        "exact value"
    )

    def __init__(self, timeout: float, characters: int):
        """Sets the length of a result; numbers are bounded, so that no deadline is needed."""
        self._characters = characters

    def __call__(self, text: str, earlier: Sequence[Call] = ()) -> Result:
        """`5/4 = 1.25` for `(2 + 3) / 4`; an error in words where there is no value."""
        try:
            shown = _shown(_value(text))
        except ZeroDivisionError:
            return Result("[error: division by zero]", "error")
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
            said = error.msg if isinstance(error, SyntaxError) else str(error)
            text, _ = shortened(said or type(error).__name__, self._characters)
            return Result(f"[error: {text}]", "error")
        shown, cut = shortened(shown, self._characters)
        return Result(shown, "cut" if cut else "ok")


class Python(Tool):
    """Python in a sandbox, in which what earlier calls of the episode defined is there.

    They are run again, those without an end left out; `random` and NumPy's generator start with
    the same seed each time. Code that asks the clock or the system's entropy may differ.
    """

    name = "python"
    description = (
        "write Python code; you get what it prints, and the value of an expression at its end; "
        "what earlier calls defined is still there"
    )

    def __init__(
        self, timeout: float, characters: int, memory_mb: int = 512, workers: int | None = None
    ):
        """Sets the limits; nothing is started.

        Args:
            timeout: Seconds for a call.
            characters: Most that a call may print.
            memory_mb: Address space of the code.
            workers: Calls at a time; by default half the cores.
        """
        self._timeout, self._characters = timeout, characters
        self._limits = (timeout, memory_mb, workers)

    def __call__(self, text: str, earlier: Sequence[Call] = ()) -> Result:
        """What the code printed; a traceback where it raised."""
        before = [call.text for call in earlier if call.status not in ("timeout", "died")]
        ran = shared_sessions(*self._limits).run([*before, text], self._characters)
        if ran.status in ("timeout", "died"):
            which = "the code" if ran.number > len(before) else "code of an earlier call"
            return _no_end(ran.status, which, self._timeout)
        return Result(ran.text.rstrip() or "[no output]", ran.status)


class OwnTool(Tool):
    """A function of one's own, `function(text) -> str`, in a process that can be killed.

    What it raises is told to the model, status `error`.
    """

    def __init__(self, location: str, timeout: float, characters: int):
        """Finds the function.

        Args:
            location: `module:function`; its name is the tool's, and the first paragraph of its
                docstring the tool's description.
            timeout: Seconds for a call.
            characters: Most that it may say.

        Raises:
            ValueError: If there is no such function, or it has no docstring.
        """
        function = load_attribute(location)
        told = inspect.getdoc(function)
        if not callable(function) or not told:
            raise ValueError(
                f"Got the tool {location!r}; it must be a function(text) -> str with a docstring, "
                "which tells the model what to write and what comes back."
            )
        self.name = location.rpartition(":")[2].rpartition(".")[2]
        self.description = " ".join(told.partition("\n\n")[0].split()).rstrip(".")
        self._location, self._timeout, self._characters = location, timeout, characters

    def __call__(self, text: str, earlier: Sequence[Call] = ()) -> Result:
        """What the function returns.

        Raises:
            TypeError: If that is no string.
        """
        pool = _shared_pool(self._location, self._timeout)
        try:
            status, said = pool.run((text, self._characters), self._timeout)
        except WorkerTimedOut:
            return _no_end("timeout", "the tool", self._timeout)
        except WorkerDied:
            return _no_end("died", "the tool", self._timeout)
        if status == "no text":
            raise TypeError(f"The tool {self._location} returned {said}; it must return a string.")
        if status == "error":
            return Result(f"[error: {said}]", status)
        return Result(said if said.strip() else "[no output]", status)


TOOLS: dict[str, Callable[..., Tool]] = {"calculator": Calculator, "python": Python}
"""Tools by name; one of one's own is `module:function`."""


def make_tool(name: str, *, timeout: float, characters: int) -> Tool:
    """A tool by its name.

    Args:
        name: A key of `TOOLS`, or `module:function`.
        timeout: Seconds for a call.
        characters: Most characters of a result.

    Raises:
        ValueError: If there is no such tool, or a limit is out of bounds.
    """
    if not isinstance(name, str) or (name not in TOOLS and ":" not in name):
        raise ValueError(
            f"Got tool {name!r}; it must be one of {', '.join(TOOLS)}, or module:function of your "
            "own."
        )
    if not (math.isfinite(timeout) and timeout > 0):
        raise ValueError(f"Got a tool's timeout={timeout}; it must be above 0 seconds.")
    if characters < LEAST_CHARACTERS:
        raise ValueError(
            f"Got {characters} characters for a tool's reply; it must be at least "
            f"{LEAST_CHARACTERS}."
        )
    if name in TOOLS:
        return TOOLS[name](timeout, characters)
    return OwnTool(name, timeout, characters)


def _no_end(status: str, what: str, timeout: float) -> Result:
    if status == "timeout":
        return Result(f"[timeout: {what} ran longer than {timeout:g} s and was stopped]", status)
    return Result(f"[died: {what} ended its process]", status)


@lru_cache(maxsize=16)
def _shared_pool(location: str, timeout: float) -> WorkerPool:
    """One pool per process, function and deadline."""
    arguments = [location, str(MEMORY_BYTES), str(timeout + ALARM_SLACK)]
    size = max(1, (os.cpu_count() or 1) // 2)
    return WorkerPool(Path(tool_worker.__file__), arguments, size, JOBS_PER_WORKER)


def _value(text: str) -> Fraction:
    """The value of an expression.

    Raises:
        ValueError: If it is none, or a number on the way is too large.
        ArithmeticError: If it has no value.
        SyntaxError: If it cannot be read.
    """
    source = text.translate(SPELLINGS).replace("^", "**").strip()
    if len(source) > LARGEST_EXPRESSION:
        raise ValueError(f"an expression has {LARGEST_EXPRESSION} characters at most")
    return _evaluated(ast.parse(source, mode="eval").body, source)


def _evaluated(node: ast.expr, source: str) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return _bounded(_literal(ast.get_source_segment(source, node) or "", value))
        case ast.UnaryOp(op=ast.USub()):
            return -_evaluated(node.operand, source)
        case ast.UnaryOp(op=ast.UAdd()):
            return _evaluated(node.operand, source)
        case ast.BinOp(left=left, op=op, right=right):
            return _bounded(_combined(op, _evaluated(left, source), _evaluated(right, source)))
    found = ast.get_source_segment(source, node) or type(node).__name__
    raise ValueError(f"only numbers, brackets and + - * / // % ** can be calculated, not {found}")


def _literal(written: str, value: int | float) -> Fraction:
    """A number as it is written: a float has lost digits."""
    if isinstance(value, int):
        return Fraction(value)
    exponent = EXPONENT.search(written)
    if exponent and abs(int(exponent[1])) > LARGEST_EXPONENT:
        raise ValueError("the number is too large or too small")
    return Fraction(written)


def _combined(op: ast.operator, left: Fraction, right: Fraction) -> Fraction:
    match op:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case ast.Div():
            return left / right
        case ast.FloorDiv():
            return Fraction(left // right)
        case ast.Mod():
            return left % right
        case ast.Pow():
            if right.denominator != 1:
                raise ValueError("only whole exponents can be calculated")
            if abs(right) * _bits(left) > LARGEST_BITS:
                raise ValueError("the number is too large")
            return left ** int(right)
    raise ValueError("only + - * / // % ** can be calculated")


def _bits(number: Fraction) -> int:
    return max(number.numerator.bit_length(), number.denominator.bit_length())


def _bounded(number: Fraction) -> Fraction:
    if _bits(number) > LARGEST_BITS:
        raise ValueError("the number is too large")
    return number


def _shown(number: Fraction) -> str:
    """A whole number, or a fraction with its decimal, rounded where it does not end."""
    if number.denominator == 1:
        return str(number)
    one = 10**DECIMALS
    scaled = round(number * one)
    decimal = f"{abs(scaled) // one}.{abs(scaled) % one:0{DECIMALS}d}".rstrip("0").rstrip(".")
    sign = "-" if scaled < 0 else ""
    return f"{number} {'=' if Fraction(scaled, one) == number else '≈'} {sign}{decimal}"
