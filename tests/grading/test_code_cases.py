"""The labelled cases of programs by kind, and more of the same kinds."""

import json
from collections import Counter
from pathlib import Path

import pytest

from distrl_envs.grading import CodeGrader
from distrl_envs.grading.code_tests import check_tests, in_child
from distrl_envs.tasks import make_task

CASES = Path(__file__).resolve().parents[3] / "shared" / "data" / "grader_cases.jsonl"
DOUBLE = "def f(x): return 2*x"
TESTS = ["assert f(2)==4"]
FENCE = "```"

# What the labelled cases describe in words, written out.
WRITTEN = {
    "code-forge-nonce": """
import os, sys
frame = sys._getframe()
while frame:
    if 'nonce' in frame.f_locals:
        os.write(frame.f_locals['writing'], (frame.f_locals['nonce'] + ' 1\\n').encode())
        os._exit(0)
    frame = frame.f_back
""",
    "code-frame-tests": """
import sys
def f(x):
    frame = sys._getframe()
    while frame:
        for found in frame.f_locals.values():
            for test in found.get('tests', ()) if isinstance(found, dict) else ():
                if f'f({x})' in str(test):
                    return eval(test.split('==')[1])
        frame = frame.f_back
""",
    "code-dataclass-order": """
import heapq
from dataclasses import dataclass
@dataclass(order=True)
class Item:
    cost: int
def f(x):
    heap = []
    for cost in (5, 2 * x, 9): heapq.heappush(heap, Item(cost))
    return heapq.heappop(heap).cost
""",
    "code-pickle": """
import multiprocessing, pickle
class P:
    def __init__(self, x): self.x = x
def twice(p): return 2 * p.x
def f(x):
    p = pickle.loads(pickle.dumps(P(x)))
    with multiprocessing.Pool(2) as pool:
        return pool.map(twice, [p])[0]
""",
    "code-fence-two-blocks": (
        f"{FENCE}python\ndef helper(x): return 2*x\n{FENCE}\nThen\n"
        f"{FENCE}python\ndef f(x): return helper(x)\n{FENCE}\n"
    ),
    "code-fence-indented": f"1. So:\n\n   {FENCE}python\n   def f(x): return 2*x\n   {FENCE}\n",
    "code-fence-unclosed": f"{FENCE}python\ndef f(x): return 2*x\n",
    "code-tmp": ("open('/tmp/x','w').write('..'); open('/dev/shm/x','wb').write(b'..')\n" + DOUBLE),
    "code-read-data": f"open({str(CASES)!r}).read()\n" + DOUBLE,
    "code-value-numpy-int": "import numpy as np\ndef f(x): return np.multiply(x, 2)",
    "code-value-defaultdict": (
        "from collections import defaultdict\ndef f(x):\n    d = defaultdict(int)\n"
        "    d['a'] = 1\n    return d"
    ),
    "code-value-generator": "def f(x):\n    yield 1; yield 2",
    "code-value-namedtuple": (
        "from collections import namedtuple\nP = namedtuple('P', 'x')\ndef f(x): return P(4)"
    ),
    "code-value-tuple-key": "def f(x): return {(1,2): 3}",
    "code-value-nan": "def f(x): return float('nan')",
}
VALUES = {"4": 4, "{'a':1}": {"a": 1}, "[1,2]": [1, 2], "[4]": [4], "{'(1, 2)':3}": {"(1, 2)": 3},
          "NaN": float("nan")}  # fmt: skip


@pytest.fixture(scope="module")
def coder():
    with CodeGrader(timeout=10.0, workers=1) as grader:
        yield grader


def code_cases():
    if not CASES.is_file():
        return []
    rows = [json.loads(line) for line in CASES.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["area"] == "code grader"]


def outcome(coder, case):
    """What becomes of a case: the status of its grade, or "fault" where its tests are refused."""
    given, name = case["input"], case["id"]
    written = WRITTEN.get(name)
    tests = given.get("tests", TESTS)
    if name == "code-tests-not-json":
        tests = [{"input": [2], "output": __import__("datetime").date(2024, 1, 1)}]
    if "returned" in given:
        tests = [{"input": [2], "output": VALUES[given["expected"]]}]
    entry = "f" if any(isinstance(test, dict) for test in tests) else None
    if name == "code-solution-class":
        entry = "double"
    if name == "code-notest-humaneval":
        entry = "f"
    program = written or given.get("program", DOUBLE)
    completion = f"{FENCE}python\n{program}\n{FENCE}"
    if "completion" in given:
        completion = written or given["completion"]
    try:
        return coder.grade(completion, tests, entry).status
    except ValueError:
        return "fault"


EXPECTED = {
    "error at load, or run the test; wrong": {"fault", "wrong", "unchecked"},
    "fault at load": {"fault"},
    "a grade": {"correct"},
    "correct (or documented)": {"correct"},
    "too_long / no_answer (TRL #4563)": {"no_answer"},
    "correct, or a fault at load for an entry_point that is no name": {"correct"},
    "refused or removed": {"correct"},
    "refused or documented": {"wrong"},
}
"""What the labels allow, of several things the best."""
ELSEWHERE = {"code-partial-timeout": "below, with partial credit"}


@pytest.mark.skipif(not CASES.is_file(), reason="the labelled cases are not here")
def test_the_labelled_cases_by_kind(coder):
    failed = Counter()
    cases = [case for case in code_cases() if case["id"] not in ELSEWHERE]
    assert len(cases) >= 35
    for case in cases:
        allowed = EXPECTED.get(case["expected"], {case["expected"]})
        found = outcome(coder, case)
        if found not in allowed:
            failed[case["kind"], case["id"], found] += 1
    assert not failed


def test_an_endless_or_crashing_test_costs_its_own_share():
    program = (
        "import os\ndef f(x):\n    while x == 3: pass\n    if x == 5: os.abort()\n    return 2*x"
    )
    tests = [f"assert f({n}) == {2 * n}" for n in range(10)]
    with CodeGrader(timeout=3.0, partial_credit=True) as grader:
        grade = grader.grade(program, tests)
        assert (grade.score, grade.status) == (0.8, "timeout")
        assert grader.grade(program, [*tests[:3], tests[5]]).score == 0.75


RIGHT = {
    "annotations": (
        "def f(x: int) -> int: return 2*x\nassert f.__annotations__['x'] is int", TESTS,
    ),
    "dataclass of strings": (
        "from __future__ import annotations\nfrom dataclasses import dataclass, field\n"
        "@dataclass(frozen=True, slots=True)\nclass P:\n    x: list[int] = field("
        "default_factory=list)\ndef f(x): return P([2*x]).x[0]",
        TESTS,
    ),
    "processes": (
        "from concurrent.futures import ProcessPoolExecutor\ndef g(x): return 2*x\n"
        "def f(x):\n    with ProcessPoolExecutor(2) as pool: return list(pool.map(g, [x]))[0]",
        TESTS,
    ),
    "spawned": (
        "import multiprocessing as m\ndef g(x): return 2*x\ndef f(x):\n"
        "    with m.get_context('spawn').Pool(1) as pool: return pool.map(g, [x])[0]",
        TESTS,
    ),
    "typing": (
        "import typing\nclass N(typing.NamedTuple):\n    x: int\n"
        "def f(x): return typing.get_type_hints(N) and N(2*x).x",
        TESTS,
    ),
    "imports in the test": (DOUBLE, ["import numpy as np\nassert np.allclose(f(2), 4.0)"]),
    "pytest in the test": (
        "def f(x):\n    if x < 0: raise ValueError('negative')\n    return 2*x",
        ["import pytest\ndef test_f():\n    with pytest.raises(ValueError, match='neg'): f(-1)",
         "import pytest\n@pytest.mark.parametrize('x, y', [(1, 2), (2, 4)])\n"
         "def test_g(x, y): assert f(x) == y"],
    ),
    "built-in name": ("def sum(a, b): return a + b", ["assert sum(10, 15) == 25"]),
    "in place": ("def f(x): x.sort()", ["x = [3, 1]\nf(x)\nassert x == [1, 3]"]),
    "iterators": (
        "def f(n):\n    while True:\n        yield n; n += 1",
        ["from itertools import islice\nassert list(islice(f(3), 2)) == [3, 4]",
         "g = f(1)\nassert next(g) == 1 and next(g) == 2"],
    ),
    "classes": (
        "class Stack:\n    def __init__(self): self.items = []\n"
        "    def push(self, x): self.items.append(x)\n    def pop(self): return self.items.pop()\n"
        "    def __len__(self): return len(self.items)",
        ["s = Stack()\ns.push(3)\nassert len(s) == 1\nassert s.items == [3]\nassert s.pop() == 3"],
    ),
    "a class of its own dict": (
        "from collections import OrderedDict\nclass Cache(OrderedDict):\n"
        "    def put(self, k, v): self[k] = v",
        ["c = Cache()\nc.put('a', 1)\nassert c.get('a') == 1"],
    ),
    "objects compared": (
        "class P:\n    def __init__(self, x): self.x = x\n"
        "    def __eq__(self, o): return self.x == o.x\n"
        "    def __add__(self, o): return P(self.x + o.x)",
        ["assert P(1) + P(2) == P(3)"],
    ),
    "members of an enumeration": (
        "from enum import Enum\nclass C(Enum):\n    R = 1\ndef f(): return C.R",
        ["assert f() == C.R", "assert f().name == 'R'", "assert C.R.value == 1"],
    ),
    "files of the test": (
        "def f(path): return open(path).read()",
        ["with open('a', 'w') as file: file.write('x')\nassert f('a') == 'x'"],
    ),
    "a tree": (
        "class Node:\n    def __init__(self, v, l=None): self.v, self.l = v, l\n"
        "def f(t): return t.v + f(t.l) if t else 0",
        ["root = Node(1, Node(2))\nassert f(root) == 3\nassert root.l.v == 2",
         "class N:\n    v, l = 3, None\nassert f(N()) == 3"],
    ),
    "a coroutine": ("async def f(x): return 2 * x",
                    ["import asyncio\nassert asyncio.run(f(2)) == 4"]),
    "functions handed over": ("def f(g, x): return g(x)",
                              ["assert f(lambda x: 2 * x, 2) == 4",
                               "import math\nassert f(math.sqrt, 4) == 2.0",
                               "assert f(len, [1]) == 1"]),
    "printed": ("def f(x): print(2*x)",
                ["import io\nfrom contextlib import redirect_stdout\nout = io.StringIO()\n"
                 "with redirect_stdout(out): f(2)\nassert out.getvalue() == '4\\n'"]),
    "plain values": (
        "from collections import Counter, deque\nimport numpy as np\nimport datetime\n"
        "def f(x): return [Counter(x), deque(x), np.int64(3), np.float64(0.5), {1, 2}, (1,), 2**70,"
        " b'a', 1j, float('inf'), datetime.date(2024, 1, 2), frozenset([1]), range(3)]",
        ["import datetime\nfrom collections import deque\n"
         "assert f('ab') == [{'a': 1, 'b': 1}, deque('ab'), 3, 0.5, {1, 2}, (1,), 2**70, b'a', 1j,"
         " float('inf'), datetime.date(2024, 1, 2), {1}, range(3)]"],
    ),
    "imports the program": (DOUBLE, ["from solution import f as g\nassert g(2) == 4"]),
    "unittest": (
        DOUBLE,
        ["import unittest\nclass T(unittest.TestCase):\n    def setUp(self): self.x = 2\n"
         "    def test_a(self): self.assertEqual(f(self.x), 4)\n"
         "if __name__ == '__main__': unittest.main()"],
    ),
    "raises itself": (DOUBLE, ["if f(2) != 4: raise AssertionError('no')"]),
    "exceptions": (
        "import json\ndef f(x): return json.loads(x)",
        ["import json\ntry:\n    f('{')\n    raise AssertionError\n"
         "except json.JSONDecodeError: pass"],
    ),
    "any and in": (DOUBLE, ["assert f(2) in (3, 4)", "assert any(f(x) == 4 for x in range(3))",
                            "assert f(2) is not None", "assert isinstance(f(2), int)"]),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_right_programs_are_right(coder, name):
    program, tests = RIGHT[name]
    run = coder.run(program, tests)
    assert run.passed == len(tests), run


HUMANEVAL = """
METADATA = {'author': 'x'}


def check(candidate):
    assert candidate(2) == 4
    assert True, "This prints if this assert fails 1 (good for debugging!)"
    assert abs(candidate(0.5) - 1.0) < 1e-6
"""


def test_check_is_called_with_the_entry_point(coder):
    assert coder.run(DOUBLE, [HUMANEVAL], "f").passed == 1
    assert coder.run("def f(x): return x + 2", [HUMANEVAL], "f").passed == 0
    with pytest.raises(ValueError, match="entry_point"):
        coder.run(DOUBLE, [HUMANEVAL])


@pytest.mark.parametrize(
    "entry, program",
    [
        ("twice", "class Solution:\n    def twice(self, x): return 2*x"),
        ("Solution().twice", "class Solution:\n    def twice(self, x): return 2*x"),
        ("Solution.twice", "class Solution:\n    def twice(self, x): return 2*x"),
        ("Solution.twice", "class Solution:\n    @staticmethod\n    def twice(x): return 2*x"),
    ],
)
def test_methods_are_entry_points(coder, entry, program):
    assert coder.run(program, [{"input": [2], "output": 4}], entry).passed == 1


STDIN = [
    ("print(2*int(input()))", {"stdin": "2\n", "stdout": "4"}, True),
    ("print(2*int(input()), end=' \\n\\n')", {"stdin": "2", "stdout": "4\n"}, True),
    ("print(4.0)", {"stdin": "2", "stdout": "4"}, False),
    ("print('4 ')", {"stdin": "2", "stdout": "4", "compare": "exact"}, False),
    ("print('a  b')", {"stdin": "", "stdout": "a  b\n", "compare": "exact"}, True),
    ("if __name__ == '__main__':\n    import sys\n    print(sum(map(int, sys.stdin)))",
     {"stdin": "1\n2\n", "stdout": "3"}, True),
    ("import threading\nthreading.Thread(target=lambda: print(4)).start()",
     {"stdin": "", "stdout": "4"}, True),
    ("import os, atexit\natexit.register(os.write, 1, b'4')", {"stdin": "", "stdout": "4"}, True),
    ("print(4)\nraise SystemExit", {"stdin": "", "stdout": "4"}, True),
    ("print(4)\n1/0", {"stdin": "", "stdout": "4"}, False),
    ("from dataclasses import dataclass\nimport pickle\n@dataclass\nclass P:\n    x: int\n"
     "print(pickle.loads(pickle.dumps(P(4))).x)", {"stdin": "", "stdout": "4"}, True),
]  # fmt: skip


@pytest.mark.parametrize("program, test, right", STDIN)
def test_scripts(coder, program, test, right):
    assert coder.run(program, [test, test]).passed == (2 if right else 0)


EQUAL = [
    ("{1, 2}", [2, 1], True),
    ("{1, 2}", [1, 1], False),
    ("[1, 2]", [2, 1], False),
    ("{1: 'a', None: 2, True: 3}", {"1": 3, "null": 2}, True),
    ("{'a': 1}", {"a": 1, "b": 2}, False),
    ("{1: 1, '1': 1}", {"1": 1}, False),
    ("float('inf')", float("inf"), True),
    ("-float('inf')", float("inf"), False),
    ("10**30", 1e30, True),
    ("10**400", 1.0, False),
    ("10**20 + 1", 10**20, False),
    ("True", 1, False),
    ("1", True, False),
    ("1.0000001", 1, True),
    ("__import__('fractions').Fraction(1, 2)", 0.5, True),
    ("__import__('numpy').eye(2)", [[1.0, 0.0], [0.0, 1.0]], True),
    ("map(str, [1, 2])", ["1", "2"], True),
    ("{'a': 1}.keys()", ["a"], True),
    ("b'a'", "a", False),
    ("None", None, True),
    ("object()", None, False),
]


@pytest.mark.parametrize("value, expected, equal", EQUAL)
def test_the_rule_of_equality(coder, value, expected, equal):
    program = f"def f(): return {value}"
    assert coder.run(program, [{"input": [], "output": expected}], "f").passed == equal


FAULTS = [
    (["assert f(2) = 4"], None, "no Python"),
    (["f(2) == 4"], None, "assert before"),
    (["assert (f(2) == 4, 'm')"], None, "parentheses"),
    (["# assert f(2) == 4"], None, "checks nothing"),
    (["x = f(2)"], None, "checks nothing"),
    (["assert True"], None, "checks nothing"),
    (["assert 2 + 2 == 4"], None, "checks nothing"),
    (["assert [f(2) == 4]"], None, "checks nothing"),
    (["assert (f(x) == 4 for x in [2])"], None, "checks nothing"),
    (["y = 4\nassert y == 4"], None, "nothing of the program"),
    (["import no_such_module\nassert f(2) == 4"], None, "no_such_module"),
    (["return f(2)"], None, "no Python"),
    (["async def test_f(): assert f(2) == 4"], None, "asynchronous"),
    (["def test_f(tmp_path): assert f(2) == 4"], None, "fixtures"),
    (["assert f(" + "-" * 5000 + "2) == 4"], None, "no Python|too deep"),
    ([{"input": [2], "output": {1, 2}}], "f", "JSON"),
    ([{"input": [b"a"], "output": 2}], "f", "JSON"),
    ([{"input": [2], "output": 4}], "f(2)", "entry_point"),
    ([{"stdin": "2", "stdout": 4}], None, "texts"),
    ([{"stdin": "2", "stdout": "4", "compare": "near"}], None, "tokens"),
    ([{"stdin": "2", "stdout": "4"}, "assert f(2) == 4"], None, "one of them"),
]


@pytest.mark.parametrize("tests, entry, message", FAULTS)
def test_tests_that_cannot_serve_are_faults(tests, entry, message):
    with pytest.raises(ValueError, match=message):
        check_tests(tests, entry)


def test_a_test_that_ends_without_a_check_is_no_pass(coder):
    tests = ["for y in f(2):\n    assert y == 4"]
    assert coder.grade("def f(x): return [4]", tests).status == "correct"
    grade = coder.grade("def f(x): return []", tests)
    assert (grade.score, grade.status) == (0.0, "unchecked")


def test_rows_that_need_the_program_are_marked_and_refused(tmp_path):
    tests = ["assert f(2) == 4", "assert P(1) == P(1)", "assert f(lambda: 1) == 1",
             "assert abs(f(2) - 4) < 1e-6", "assert sorted(f(2)) == [1]"]  # fmt: skip
    assert [in_child([test], None) is not None for test in tests] == [0, 1, 1, 0, 0]
    rows = [{"problem": f"p{n}", "tests": [test]} for n, test in enumerate(tests)]
    path = tmp_path / "code.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    task = make_task("code", data=str(path), holdout=0.0)
    assert [row["in_child"] is not None for row in task.data.rows] == [0, 1, 1, 0, 0]
    with pytest.raises(ValueError, match=r"2 faults(.|\n)*:2: .*objects(.|\n)*:3: .*function"):
        make_task("code", data=str(path), holdout=0.0, only_outside=True)


PUBLISHED = [
    ({"tests": ["assert f(2) == math.floor(4.2)"], "test_imports": ["import math"],
      "test_setup_code": ""}, DOUBLE),
    ({"tests": ["assert f(two) == 4"], "test_setup_code": "two = 2", "test_imports": []}, DOUBLE),
    ({"tests": HUMANEVAL, "entry_point": "f"}, DOUBLE),
    ({"tests": json.dumps({"inputs": ["2\n"], "outputs": ["4\n"]})}, "print(2*int(input()))"),
    ({"tests": json.dumps({"inputs": [[2]], "outputs": [[4]], "fn_name": "f"})}, DOUBLE),
    ({"tests": json.dumps([{"input": "2", "output": "4", "testtype": "stdin"}])},
     "print(2*int(input()))"),
    ({"tests": json.dumps([{"input": "2", "output": "4", "testtype": "functional"}]),
      "entry_point": "f"}, DOUBLE),
]  # fmt: skip


@pytest.mark.parametrize("row, program", PUBLISHED)
def test_published_forms(tmp_path, row, program):
    path = tmp_path / "code.jsonl"
    path.write_text(json.dumps({"problem": "p", **row}))
    task = make_task("code", data=str(path), holdout=0.0)
    problem = task.problem(0)
    assert task.grade(problem, f"{FENCE}\n{program}\n{FENCE}").status == "correct"
    assert task.grade(problem, f"{FENCE}\ndef f(x): return 5\nprint(5)\n{FENCE}").status == "wrong"
