import os
import pickle
import socket
import time

import psutil
import pytest

from distrl_envs.grading import CodeGrader

DOUBLE = "def f(x):\n    return 2 * x"
TESTS = ["assert f(2) == 4", "assert f(-1) == -2"]
FORKS = """
import os, time
made = refused = 0
for _ in range(200):
    try:
        if os.fork() == 0:
            os.setsid()
            time.sleep(60)
            os._exit(0)
        made += 1
    except OSError:
        refused += 1
"""


@pytest.fixture(scope="module")
def coder():
    return CodeGrader(timeout=10.0, workers=2)


def fenced(program):
    return f"Here it is.\n```python\n{program}\n```\nDone."


GRADES = [
    (DOUBLE, "correct"),
    ("def f(x):\n    return 2 * abs(x)", "wrong"),
    ("def f(x) return", "wrong"),
    ("raise ValueError", "wrong"),
    ("import sys\nsys.exit(0)", "wrong"),
    ("import os\nos._exit(0)", "wrong"),
    ("def f(x):\n    raise SystemExit(0)", "wrong"),
    ("print('4 -2 passed')", "wrong"),
    ("import ctypes\nctypes.string_at(0)", "worker_died"),
]


@pytest.mark.parametrize("program, status", GRADES)
def test_statuses(coder, program, status):
    grade = coder.grade(fenced(program), TESTS)
    assert grade.status == status
    assert grade.score == float(status == "correct")


def test_no_program_and_too_long(coder):
    assert coder.grade("I cannot.", TESTS).status == "no_answer"
    assert coder.grade(fenced("x = 1\n" * 50_000), TESTS).status == "too_long"


def test_calls_compare_plain_values(coder):
    program = "def f(x):\n    return {'a': (x, [x + 0.5]), 'b': None}"
    right = [{"input": [1], "output": {"a": [1, [1.5]], "b": None}}]
    wrong = [{"input": [1], "output": {"a": [1, [1.6]], "b": None}}]
    assert coder.grade(fenced(program), right, "f").status == "correct"
    assert coder.grade(fenced(program), wrong, "f").status == "wrong"
    liar = (
        "class Any:\n    def __eq__(self, other):\n        return True\ndef f(x):\n    return Any()"
    )
    assert coder.grade(fenced(liar), right, "f").status == "wrong"
    assert (
        coder.grade(fenced("def f(x):\n    return True"), [{"input": [1], "output": 1}], "f").score
        == 0
    )


def test_partial_credit():
    half = fenced("def f(x):\n    return 2 * abs(x)")
    assert CodeGrader(partial_credit=True).grade(half, TESTS).score == 0.5
    assert CodeGrader().grade(half, TESTS).score == 0.0


def test_an_endless_loop_is_killed_at_its_deadline():
    started = time.monotonic()
    grade = CodeGrader(timeout=1.0).grade(fenced("while True:\n    pass"), TESTS)
    assert grade.status == "timeout"
    assert time.monotonic() - started < 30.0


def test_ten_gigabytes_are_refused(coder):
    before = _available_bytes()
    grade = coder.grade(fenced("hog = bytearray(10 << 30)\n" + DOUBLE), TESTS)
    assert grade.status == "wrong"
    assert _available_bytes() > before - (1 << 30)


def test_a_gigabyte_of_output_is_thrown_away():
    grader = CodeGrader(timeout=60.0)
    program = "for _ in range(1024):\n    print('x' * (1 << 20))\n" + DOUBLE
    before = _resident_bytes()
    assert grader.grade(fenced(program), TESTS).status == "correct"
    assert _resident_bytes() - before < 64 << 20


def test_a_program_that_keeps_forking_leaves_nothing(coder):
    run = coder.run(FORKS, ["assert made + refused == 200"])
    assert (run.passed, run.end) == (1, "finished")
    assert _programs() == []
    if "processes" in run.isolated or os.geteuid() == 0:
        assert coder.run(FORKS, ["assert made < 10"]).passed == 1


def test_forks_of_a_program_that_hangs_are_killed_too():
    run = CodeGrader(timeout=2.0).run(FORKS + "time.sleep(60)", ["assert made"])
    assert run.end == "timeout"
    assert _programs() == []


def test_files_are_limited(coder):
    program = (
        "try:\n    open('big', 'wb').write(bytes(64 << 20))\n    refused = False\n"
        "except OSError:\n    refused = True"
    )
    assert coder.run(program, ["assert refused"]).passed == 1


def test_network_is_out_of_reach_where_the_system_allows(coder):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)\n"
        program += "reached = True"
        run = coder.run(program, ["assert reached is True"])
    assert run.passed == (0 if "network" in run.isolated else 1)


def test_root_is_left_behind(coder):
    program = "import os\nuser, group = os.getuid(), os.getgid()"
    run = coder.run(program, ["assert user != 0", "assert group != 0"])
    assert run.passed == 2


def test_the_supervisor_is_out_of_reach(coder):
    run = coder.run("import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\n" + DOUBLE, TESTS)
    assert run.end in ("finished", "lost")
    assert run.passed == 0 or run.end == "finished"


def test_imports_of_the_environment_work(coder):
    run = coder.run("import numpy as np, datetime, decimal", ["assert np.ones(3).sum() == 3.0"])
    assert run.passed == 1


def test_grade_many_keeps_the_order(coder):
    programs = [fenced(f"def f(x):\n    return {n} * x") for n in range(5)]
    grades = coder.grade_many(programs, [TESTS] * 5, [None] * 5)
    assert [grade.status == "correct" for grade in grades] == [n == 2 for n in range(5)]


def test_tests_are_checked(coder):
    for tests, entry in (([], None), ([{"input": 1, "output": 2}], "f"), ([{"input": [1]}], "f")):
        with pytest.raises(ValueError):
            coder.grade(fenced(DOUBLE), tests, entry)
    with pytest.raises(ValueError, match="entry_point"):
        coder.grade(fenced(DOUBLE), [{"input": [1], "output": 2}])


def test_pickles_as_its_settings():
    copy = pickle.loads(pickle.dumps(CodeGrader(timeout=2.5, partial_credit=True)))
    assert (copy.timeout, copy.partial_credit) == (2.5, True)


def _programs():
    """Processes of sandboxes that are still there: ours, their servers apart, and orphans.

    Those below another test process, which grades beside this one, are not.
    """
    me = psutil.Process()
    mine = {1, me.pid, *(process.pid for process in me.parents())}
    found = []
    for process in psutil.process_iter():
        try:
            if not _is_sandbox(process) or process.ppid() == me.pid:
                continue
            above = [one for one in process.parents() if one.pid not in mine]
            if all(map(_is_sandbox, above)):
                found.append(process.pid)
        except psutil.NoSuchProcess:
            continue
    return found


def _is_sandbox(process):
    return any(part.endswith("code_sandbox.py") for part in process.cmdline())


def _available_bytes():
    with open("/proc/meminfo") as file:
        fields = dict(line.split(":") for line in file)
    return int(fields["MemAvailable"].split()[0]) << 10


def _resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
