"""The program's side: runs a program and answers for it. Nothing here is a secret or a verdict.

Standard library only; runs inside of the sandbox. Whatever the program does to this process, it
can do no more than answer in another way, and answers are mere values.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import importlib
import os
import re
import sys
import tempfile
import threading
import types
from collections.abc import Iterator
from typing import Any

from distrl_envs.grading.code_tests import PROGRAM_MODULES, Statement
from distrl_envs.grading.code_wire import TYPES, Channel, Closed, Malformed, decode, encode

MODULE = "program"
MOST_OUTPUT_BYTES = 15 << 20
ERROR_CHARACTERS = 500
PART = re.compile(r"(\w+)(\(\))?")


class Program:
    """A program in its own module, and the objects that it has handed out."""

    def __init__(self) -> None:
        """Starts without a program."""
        self._source = ""
        self._module = types.ModuleType(MODULE)
        self._objects: list[Any] = []

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        """Runs a program as a module; as a script it is only looked at."""
        self._source = request["load"]
        file = f"{MODULE}.py"
        with open(file, "w", encoding="utf-8", errors="surrogatepass") as text:
            text.write(self._source)
        sys.path.insert(0, os.getcwd())
        code = compile(self._source, file, "exec", dont_inherit=True)
        if not request["script"]:
            self._module.__file__ = os.path.abspath(file)
            for name in PROGRAM_MODULES:
                sys.modules[name] = self._module
            exec(code, self._module.__dict__)
        return {}

    def call(self, request: dict[str, Any]) -> dict[str, Any]:
        """Calls something: the value, and the arguments as they are afterwards where asked for."""
        function = decode(request["call"], self._resolve)
        arguments = decode(request["args"], self._resolve)
        named = {key: decode(item, self._resolve) for key, item in request["kwargs"].items()}
        value = function(*arguments, **named)
        reply = {"value": encode(value, self._refer, request["expand"])}
        if request["update"]:
            reply["args"] = [encode(argument, self._refer) for argument in arguments]
        return reply

    def get(self, request: dict[str, Any]) -> dict[str, Any]:
        """What a name of the program means."""
        return {"value": encode(self._at(request["get"]), self._refer)}

    def test(self, request: dict[str, Any]) -> dict[str, Any]:
        """Runs a test that cannot be taken apart, in here."""
        statement = Statement(request["test"], request["entry_point"])
        found = {
            name: self._at(name)
            for name in statement.names
            if self._has(name) or hasattr(builtins, name)
        }
        entry = request["entry_point"]
        return {"checks": statement.run(found, self._at(entry) if entry else None)}

    def stdin(self, request: dict[str, Any]) -> dict[str, Any]:
        """Runs the program as a script: what it wrote, and its exit code."""
        with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as written:
            given.write(request["stdin"].encode("utf-8", "surrogatepass"))
            given.seek(0)
            child = os.fork()
            if child == 0:
                _become_script(self._source, given.fileno(), written.fileno())
            _, status = os.waitpid(child, 0)
            written.seek(0)
            output = written.read(MOST_OUTPUT_BYTES).decode("utf-8", "replace")
        return {"stdout": output, "code": os.waitstatus_to_exitcode(status)}

    def _has(self, name: str) -> bool:
        try:
            self._at(name)
        except (AttributeError, NameError):
            return False
        return True

    def _at(self, path: str) -> Any:
        """A name of the program, `Class().method` included; methods of `Solution` by their name."""
        parts = PART.findall(path)
        first = parts[0][0]
        found: Any
        if hasattr(self._module, first):
            found = getattr(self._module, first)
        elif first in PROGRAM_MODULES:
            found = self._module
        elif hasattr(getattr(self._module, "Solution", None), first):
            found = getattr(self._module.Solution(), first)
        else:
            raise NameError(f"name {first!r} is not defined")
        for index, (name, called) in enumerate(parts):
            if index:
                on_class = isinstance(found, type) and not isinstance(
                    found.__dict__.get(name), staticmethod | classmethod
                )
                # A method is called on an instance, as LeetCode does.
                found = getattr(found() if on_class else found, name)
            if called:
                found = found()
        return found

    def _refer(self, value: Any) -> Any:
        if isinstance(value, type) and value in TYPES.values():
            return {"type": value.__name__}
        kinds = {"iterator": "__next__", "callable": "__call__", "list": "append", "dict": "keys",
                 "set": "add"}  # fmt: skip
        kind = next((kind for kind, name in kinds.items() if hasattr(value, name)), "object")
        self._objects.append(value)
        return {"object": [len(self._objects) - 1, kind]}

    def _resolve(self, kind: str, body: Any) -> Any:
        if kind == "program":
            return self._at(body)
        if kind == "object":
            return self._objects[body[0]]
        if kind == "type":
            return TYPES[body]
        if kind == "iterator":
            return iter(decode(body, self._resolve))
        if kind == "import":
            found: Any = importlib.import_module(body[0])
            for name in body[1].split("."):
                found = getattr(found, name)
            return found
        raise Malformed(f"a value of kind {kind!r}")


def serve(channel: Channel) -> None:
    """Answers requests until nobody asks any more."""
    program = Program()
    operations = {
        "load": program.load, "call": program.call, "get": program.get, "test": program.test,
        "stdin": program.stdin,
    }  # fmt: skip
    while True:
        try:
            request = channel.receive()
        except Closed:
            return
        try:
            reply = operations[next(iter(request))](request)
        except BaseException as error:
            # Whatever it raises, exits included, goes to the one who asked.
            reply = {"error": _described(error)}
        try:
            channel.send(reply)
        except (TypeError, ValueError, RecursionError) as error:
            channel.send({"error": _described(error)})


def _described(error: BaseException) -> list[Any]:
    names = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__]
    text = ""
    with contextlib.suppress(BaseException):
        text = str(error)[:ERROR_CHARACTERS]
    return [names, text]


def _become_script(source: str, given: int, written: int) -> None:
    """Never returns: this process is the script from now on."""
    code = 1
    try:
        os.dup2(given, 0)
        os.dup2(written, 1)
        sys.stdin = open(0, encoding="utf-8", errors="replace")  # noqa: SIM115
        sys.stdout = open(1, "w", encoding="utf-8", errors="replace")  # noqa: SIM115
        sys.argv = [f"{MODULE}.py"]
        main = types.ModuleType("__main__")
        main.__file__ = os.path.abspath(sys.argv[0])
        sys.modules["__main__"] = main
        code = _exit_code(compile(source, sys.argv[0], "exec", dont_inherit=True), main)
        for thread in _lasting_threads():
            thread.join()
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException:
        code = code or 1
    finally:
        os._exit(code)


def _exit_code(code: types.CodeType, main: types.ModuleType) -> int:
    try:
        exec(code, main.__dict__)
    except SystemExit as ending:
        return ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    return 0


def _lasting_threads() -> Iterator[threading.Thread]:
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            yield thread
