"""Values as data: what passes between a program and those who judge it.

Standard library only; both ends use it. A line is JSON; a value that JSON does not have is an
object with one key, its kind. Nothing received is ever executed: the worst that a forged line can
say is a wrong value.
"""

from __future__ import annotations

import datetime
import json
import re
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

MOST_LINE_BYTES = 16 << 20
JSON_INTEGERS = 1 << 53
"""Integers from here on travel in hexadecimal, which is linear in their length."""
ARRAY_KINDS = re.compile(r"[<>|=][biufcU]\d{1,5}")

Reference = Callable[[Any], Any]


class Closed(Exception):
    """The other end is gone, or said more than a line may hold."""


class Malformed(ValueError):
    """What was received is no value."""


class Channel:
    """Lines of JSON over a socket."""

    def __init__(self, connection: socket.socket):
        """Takes the socket over."""
        self._socket = connection
        self._buffer = bytearray()

    def send(self, message: Any, deadline: float | None = None) -> None:
        """Sends one line.

        Raises:
            Closed: If nobody reads.
            TimeoutError: If the deadline (of `time.monotonic`) passes first.
        """
        self._socket.settimeout(_left(deadline))
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except TimeoutError:
            raise
        except OSError as error:
            raise Closed from error

    def receive(self, deadline: float | None = None) -> Any:
        """The next line.

        Raises:
            Closed: If there is none, or it is too long.
            TimeoutError: If the deadline passes first.
            Malformed: If it is no JSON.
        """
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            if searched > MOST_LINE_BYTES:
                raise Closed
            self._socket.settimeout(_left(deadline))
            try:
                data = self._socket.recv(1 << 16)
            except TimeoutError:
                raise
            except OSError as error:
                raise Closed from error
            if not data:
                raise Closed
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        try:
            return json.loads(line)
        except (ValueError, RecursionError) as error:
            raise Malformed(str(error)) from None

    def close(self) -> None:
        """Closes the socket."""
        self._socket.close()


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(1e-3, deadline - time.monotonic())


def encode(value: Any, refer: Reference, expand: bool = False) -> Any:
    """A value as JSON.

    Args:
        value: Anything. Subclasses of built-in types become those, NumPy's numbers Python's.
        refer: Gives what stands for an object that is no plain value, or raises.
        expand: Whether iterators, arrays and views become lists; otherwise they are referred to.

    Raises:
        RecursionError: If the value is nested too deep or holds itself.
    """

    def inner(item: Any) -> Any:
        return encode(item, refer, expand)

    kind = type(value)
    if value is None or kind in (str, bool, float):
        return value
    if kind is int:
        return value if -JSON_INTEGERS < value < JSON_INTEGERS else {"int": hex(value)}
    if kind is list:
        return [inner(item) for item in value]
    if kind is dict:
        return {"dict": [[inner(key), inner(item)] for key, item in value.items()]}
    for base in (tuple, set, frozenset, deque):
        if kind is base:
            return {base.__name__: [inner(item) for item in value]}
    plain = _scalar(value, kind)
    if plain is not None:
        return plain
    if not expand:
        reference = _array(value, inner) or (None if _is_plain_subclass(kind) else refer(value))
        if reference is not None:
            return reference
    for base in (bool, int, float, complex, str, bytes, list, dict, tuple, set, frozenset, deque):
        if isinstance(value, base):
            return inner(_base_value(value, base))
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray | numpy.generic):
        return inner(value.tolist())
    if expand and not isinstance(value, type) and hasattr(value, "__iter__"):
        return [inner(item) for item in value]
    return refer(value)


def _scalar(value: Any, kind: type) -> Any:
    """Numbers, bytes, ranges and dates of exact types, and NumPy's numbers; None for others."""
    if kind in (bytes, bytearray):
        return {kind.__name__: value.hex()}
    if kind is complex:
        return {"complex": [value.real, value.imag]}
    if kind is range:
        return {"range": [hex(value.start), hex(value.stop), hex(value.step)]}
    if kind is Fraction:
        return {"Fraction": [hex(value.numerator), hex(value.denominator)]}
    if kind is Decimal:
        return {"Decimal": str(value)}
    if kind in (datetime.date, datetime.datetime, datetime.time):
        return {kind.__name__: value.isoformat()}
    if kind is datetime.timedelta:
        return {"timedelta": [value.days, value.seconds, value.microseconds]}
    if kind in TYPES.values():
        return None
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic):
        item = value.item()
        if type(item) in (bool, int, float, str):
            return item
        return {"complex": [item.real, item.imag]} if type(item) is complex else None
    return None


def _array(value: Any, inner: Callable[[Any], Any]) -> Any:
    numpy = sys.modules.get("numpy")
    if numpy is None or not isinstance(value, numpy.ndarray):
        return None
    if not ARRAY_KINDS.fullmatch(value.dtype.str):
        return None
    return {"ndarray": [value.dtype.str, list(value.shape), inner(value.ravel().tolist())]}


def _is_plain_subclass(kind: type) -> bool:
    """Whether a subclass of a built-in type is but a value: it is no container with methods."""
    if issubclass(kind, str | int | float | complex | bytes | tuple | frozenset):
        return True
    if not issubclass(kind, list | dict | set | deque):
        return False
    return kind.__module__ in sys.stdlib_module_names


def _base_value(value: Any, base: type) -> Any:
    """The value as its built-in type sees it, whatever its own methods say."""
    if base in (int, float, complex, str, bytes):
        return base.__add__(value, base())  # type: ignore[operator]
    if base is dict:
        return dict(dict.items(value))
    return base(base.__iter__(value))  # type: ignore[attr-defined]


TYPES = {
    kind.__name__: kind
    for kind in (
        bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset, range,
        type(None),
    )
}  # fmt: skip
"""Types that a value may be, by name."""


def decode(data: Any, resolve: Callable[[str, Any], Any]) -> Any:
    """The value that was encoded: exact built-in types, or what `resolve` makes of a reference.

    Raises:
        Malformed: If it is none.
    """
    try:
        return _decode(data, resolve)
    except Malformed:
        raise
    except (ValueError, TypeError, ArithmeticError, RecursionError, AttributeError) as error:
        raise Malformed(f"{type(error).__name__}: {error}") from None


def _decode(data: Any, resolve: Callable[[str, Any], Any]) -> Any:
    if isinstance(data, list):
        return [_decode(item, resolve) for item in data]
    if not isinstance(data, dict):
        return data
    if len(data) != 1:
        raise Malformed("a value has one kind")
    ((kind, body),) = data.items()
    if kind == "dict":
        return {_decode(key, resolve): _decode(item, resolve) for key, item in body}
    if kind in CONTAINERS:
        return CONTAINERS[kind]([_decode(item, resolve) for item in body])
    if kind in READERS:
        return READERS[kind](body)
    if kind == "ndarray":
        return _decoded_array(*body, resolve=resolve)
    return resolve(kind, body)


def _decoded_array(dtype: str, shape: list[int], items: list[Any], resolve: Any) -> Any:
    import numpy

    if not ARRAY_KINDS.fullmatch(dtype):
        raise Malformed(f"an array of {dtype!r}")
    return numpy.array(_decode(items, resolve), dtype=dtype).reshape(shape)


CONTAINERS: dict[str, Any] = {"tuple": tuple, "set": set, "frozenset": frozenset, "deque": deque}
READERS: dict[str, Callable[[Any], Any]] = {
    "int": lambda body: int(body, 16),
    "complex": lambda body: complex(float(body[0]), float(body[1])),
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "range": lambda body: range(*(int(part, 16) for part in body)),
    "Fraction": lambda body: Fraction(int(body[0], 16), int(body[1], 16)),
    "Decimal": Decimal,
    "date": datetime.date.fromisoformat,
    "datetime": datetime.datetime.fromisoformat,
    "time": datetime.time.fromisoformat,
    "timedelta": lambda body: datetime.timedelta(*body),
}
