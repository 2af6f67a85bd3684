"""A session's side: runs one block of code after another and says what they printed.

Standard library only; runs inside of the sandbox.
"""

from __future__ import annotations

import ast
import contextlib
import io
import linecache
import random
import sys
import traceback
import types
from typing import Any

from distrl_envs.grading.code_wire import Channel, Closed

SEED = 0
"""Of `random` and NumPy's own generator at the start of a session: code that ran once does the same
when it is run again."""


class Kept(io.TextIOBase):
    """Keeps the first and the last of what is written, and counts what is between.

    Attributes:
        left_out: How many characters are not kept.
    """

    def __init__(self, most: int):
        """Keeps `most` characters, half of them from the end."""
        self._most = most
        self._head, self._tail = "", ""
        self.left_out = 0

    def write(self, text: str) -> int:
        """Takes a text."""
        room = self._most - self._most // 2 - len(self._head)
        self._head += text[:room]
        tail = self._tail + text[room:]
        self.left_out += max(0, len(tail) - self._most // 2)
        self._tail = tail[max(0, len(tail) - self._most // 2) :]
        return len(text)

    def text(self) -> str:
        """What was kept, with a mark where something was left out."""
        mark = f"\n[{self.left_out} characters left out]\n" if self.left_out else ""
        return self._head + mark + self._tail


def shortened(text: str, most: int) -> tuple[str, bool]:
    """At most so many characters of a text, its start and its end, and whether any are left out."""
    kept = Kept(most)
    kept.write(text)
    return kept.text(), kept.left_out > 0


def converse(channel: Channel) -> None:
    """Runs the blocks that it is sent, in one namespace, until nobody sends any more."""
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    random.seed(SEED)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(SEED)
    channel.send({"ready": True})
    number = 0
    while True:
        try:
            request = channel.receive()
        except Closed:
            return
        number += 1
        channel.send(_ran(request["code"], f"<block {number}>", main.__dict__, request["most"]))


def _ran(code: str, name: str, names: dict[str, Any], most: int) -> dict[str, Any]:
    """What a block printed; the value of an expression at its end is printed too."""
    kept, status = Kept(most), "ok"
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
    with contextlib.redirect_stdout(kept), contextlib.redirect_stderr(kept):
        try:
            _run(code, name, names)
        except SystemExit as ending:
            status = "error" if ending.code else "ok"
        except BaseException as error:
            status = "error"
            with contextlib.suppress(BaseException):
                kept.write(_told(error))
    if kept.left_out and status == "ok":
        status = "cut"
    return {"text": kept.text(), "status": status}


def _run(code: str, name: str, names: dict[str, Any]) -> None:
    tree = ast.parse(code, name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec", dont_inherit=True), names)
    if isinstance(last, ast.Expr):
        value = eval(compile(ast.Expression(last.value), name, "eval", dont_inherit=True), names)
        if value is not None:
            print(repr(value))


def _told(error: BaseException) -> str:
    """What was raised, and where in the blocks: frames of libraries tell of this machine."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = traceback.format_list([one for one in frames if one.filename.startswith("<block")])
    header = ["Traceback (most recent call last):\n"] if lines else []
    return "".join([*header, *lines, *traceback.format_exception_only(error)])
