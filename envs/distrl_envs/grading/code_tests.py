"""Tests of programs: their forms, their faults, and how one is run.

Standard library only: used where the data is loaded, where tests are held, and in the sandbox.
"""

from __future__ import annotations

import ast
import builtins
import importlib.util
import itertools
import json
import re
import sys
import unittest
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

Test = str | Mapping[str, Any]

PROGRAM_MODULES = ("program", "solution", "candidate_solution", "your_module")
"""Names under which a test may import the program."""
COMPARE = ("tokens", "exact")
ENTRY_POINT = re.compile(r"[^\W\d]\w*(\(\))?(\.[^\W\d]\w*(\(\))?)*")
BUILTINS = frozenset(dir(builtins)) | {"__name__", "__file__", "__doc__"}
IN_CHILD_NAMES = {
    "eval", "exec", "compile", "globals", "locals", "vars", "redirect_stdout", "redirect_stderr",
    "open", "tempfile", "pathlib", "Path", "shutil", "patch", "mock", "capsys", "monkeypatch",
    "inspect", "asyncio", "StringIO", "gc", "tracemalloc",
}  # fmt: skip
"""What a test can use only where the program itself is."""
IN_CHILD_ATTRIBUTES = {"stdout", "stderr", "stdin", "redirect_stdout", "mock", "StringIO"}
SINGLE_TYPES = {"int", "float", "str", "bool", "list", "tuple", "dict", "set", "type"}


def normal_tests(value: Any) -> tuple[list[Any], str | None]:
    """The tests of a row, in the forms of `CodeGrader`, from those in which they are published.

    A string is read as JSON, else as one statement. `{"inputs": …, "outputs": …, "fn_name": …}`
    (APPS) and lists of `{"input": text, "output": text}` (LiveCodeBench, Codeforces) are pairs of
    standard input and output; with a function's name, or the test type "functional", calls.

    Returns:
        The tests, and the function that they name, if they do.

    Raises:
        ValueError: If they are in no form that is known.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return [value], None
    name = None
    if isinstance(value, Mapping):
        name = value.get("fn_name")
        value = _published(value) if {"inputs", "outputs"} <= set(value) else [value]
    if not isinstance(value, list) or not all(isinstance(test, str | Mapping) for test in value):
        raise ValueError(
            f"tests hold {value!r:.60}; they must be a list of statements, of calls with input and "
            "output or of scripts with stdin and stdout"
        )
    return [test if isinstance(test, str) else _normal(dict(test)) for test in value], name


def _published(value: Mapping[str, Any]) -> list[dict[str, Any]]:
    inputs, outputs = value["inputs"], value["outputs"]
    if not isinstance(inputs, list) or not isinstance(outputs, list):
        raise ValueError("tests hold inputs and outputs that are not lists")
    if len(inputs) != len(outputs):
        raise ValueError(f"tests hold {len(inputs)} inputs but {len(outputs)} outputs")
    pairs = zip(inputs, outputs, strict=True)
    if not value.get("fn_name"):
        return [{"stdin": _lines(given), "stdout": _lines(wanted)} for given, wanted in pairs]
    return [
        {"input": given, "output": wanted[0] if isinstance(wanted, list) and len(wanted) == 1
         else wanted}
        for given, wanted in pairs
    ]  # fmt: skip


def _lines(value: Any) -> Any:
    return "\n".join(map(str, value)) if isinstance(value, list) else value


def _normal(test: dict[str, Any]) -> dict[str, Any]:
    kind = test.pop("testtype", None)
    if set(test) != {"input", "output"} or not isinstance(test["input"], str):
        return test
    if kind == "functional":
        # LiveCodeBench: one argument a line, each as JSON.
        lines = test["input"].splitlines()
        return {"input": [json.loads(line) for line in lines], "output": json.loads(test["output"])}
    return {"stdin": test["input"], "stdout": test["output"]}


def check_tests(tests: Sequence[Test], entry_point: str | None) -> None:
    """Raises ValueError unless every test can be run, can be passed and checks something."""
    if not tests or isinstance(tests, str):
        raise ValueError(f"Got tests {tests!r}; they must be a list with at least one test.")
    if entry_point is not None and not ENTRY_POINT.fullmatch(entry_point):
        raise ValueError(
            f"Got entry_point {entry_point!r}; it must be the name of a function, or a path such "
            "as Solution().name."
        )
    for test in tests:
        try:
            _check_test(test, entry_point)
        except RecursionError:
            raise ValueError("Got a test that is nested too deep to be run.") from None
    if len({isinstance(test, Mapping) and "stdin" in test for test in tests}) > 1:
        raise ValueError("Got tests of a script beside tests of functions; a row has one of them.")


def _check_test(test: Test, entry_point: str | None) -> None:
    if isinstance(test, str):
        statement(test, entry_point)
    else:
        _check_data(test, entry_point)


def _check_data(test: Mapping[str, Any], entry_point: str | None) -> None:
    keys = set(test)
    if keys - {"compare"} == {"stdin", "stdout"}:
        if not isinstance(test["stdin"], str) or not isinstance(test["stdout"], str):
            raise ValueError(f"Got the test {test!r:.200}; stdin and stdout must be texts.")
        if test.get("compare", "tokens") not in COMPARE:
            raise ValueError(
                f"Got compare={test['compare']!r}; it must be one of {', '.join(COMPARE)}."
            )
        return
    if keys != {"input", "output"} or not isinstance(test["input"], list | tuple):
        raise ValueError(
            f"Got the test {test!r:.200}; it must be a statement, a call with 'input' (a list of "
            "arguments) and 'output', or a script with 'stdin' and 'stdout'."
        )
    if entry_point is None:
        raise ValueError(f"Got the call {test!r:.200} but no entry_point: name the function.")
    for side in ("input", "output"):
        stray = next(_not_json(test[side]), None)
        if stray is not None:
            raise ValueError(
                f"Got a call whose {side} holds {type(stray).__name__} {stray!r:.60}; it must be "
                "what JSON has: null, booleans, numbers, texts, lists and objects."
            )


def _not_json(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _not_json(item)
    elif isinstance(value, Mapping):
        yield from (key for key in value if not isinstance(key, str))
        for item in value.values():
            yield from _not_json(item)
    elif value is not None and type(value) not in (bool, int, float, str):
        yield value


def in_child(tests: Sequence[Test], entry_point: str | None) -> str | None:
    """Why some test of a row must be judged where the program is, or None where none must."""
    for test in tests:
        if isinstance(test, str):
            reason = statement(test, entry_point).in_child
            if reason is not None:
                return reason
    return None


def wanted_names(tests: Sequence[Test], entry_point: str | None) -> frozenset[str]:
    """What a program must define: names that the tests use of it."""
    names = set(re.findall(r"\w+", entry_point or ""))
    for test in tests:
        if isinstance(test, str):
            names |= statement(test, entry_point).names
    return frozenset(names)


@lru_cache(maxsize=4_096)
def statement(source: str, entry_point: str | None) -> Statement:
    """The test that a source holds; see `Statement`."""
    return Statement(source, entry_point)


class Statement:
    """Statements that check a program by assertions.

    Attributes:
        names: Names of the program that they use.
        in_child: Why they must be run where the program is, or None.
    """

    def __init__(self, source: str, entry_point: str | None):
        """Reads the statements.

        Raises:
            ValueError: If they are no Python, or check nothing.
        """
        try:
            tree = ast.parse(source)
            # The compiler refuses more than the parser.
            compile(source, "<test>", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ValueError(f"Got the test {source!r:.200}, which is no Python: {error}") from None
        self.source = source
        self._drop_imports_of_the_program(tree)
        bound = _bound_names(tree)
        self.names = _program_names(tree, bound, entry_point)
        self._functions, self._classes = _to_run(tree)
        self._check = _takes_candidate(tree)
        _refuse_what_checks_nothing(tree, source)
        if self._check and entry_point is None:
            raise ValueError(
                f"Got the test {source!r:.200} but no entry_point: name the function that "
                f"{self._check} is to check."
            )
        if not self.names and not self._check:
            raise ValueError(f"Got the test {source!r:.200}, which uses nothing of the program.")
        _refuse_what_is_never_run(tree)
        _refuse_missing_modules(tree)
        self.in_child = _why_in_child(tree, self.names)
        marked = ast.fix_missing_locations(_Counting(self.names).visit(tree))
        self._code = compile(marked, "<test>", "exec", dont_inherit=True)

    def run(self, found: Mapping[str, Any], candidate: Any, in_place: Any = None) -> int:
        """Runs the statements, and the test functions and classes that they define.

        Args:
            found: What the names of the program mean.
            candidate: What a function `check(candidate)` is called with.
            in_place: Calls a function that may change its arguments.

        Returns:
            How many checks ran.

        Raises:
            BaseException: What a check that fails raises.
        """
        counted = itertools.count()
        namespace: dict[str, Any] = {
            "__name__": "test",
            **found,
            "__check__": lambda: next(counted),
            "__in_place__": in_place or (lambda function, *args, **named: function(*args, **named)),
        }
        unittest.main = lambda *_, **__: None  # type: ignore[misc,assignment]
        exec(self._code, namespace)
        for name in self._functions:
            _call_with_parameters(namespace[name])
        for name in self._classes:
            _run_class(namespace[name])
        if self._check:
            namespace[self._check](candidate)
        return next(counted)

    @staticmethod
    def _drop_imports_of_the_program(tree: ast.Module) -> None:
        kept: list[ast.stmt] = []
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and node.module in PROGRAM_MODULES:
                renamed = [(one.asname, one.name) for one in node.names if one.asname]
                kept += [ast.parse(f"{new} = {old}").body[0] for new, old in renamed]
            elif not (
                isinstance(node, ast.Import)
                and all(one.name in PROGRAM_MODULES and not one.asname for one in node.names)
            ):
                kept.append(node)
        tree.body = kept


def _bound_names(tree: ast.AST) -> set[str]:
    bound: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            bound.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {(one.asname or one.name).partition(".")[0] for one in node.names}
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    return bound


def _program_names(tree: ast.AST, bound: set[str], entry_point: str | None) -> frozenset[str]:
    """Names that neither the test binds nor Python has; a built-in one where it is all there is."""
    loaded = [
        node.id for node in ast.walk(tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    ]  # fmt: skip
    entry = re.match(r"\w*", entry_point or "")
    names = {name for name in loaded if name not in bound and name not in BUILTINS}
    if entry and entry.group() in loaded and entry.group() not in bound:
        names.add(entry.group())
    if not names and not _takes_candidate(tree):
        # `assert sum(10, 15) == 6`: the program's own function has the name of a built-in one.
        called = [
            node.func.id for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        ]  # fmt: skip
        names = {name for name in called[:1] if name in BUILTINS and name not in bound}
    return frozenset(names)


def _to_run(tree: ast.Module) -> tuple[list[str], list[str]]:
    """Test functions and test classes, as test runners find them."""
    functions = [
        node.name for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test")
        and not _is_called(tree, node.name)
    ]  # fmt: skip
    classes = [
        node.name for node in tree.body
        if isinstance(node, ast.ClassDef)
        and (node.name.startswith("Test") or "TestCase" in "".join(map(ast.unparse, node.bases)))
    ]  # fmt: skip
    return functions, classes


def _refuse_what_is_never_run(tree: ast.Module) -> None:
    """Test functions that only a test runner of another kind could call."""
    for node in tree.body:
        if isinstance(node, ast.AsyncFunctionDef) and node.name.startswith("test"):
            raise ValueError(
                f"Got the asynchronous test {node.name}, which is not run: call it by asyncio.run."
            )
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
            needed = len(node.args.args) - len(node.args.defaults)
            marked = "parametrize" in "".join(map(ast.unparse, node.decorator_list))
            if needed > 0 and not marked and not _is_called(tree, node.name):
                raise ValueError(
                    f"Got the test {node.name}, which takes {node.args.args[0].arg!r}, but there "
                    "are no fixtures here: call it, or give it pytest.mark.parametrize."
                )


def _takes_candidate(tree: ast.AST) -> str | None:
    """The function `check(candidate)` of HumanEval, unless the test calls it."""
    for node in getattr(tree, "body", ()):
        if isinstance(node, ast.FunctionDef) and node.name == "check" and node.args.args:
            return None if _is_called(tree, "check") else node.name
    return None


def _is_called(tree: ast.AST, name: str) -> bool:
    return any(
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name
        for node in ast.walk(tree)
    )


def _refuse_what_checks_nothing(tree: ast.AST, source: str) -> None:
    checks = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            if isinstance(node.test, ast.Tuple) and node.test.elts:
                raise ValueError(
                    f"Got the test {source!r:.200}, whose {ast.unparse(node)!r:.80} is true "
                    "whatever the program does: write it without the parentheses."
                )
            checks += not _always_true(node.test)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Compare):
            raise ValueError(
                f"Got the test {source!r:.200}, whose {ast.unparse(node)!r:.80} is compared and "
                "thrown away: write assert before it."
            )
        checks += _is_checking_call(node) or _raises_itself(node)
    if not checks:
        raise ValueError(f"Got the test {source!r:.200}, which checks nothing: it asserts nothing.")


def _always_true(node: ast.expr) -> bool:
    if isinstance(node, ast.Constant | ast.Name | ast.Lambda | ast.GeneratorExp | ast.JoinedStr):
        return not isinstance(node, ast.Name)
    if isinstance(node, ast.BoolOp):
        return isinstance(node.op, ast.Or) and any(map(_always_true, node.values))
    if isinstance(node, ast.List | ast.Set | ast.Tuple):
        return bool(node.elts)
    if isinstance(node, ast.Dict):
        return bool(node.keys)
    return not any(isinstance(part, ast.Name) for part in ast.walk(node))


def _is_checking_call(node: ast.AST) -> bool:
    """Whether it calls an assertion of unittest, numpy.testing, pytest or one's own."""
    if not isinstance(node, ast.Call):
        return False
    name = node.func.attr if isinstance(node.func, ast.Attribute) else None
    if isinstance(node.func, ast.Name):
        name = node.func.id
    return name is not None and (name.startswith("assert") or name == "raises")


def _raises_itself(node: ast.AST) -> bool:
    """Whether a compound statement has a branch that raises: `if f(2) != 4: raise …`."""
    bodies = [getattr(node, part, None) for part in ("body", "orelse")]
    return isinstance(node, ast.If | ast.Try | ast.With) and any(
        isinstance(one, ast.Raise) for body in bodies if body for one in body
    )


def _refuse_missing_modules(tree: ast.AST) -> None:
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [one.name for one in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        for name in {name.partition(".")[0] for name in names}:
            if name not in sys.modules and importlib.util.find_spec(name) is None:
                raise ValueError(
                    f"Got a test that imports {name}, which is not installed here: install it."
                )


def _why_in_child(tree: ast.Module, program: frozenset[str]) -> str | None:
    """What in a test needs the program's own objects, as far as its text tells; see docs."""
    program |= {
        node.args.args[0].arg for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name == "check" and node.args.args
    }  # fmt: skip
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    instances: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            targets = {part.id for one in node.targets for part in ast.walk(one)
                       if isinstance(part, ast.Name)}  # fmt: skip
            if isinstance(node.value, ast.Lambda):
                functions |= targets
            elif _calls_any(node.value, own):
                own |= targets
            elif isinstance(node.value, ast.Name) and node.value.id in program:
                program |= targets
            elif _is_instance(node.value, program, set()):
                instances |= targets
    for node in ast.walk(tree):
        reason = _needs_child(node, program, own, functions, instances)
        if reason is not None:
            return reason
    return None


def _needs_child(
    node: ast.AST, program: frozenset[str], own: set[str], functions: set[str], instances: set[str]
) -> str | None:
    if isinstance(node, ast.Name) and node.id in IN_CHILD_NAMES - program:
        return f"it uses {node.id}"
    if isinstance(node, ast.Import | ast.ImportFrom):
        named = {one.name for one in node.names} | {getattr(node, "module", "") or ""}
        used = {part for name in named for part in name.split(".")} & IN_CHILD_NAMES
        return f"it imports {used.pop()}" if used else None
    if isinstance(node, ast.Attribute) and node.attr in IN_CHILD_ATTRIBUTES:
        return f"it uses {node.attr}"
    if isinstance(node, ast.Await):
        return "it awaits"
    if isinstance(node, ast.ExceptHandler) and node.type and _mentions(node.type, program):
        return "it catches the program's own exception"
    if isinstance(node, ast.ClassDef) and any(_mentions(base, program) for base in node.bases):
        return "it derives from the program's class"
    if isinstance(node, ast.BinOp) and _is_instance(node, program, instances):
        return "it computes with objects of the program"
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        if any(isinstance(op, ast.Is | ast.IsNot) for op in node.ops) and not any(
            isinstance(side, ast.Constant) or (isinstance(side, ast.Name)
                                               and side.id in SINGLE_TYPES)
            for side in sides
        ):  # fmt: skip
            return "it asks whether two objects are one"
        constant = any(isinstance(side, ast.Constant) for side in sides)
        if any(
            _is_instance(side, program, instances) or (_is_member(side, program) and not constant)
            for side in sides
        ):
            return "it compares objects of the program"
    if not isinstance(node, ast.Call):
        return None
    return _call_needs_child(node, program, own, functions, instances)


def _call_needs_child(
    node: ast.Call, program: frozenset[str], own: set[str], functions: set[str], instances: set[str]
) -> str | None:
    arguments = [*node.args, *(named.value for named in node.keywords)]
    name = node.func.id if isinstance(node.func, ast.Name) else ""
    if name in ("isinstance", "issubclass") and any(
        _mentions(one, program, calls=False) for one in arguments[1:]
    ):
        return "it asks for the program's class"
    if _is_checking_call(node) and any(
        _is_instance(one, program, instances)
        or (isinstance(one, ast.Name) and one.id in program and one.id[:1].isupper())
        for one in arguments
    ):
        return "it compares objects of the program"
    if _root(node.func) in program | instances:
        for one in arguments:
            called = {part.func for part in ast.walk(one) if isinstance(part, ast.Call)}
            handed = any(
                isinstance(part, ast.Name) and part.id in functions and part not in called
                for part in ast.walk(one)
            )
            if isinstance(one, ast.Lambda) or handed or _mentions(one, frozenset(own)):
                return "it hands the program a function or an object of its own"
    return None


def _mentions(node: ast.AST, names: frozenset[str], *, calls: bool = True) -> bool:
    if not calls and isinstance(node, ast.Call):
        return False
    return any(isinstance(part, ast.Name) and part.id in names for part in ast.walk(node))


def _calls_any(node: ast.AST, names: set[str] | frozenset[str]) -> bool:
    return any(isinstance(part, ast.Call) and _root(part.func) in names for part in ast.walk(node))


def _root(node: ast.AST) -> str:
    while isinstance(node, ast.Attribute | ast.Call | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def _is_instance(node: ast.AST, program: frozenset[str], instances: set[str]) -> bool:
    """Whether an expression is an object of a program's class: `Point(1, 2)`, or made of such."""
    if isinstance(node, ast.BinOp):
        return any(_is_instance(side, program, instances) for side in (node.left, node.right))
    if isinstance(node, ast.Name):
        return node.id in instances
    return (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        and node.func.id in program and node.func.id[:1].isupper()
    )  # fmt: skip


def _is_member(node: ast.AST, program: frozenset[str]) -> bool:
    """Whether an expression is written like a member of a program's enumeration: `Colour.RED`."""
    return (
        isinstance(node, ast.Attribute) and node.attr[:1].isupper()
        and isinstance(node.value, ast.Name) and node.value.id in program
    )  # fmt: skip


class _Counting(ast.NodeTransformer):
    """Counts checks as they run, and marks calls whose arguments may change in place."""

    def __init__(self, program: frozenset[str]):
        self._program = program

    def visit_Assert(self, node: ast.Assert) -> Any:
        self.generic_visit(node)
        return node if _always_true(node.test) else [_counted(), node]

    def visit_Call(self, node: ast.Call) -> Any:
        self.generic_visit(node)
        if not _is_checking_call(node):
            return node
        both = ast.Tuple([_counted().value, node], ast.Load())
        return ast.Subscript(both, ast.Constant(1), ast.Load())

    def visit_Expr(self, node: ast.Expr) -> Any:
        called = node.value
        self.generic_visit(node)
        if isinstance(called, ast.Call) and isinstance(node.value, ast.Call) and called.args:
            function = ast.Name("__in_place__", ast.Load())
            node.value = ast.Call(function, [called.func, *called.args], called.keywords)
        return node

    def generic_visit(self, node: ast.AST) -> Any:
        raises = _raises_itself(node)
        super().generic_visit(node)
        return [_counted(), node] if raises else node


def _counted() -> ast.Expr:
    return ast.Expr(ast.Call(ast.Name("__check__", ast.Load()), [], []))


def _call_with_parameters(function: Callable[..., Any]) -> None:
    """Calls a test function, once for each set of its pytest parameters."""
    cases: list[dict[str, Any]] = [{}]
    for mark in getattr(function, "pytestmark", ()):
        if mark.name == "parametrize":
            names, values = mark.args[0], mark.args[1]
            names = [name.strip() for name in names.split(",")] if isinstance(names, str) else names
            rows = [getattr(value, "values", value) for value in values]
            rows = [row if len(names) > 1 or row is not value else (row,)
                    for row, value in zip(rows, values, strict=True)]  # fmt: skip
            cases = [
                {**case, **dict(zip(names, row, strict=True))} for case in cases for row in rows
            ]
    for case in cases:
        function(**case)


def _run_class(found: type) -> None:
    if issubclass(found, unittest.TestCase):
        result = unittest.TestResult()
        unittest.defaultTestLoader.loadTestsFromTestCase(found).run(result)
        if not result.wasSuccessful():
            raise AssertionError([text for _, text in (*result.errors, *result.failures)])
        return
    for name in [name for name in vars(found) if name.startswith("test")]:
        instance = found()
        getattr(instance, "setup_method", lambda *_: None)()
        _call_with_parameters(getattr(instance, name))
