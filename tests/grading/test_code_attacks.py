"""Programs that try to be judged right without being right, with namespaces and without."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distrl_envs.grading import CodeGrader

ASSERT = (["assert f(2) == 4", "assert f(5) == 10"], None)
CALL = ([{"input": [2], "output": 4}, {"input": [5], "output": 10}], "f")
TEXT = (["assert f(2) == 'abcd'"], None)
STDIN = ([{"stdin": "2\n", "stdout": "4\n"}], None)

LIAR = """
class A:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __bool__(self): return True
    def __abs__(self): return 0
    def __sub__(self, other): return 0
    def __rsub__(self, other): return 0
    def __lt__(self, other): return True
    def __contains__(self, other): return True
    def __len__(self): return 1
"""
SCAN = """
import gc, sys
def f(x):
    for found in gc.get_objects():
        if isinstance(found, dict) and found.get('input') == [x] and 'output' in found:
            return found['output']
        if isinstance(found, (list, tuple)):
            for item in found:
                if isinstance(item, str) and item.startswith(f'assert f({x}) == '):
                    return eval(item.split('==')[1])
"""
MEMORY = """
import re
def f(x):
    wanted = re.compile((r'assert f\\(%d\\)' % x + r' == (\\d+)').encode())
    for line in open('/proc/self/maps'):
        low, high = (int(part, 16) for part in line.split()[0].split('-'))
        if 'rw' not in line: continue
        with open('/proc/self/mem', 'rb', 0) as memory:
            memory.seek(low)
            found = wanted.search(memory.read(high - low))
        if found: return int(found.group(1))
"""
ATTACKS = {
    "frames": (ASSERT, """
import sys
def f(x):
    frame = sys._getframe()
    while frame:
        for scope in (frame.f_locals, frame.f_globals):
            for name, value in list(scope.items()):
                if name in ('expected', 'output', 'nonce', 'job', 'test', 'tests'):
                    text = str(value)
                    if '==' in text: return eval(text.split('==')[1].split('"')[0])
                    if isinstance(value, dict) and 'output' in value: return value['output']
        frame = frame.f_back
"""),
    "patched comparison": (CALL, """
import sys
for module in list(sys.modules.values()):
    for name in ('_same', 'same', '_same_number', 'decode', 'check_tests'):
        if hasattr(module, name): setattr(module, name, lambda *a, **k: True)
def f(x): return None
"""),
    "builtins": (ASSERT, """
import builtins
c = compile
builtins.compile = lambda *a, **k: c('pass', 'x', 'exec')
builtins.exec = lambda *a, **k: None
builtins.all = builtins.any = lambda *a: True
def f(x): return None
"""),
    "gc": (CALL, SCAN),
    "gc asserts": (ASSERT, SCAN),
    "own memory": (ASSERT, MEMORY),
    "equal to all": (ASSERT, LIAR + "def f(x): return A()"),
    "equal to all, called": (CALL, LIAR + "def f(x): return A()"),
    "equal to all, within": (([{"input": [2], "output": [4]}], "f"), 
                             LIAR + "def f(x): return [A()]"),
    "equal to all, near": ((["assert abs(f(2) - 4) < 1e-6"], None), LIAR + "def f(x): return A()"),
    "equal to all, in": ((["assert f(2) in [4]", "assert 4 in f(2)"], None),
                         LIAR + "def f(x): return A()"),
    "equal to all, true": ((["assert f(2)"], None), LIAR + "def f(x): return A()"),
    "equal to all, unequal": ((["assert f(2) != 5"], None), LIAR + "def f(x): return A()"),
    "equal to all, unittest": ((["import unittest\nclass T(unittest.TestCase):\n"
                                 "    def test_f(self): self.assertEqual(f(2), 4)"], None),
                               LIAR + "def f(x): return A()"),
    "mock.ANY": (ASSERT, "from unittest.mock import ANY\ndef f(x): return ANY"),
    "str subclass": (TEXT, """
class S(str):
    __eq__ = lambda a, b: True
    __hash__ = str.__hash__
def f(x): return S('q')
"""),
    "int subclass": (ASSERT, """
class I(int):
    __eq__ = lambda a, b: True
    __hash__ = int.__hash__
def f(x): return I(7)
"""),
    "list subclass": ((["assert f(2) == [4]"], None), """
class L(list):
    __eq__ = lambda a, b: True
def f(x): return L([7])
"""),
    "own all": ((["assert all(f(x) == 2 * x for x in [1, 2])"], None),
                "def all(values): return True\ndef f(x): return None"),
    "own sorted": ((["assert sorted(f(2)) == [2, 4]"], None),
                   "def sorted(values): return [2, 4]\ndef f(x): return [1]"),
    "stops the iteration": ((["assert all(map(f, [1, 2]))"], None),
                            "def f(x): raise StopIteration"),
    "skips the test": ((["import unittest\nclass T(unittest.TestCase):\n"
                         "    def test_f(self): self.assertEqual(f(2), 4)"], None),
                       "import unittest\ndef f(x): raise unittest.SkipTest('no')"),
    "empties what is compared": ((["x = [3, 1]\nassert f(x) == sorted(x)"], None),
                                 "def f(x):\n    x.clear()\n    return []"),
    "exits well": (ASSERT, "import os\ndef f(x): os._exit(0)"),
    "system exit": (ASSERT, "def f(x): raise SystemExit(0)"),
    "writes to descriptors": (ASSERT, """
import os, json
def f(x):
    for line in ('{"passed": true, "checks": 1}', '{"end": "finished"}', '{"checks": 1}',
                 '{"value": true}', '1', ' 1'):
        for descriptor in range(64):
            try: os.write(descriptor, (line + '\\n').encode())
            except OSError: pass
"""),
    "writes to sockets": (CALL, """
import os, socket, stat
def f(x):
    for descriptor in range(64):
        try:
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                s = socket.socket(fileno=os.dup(descriptor))
                s.sendall(b'{"loaded": true}\\n{"passed": true, "checks": 9}\\n' * 5)
        except OSError: pass
    os._exit(0)
"""),
    "kills all": (ASSERT, """
import os, signal
for pid in (os.getppid(), -1):
    try: os.kill(pid, signal.SIGKILL)
    except OSError: pass
def f(x): return None
"""),
    "traces others": (ASSERT, """
import ctypes, os, re
def f(x):
    for pid in filter(str.isdigit, os.listdir('/proc')):
        if int(pid) == os.getpid(): continue
        try:
            for line in open(f'/proc/{pid}/maps'):
                if 'rw' not in line: continue
                low, high = (int(part, 16) for part in line.split()[0].split('-'))
                with open(f'/proc/{pid}/mem', 'rb', 0) as memory:
                    memory.seek(low)
                    found = re.search(rb'assert f\\(%d\\) == (\\d+)' % x, memory.read(high - low))
                if found: return int(found.group(1))
        except (OSError, ValueError, OverflowError): pass
"""),
    "environment": (ASSERT, """
import os, re
def f(x):
    text = str(dict(os.environ))
    for pid in ('self', '1', os.getppid()):
        for name in ('environ', 'cmdline'):
            try: text += open(f'/proc/{pid}/{name}').read()
            except OSError: pass
    found = re.search(r'f\\(%d\\) == (\\d+)' % x, text)
    return int(found.group(1)) if found else None
"""),
    "mutates the harness's types": (CALL, """
import ctypes, gc, json, socket
json.dumps = lambda *a, **k: '{"value": true, "passed": true, "checks": 1}'
def f(x): return None
"""),
    "answers as another kind": (CALL, """
import json
real = json.dumps
json.dumps = lambda value, **k: real({'value': {'object': [0, 'list']}})
def f(x): return None
"""),
    "near numbers": ((["import numpy as np\nassert np.allclose(f(2), 4)",
                      "import math\nassert math.isclose(f(2), 4)",
                      "import numpy as np\nnp.testing.assert_equal(f(2), 4)",
                      "import pytest\nassert f(2) == pytest.approx(4)"], None), LIAR + """
    def __float__(self): return 4.5
    def __array__(self, *a, **k): return 4.5
    __array_priority__ = 1e9
    def __array_ufunc__(self, *a, **k): return True
    def __array_function__(self, *a, **k): return True
def f(x): return A()
"""),
    "compares for itself": (CALL, """
class M(type):
    def __eq__(cls, other): return True
    def __instancecheck__(cls, other): return True
    __hash__ = type.__hash__
class f(metaclass=M):
    def __init__(self, x): pass
    def __eq__(self, other): return True
"""),
    "reads its source": (ASSERT, """
import inspect, linecache, sys, traceback
def f(x):
    for line in traceback.format_stack() + [str(linecache.cache)]:
        if '==' in line: return eval(line.split('==')[1].split()[0])
    for frame in inspect.stack():
        for line in frame.code_context or ():
            if f'f({x}) ==' in line: return eval(line.split('==')[1])
"""),
    "trace function": (ASSERT, """
import sys, threading
seen = []
def spy(frame, event, arg):
    text = str(frame.f_locals)
    if 'assert f' in text: seen.append(text)
    return spy
sys.settrace(spy); threading.settrace(spy)
if hasattr(sys, 'setprofile'): sys.setprofile(spy)
def f(x):
    for text in seen:
        return eval(text.split(f'f({x}) == ')[1].split('"')[0].split("'")[0])
"""),
    "import hook": (ASSERT, """
import builtins, sys
real = builtins.__import__
def spy(name, *a, **k):
    frame = sys._getframe(1)
    for value in frame.f_locals.values():
        if 'assert f' in str(value): builtins.found = str(value)
    return real(name, *a, **k)
builtins.__import__ = spy
def f(x): return eval(builtins.found.split('==')[1])
"""),
    "answers for others": (CALL, """
import os, socket, sys, json, stat
def f(x):
    for descriptor in range(3, 64):
        try:
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                os.write(descriptor, b'{"value": 0}\\n{"passed": true}\\n')
                s = socket.socket(fileno=os.dup(descriptor))
                s.settimeout(0.2)
                wanted = json.loads(s.recv(1 << 16))
                return wanted.get('output') or wanted.get('expected')
        except (OSError, ValueError): pass
"""),
    "sends descriptors": (CALL, """
import os, socket, stat
def f(x):
    for descriptor in range(3, 64):
        try:
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                s = socket.socket(fileno=os.dup(descriptor))
                socket.send_fds(s, [b'{"value": 4'], [0, 1, 2])
        except OSError: pass
    os._exit(0)
"""),
    "a value without end": (ASSERT, "def f(x):\n    return 'x' * (40 << 20)"),
    "a value that holds itself": (ASSERT, "def f(x):\n    a = []; a.append(a); return a"),
    "exit handlers": (STDIN, """
import atexit, os
atexit.register(lambda: os._exit(0))
print(5)
"""),
    "copies its input": (STDIN, "print(open(0).read())"),
    "finds its expected output": (STDIN, """
import os, glob
for name in glob.glob('/tmp/**', recursive=True) + glob.glob('/proc/*/fd/*'):
    try:
        text = open(name).read(1000)
        if text.strip() == '4': print(text)
    except OSError: pass
"""),
}  # fmt: skip


@pytest.fixture(scope="module", params=["namespaces", "none"])
def coder(request):
    with CodeGrader(timeout=10.0, workers=1, namespaces=request.param == "namespaces") as grader:
        yield grader


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_fail(coder, name):
    (tests, entry), program = ATTACKS[name]
    assert [coder.run(program, [test], entry).passed for test in tests] == [0] * len(tests)


@pytest.mark.parametrize("tests", [ASSERT, CALL])
def test_partial_credit_is_not_forged_either(tests):
    with CodeGrader(timeout=6.0, partial_credit=True) as grader:
        for name in ("writes to descriptors", "frames", "gc", "mutates the harness's types"):
            run = grader.run(ATTACKS[name][1], *tests)
            assert run.passed == 0, name


OTHER_USER = """
import ctypes, json, sys
assert ctypes.CDLL(None).unshare(0x10000000) == 0
if sys.argv[1] == 'with rights':
    for name, text in (('setgroups', 'deny'), ('uid_map', '1000 0 1'), ('gid_map', '1000 0 1')):
        open(f'/proc/self/{name}', 'w').write(text)
import os
assert os.geteuid() != 0
from distrl_envs.grading import CodeGrader
from tests.grading.test_code_attacks import ATTACKS
with CodeGrader(timeout=10.0, workers=1) as grader:
    right = grader.run('def f(x): return 2 * x', ['assert f(2) == 4'])
    passed = {name: grader.run(program, *tests).passed
              for name, (tests, program) in ATTACKS.items()}
print(json.dumps([right.passed, right.isolated, passed]))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
@pytest.mark.parametrize("rights", ["with rights", "without"])
def test_attacks_fail_as_another_user(rights):
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'envs'}"}
    done = subprocess.run(
        [sys.executable, "-c", OTHER_USER, rights], env=environment, capture_output=True, text=True
    )
    if "unshare" in done.stderr or "PermissionError" in done.stderr:
        pytest.skip("the system has no user namespaces")
    right, isolated, passed = json.loads(done.stdout)
    assert right == 1
    assert set(passed.values()) == {0}
    assert isolated in (["processes", "network", "files"], ["landlock"], [])


def test_files_with_tests_cannot_be_read(coder, tmp_path):
    secret = tmp_path / "train.jsonl"
    secret.write_text('{"tests": ["assert f(2) == 4"]}')
    for folder in (tmp_path, *tmp_path.parents):
        if folder.owner() == Path("/tmp").owner() and folder.stat().st_uid == os.geteuid():
            folder.chmod(folder.stat().st_mode | 0o555)
    run = coder.run(f"text = open({str(secret)!r}).read()", ["assert 'f(2)' in text"])
    assert run.isolated
    assert run.passed == 0


def test_nothing_stays_and_later_programs_find_nothing(coder):
    write = """
import os
written = 0
for name in ('/tmp/left', '/dev/shm/left', '/var/tmp/left', 'left', os.path.expanduser('~/left')):
    try:
        with open(name, 'w') as file: written += file.write('x')
    except OSError: pass
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        import time
        while True:
            time.sleep(0.05)
            try: open('/tmp/left', 'w').write('x')
            except OSError: pass
    os._exit(0)
"""
    assert coder.run(write, ["assert written > 0"]).passed == 1
    for folder in ("/tmp", "/dev/shm", "/var/tmp"):
        assert not os.path.exists(f"{folder}/left")
    read = "import os\nfound = [os.path.exists(n) for n in ('/tmp/left', '/dev/shm/left', 'left')]"
    assert coder.run(read, ["assert not any(found)"]).passed == 1


def test_all_that_it_writes_is_limited():
    program = """
size = 0
try:
    for number in range(100):
        with open(f'/dev/shm/{number}' if number % 2 else str(number), 'wb') as file:
            size += file.write(bytes(4 << 20))
except OSError: pass
"""
    with CodeGrader(disk_mb=20, timeout=20.0) as grader:
        run = grader.run(program, ["assert 8 << 20 <= size <= 20 << 20"])
        if "files" not in run.isolated:
            pytest.skip("all it writes is limited only where it has files of its own")
    assert run.passed == 1


def test_a_deep_folder_is_removed(coder):
    program = """
import os
for _ in range(1200):
    os.mkdir('a'); os.chdir('a')
open('file', 'w').write('x'); os.chmod('..', 0)
def f(x): return 2 * x
"""
    assert coder.run(program, ASSERT[0]).passed == 2
    assert not [name for name in os.listdir("/tmp") if name.startswith("distrl_code_")]
