"""The tests' side: holds the tests, asks the program for values, and compares them itself.

Standard library only; runs in a sandbox of its own, for tests come with data that others wrote.
"""

from __future__ import annotations

import builtins
import math
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

from distrl_envs.grading.code_tests import Statement
from distrl_envs.grading.code_wire import TYPES, Channel, Closed, Malformed, decode, encode

NEARLY = 1e-6
"""Tolerance of a call that expects or returns a float, relative above 1 and absolute below."""
FORWARDED = {"__name__", "__doc__", "__annotations__", "__qualname__", "__module__"}
NUMBERS = (int, float, Fraction, Decimal)


class ProgramError(Exception):
    """What the program raised, where it is nothing that Python has."""


class Link:
    """The program as a test sees it.

    Attributes:
        gone: Whether the program has ended, or said what is no line.
    """

    def __init__(self, channel: Channel):
        """Takes the channel over."""
        self._channel = channel
        self.gone = False

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Sends a request and waits for what becomes of it.

        Raises:
            Closed: If the program is gone, and ever after.
            Exception: What the program raised.
        """
        if self.gone:
            raise Closed
        try:
            self._channel.send(request)
            reply = self._channel.receive()
        except Closed:
            self.gone = True
            raise
        if not isinstance(reply, dict):
            raise Malformed("the reply is none")
        if "error" in reply:
            raise _raised(reply["error"])
        return reply

    def get(self, path: str) -> Any:
        """What a name of the program means."""
        return self._decoded(self.ask({"get": path}).get("value"))

    def call(
        self,
        function: Any,
        arguments: Sequence[Any],
        named: Mapping[str, Any] | None = None,
        *,
        update: bool = False,
        expand: bool = False,
    ) -> Any:
        """Calls a function where the program is; with `update` arguments change as they did there.

        Raises:
            Malformed: If the reply is no value.
            Exception: What the program raised.
        """
        reply = self.ask(
            {
                "call": function,
                "args": [encode(argument, _refer) for argument in arguments],
                "kwargs": {key: encode(item, _refer) for key, item in (named or {}).items()},
                "update": update,
                "expand": expand,
            }
        )
        if update:
            changed = reply.get("args")
            if isinstance(changed, list) and len(changed) == len(arguments):
                for argument, data in zip(arguments, changed, strict=True):
                    _refresh(argument, self._decoded(data))
        return self._decoded(reply.get("value"))

    def _decoded(self, data: Any) -> Any:
        return decode(data, self._resolve)

    def _resolve(self, kind: str, body: Any) -> Any:
        if kind == "object" and isinstance(body, list) and len(body) == 2:
            return Remote(self, body[0], str(body[1]))
        if kind == "type" and body in TYPES:
            return TYPES[body]
        raise Malformed(f"a value of kind {kind!r}")


class Remote:
    """An object that stays with the program. It can be used but equals nothing and is not true.

    A container of the program's own class is compared as the built-in one that it is made of.
    """

    __slots__ = ("_kind", "_link", "_number")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, link: Link, number: Any, kind: str):
        self._link = link
        self._number = number
        self._kind = kind

    def _reference(self) -> dict[str, Any]:
        return {"object": [self._number, ""]}

    def _plain(self) -> Any:
        if self._kind not in ("list", "dict", "set"):
            raise TypeError("The program returned an object of its own, which equals no value.")
        return _outside(self, self._kind)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Calls it where it is."""
        return self._link.call(self._reference(), arguments, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in FORWARDED:
            raise AttributeError(name)
        return _outside(self, "getattr", name)

    def __iter__(self) -> Any:
        return self if self._kind == "iterator" else _outside(self, "iter")

    def __next__(self) -> Any:
        try:
            return _outside(self, "next")
        except RuntimeError as error:
            if str(error).startswith("StopIteration"):
                raise StopIteration from None
            raise

    def __eq__(self, other: object) -> bool:
        return self._plain() == (other._plain() if isinstance(other, Remote) else other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __bool__(self) -> bool:
        return bool(self._plain())


def _outside(remote: Remote, name: str, *arguments: Any, module: str = "builtins") -> Any:
    return remote._link.call({"import": [module, name]}, (remote, *arguments))


def _forward(method: str, name: str, module: str) -> None:
    def forwarded(self: Remote, *arguments: Any) -> Any:
        return _outside(self, name, *arguments, module=module)

    setattr(Remote, method, forwarded)


# Operations that tell the program nothing of what the test expects: `f(2) - 4` would.
for _name in ("len", "str", "repr", "reversed"):
    _forward(f"__{_name}__", _name, "builtins")
for _name in ("getitem", "setitem", "delitem"):
    _forward(f"__{_name}__", f"__{_name}__", "operator")


def examine(program: Channel, grader: Channel) -> None:
    """Runs tests of a job in order and reports each; ends with a report of how it ended."""
    grader.send({"ready": True})
    job = grader.receive()
    tests, entry = job["tests"], job["entry_point"]
    link = Link(program)
    script = "stdin" in tests[0] if isinstance(tests[0], dict) else False
    end = "finished"
    try:
        link.ask({"load": job["program"], "script": script})
    except Exception:
        grader.send({"end": "gone" if link.gone else "no program"})
        return
    grader.send({"loaded": True})
    for test in tests[job["first"] :]:
        passed, checks = _examined(link, test, entry)
        if link.gone:
            end = "gone"
            break
        grader.send({"passed": passed, "checks": checks})
        if not passed and job["stop"]:
            break
    grader.send({"end": end})


def _examined(link: Link, test: Any, entry: str | None) -> tuple[bool, int]:
    """Whether a test passed, and how many checks it made."""
    try:
        if isinstance(test, str):
            checks = _statement(link, test, entry)
            return checks > 0, checks
        if "stdin" in test:
            return _script(link, test), 1
        found = link.call({"program": entry}, test["input"], expand=True)
        return same(found, test["output"]), 1
    except BaseException:
        # Whatever a test raises, it has not passed.
        return False, 1


def _statement(link: Link, source: str, entry: str | None) -> int:
    statement = Statement(source, entry)
    if statement.in_child is not None:
        reply = link.ask({"test": source, "entry_point": entry})
        checks = reply.get("checks")
        return checks if type(checks) is int else 0
    found = {}
    for name in statement.names:
        try:
            found[name] = link.get(name)
        except NameError:
            if hasattr(builtins, name):
                raise  # It must be the program's own.

    def in_place(function: Any, *arguments: Any, **named: Any) -> Any:
        if isinstance(function, Remote):
            return link.call(function._reference(), arguments, named, update=True)
        return function(*arguments, **named)

    return statement.run(found, link.get(entry) if entry else None, in_place)


def _script(link: Link, test: Mapping[str, Any]) -> bool:
    reply = link.ask({"stdin": test["stdin"]})
    output = reply.get("stdout")
    if reply.get("code") != 0 or type(output) is not str:
        return False
    if test.get("compare", "tokens") == "exact":
        return output.rstrip("\n") == test["stdout"].rstrip("\n")
    return output.split() == test["stdout"].split()


def same(found: Any, expected: Any) -> bool:
    """Whether a returned value is the one that a call expects.

    Equality of plain values only (our choice): numbers are equal as numbers, nearly where one of
    them is a float, and NaN equals NaN; true and false equal themselves alone; any sequence equals
    a list with equal items in that order, a set one with the same items in any order; a mapping
    equals an object whose keys are its own as JSON or Python writes them.
    """
    if expected is None or type(expected) in (bool, str):
        return type(found) is type(expected) and found == expected
    if type(expected) in (int, float):
        return type(found) in NUMBERS and _same_number(found, expected)
    if isinstance(expected, Mapping):
        return type(found) is dict and _same_mapping(found, expected)
    if type(found) in (set, frozenset):
        return len(found) == len(expected) and _same_items(list(found), list(expected))
    if type(found) not in (list, tuple, deque, range):
        return False
    return len(found) == len(expected) and all(map(same, found, expected))


def _same_number(found: Any, expected: int | float) -> bool:
    if type(found) is not float and type(expected) is not float:
        return found == expected
    try:
        found, wanted = float(found), float(expected)
    except OverflowError:
        return False
    if math.isnan(wanted) or math.isinf(wanted):
        return found == wanted or (math.isnan(found) and math.isnan(wanted))
    return abs(found - wanted) <= NEARLY * max(1.0, abs(wanted))


def _same_mapping(found: dict[Any, Any], expected: Mapping[str, Any]) -> bool:
    json_words = {True: "true", False: "false", None: "null"}
    left = dict(expected)
    for key, item in found.items():
        names = [key] if type(key) is str else [str(key)]
        if key is None or type(key) is bool:
            names.append(json_words[key])
        name = next((name for name in names if name in left), None)
        if name is None or not same(item, left.pop(name)):
            return False
    return not left


def _same_items(found: list[Any], expected: list[Any]) -> bool:
    for item in expected:
        index = next((i for i, one in enumerate(found) if same(one, item)), None)
        if index is None:
            return False
        del found[index]
    return True


def _refer(value: Any) -> Any:
    """What stands for an object that is handed to the program."""
    if isinstance(value, Remote):
        return value._reference()
    if isinstance(value, type) and value in TYPES.values():
        return {"type": value.__name__}
    if isinstance(value, Iterator):
        return {"iterator": [encode(item, _refer) for item in value]}
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if isinstance(value, type(sys)):
        raise TypeError("A module cannot be handed to the program.")
    if name and module in sys.modules and module != "test":
        return {"import": [module, name]}
    raise TypeError(f"{type(value).__name__} cannot be handed to the program.")


def _refresh(argument: Any, changed: Any) -> None:
    """Changes an argument as it changed where the program is."""
    if type(argument) is not type(changed):
        return
    if type(argument) in (list, bytearray):
        argument[:] = changed
    elif type(argument) in (dict, set):
        argument.clear()
        argument.update(changed)
    elif type(argument) is deque:
        argument.clear()
        argument.extend(changed)


def _raised(error: Any) -> Exception:
    """The nearest exception that Python has; never one that ends an iteration or a process."""
    names, text = error if isinstance(error, list) and len(error) == 2 else ([], "")
    kinds = names if isinstance(names, list) else []
    if kinds[:1] == ["builtins.StopIteration"]:
        return RuntimeError("StopIteration")
    for name in kinds:
        found: Any = _exception(str(name))
        if found is not None:
            raised = found.__new__(found, str(text))
            raised.args = (str(text),)
            return raised
    return ProgramError(str(text))


def _exception(name: str) -> type[Exception] | None:
    module, _, kind = name.rpartition(".")
    top = module.partition(".")[0]
    if top not in sys.stdlib_module_names or top == "unittest":
        return None
    found = getattr(sys.modules.get(module), kind, None)
    if not isinstance(found, type) or not issubclass(found, Exception):
        return None
    iteration = (StopIteration, StopAsyncIteration)
    return None if issubclass(found, iteration) or found is Exception else found
