"""Tools: calculator, Python in its sandbox, functions of one's own, and tasks around others."""

import os
import pickle
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrl_envs import TokenEnv, make_task
from distrl_envs.grading.code_session import shortened
from distrl_envs.task import Draws, Grade, Problem, Reply, Task, TaskError, Turn, ask
from distrl_envs.tasks.sums import SumsTask
from distrl_envs.tasks.tool_task import ToolTask, called
from distrl_envs.tools import TOOLS, Call, Result, make_tool
from tests.envs.byte_tokenizer import CHAT, byte_tokenizer

OWN = "tests.envs.own_tools"
TIMEOUT = 2.0
CALCULATOR = make_tool("calculator", timeout=TIMEOUT, characters=200)
PYTHON = make_tool("python", timeout=TIMEOUT, characters=200)
SUM = Problem(0, "17 + 20 =", {"left": 17, "right": 20, "result": 37}, "17+20")


def own(name):
    return make_tool(f"{OWN}:{name}", timeout=TIMEOUT, characters=200)


def with_tools(*tools, **config):
    return ToolTask(SumsTask(), tools or ("python", "calculator"), tool_timeout=TIMEOUT, **config)


def replied(task, *completions):
    """The turns of an episode of given completions."""
    turns = []
    for completion in completions:
        turns.append(Turn(completion))
        reply = ask(task, "respond", SUM, turns, Draws(b"x"))
        turns[-1] = Turn(completion, reply)
    return turns


# --- the calculator


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("2 + 3 * 4", "14"),
        ("(2 + 3) / 4", "5/4 = 1.25"),
        ("1 / 3", "1/3 ≈ 0.3333333333"),
        ("-2 / 3", "-2/3 ≈ -0.6666666667"),
        ("0.1 + 0.2", "3/10 = 0.3"),
        ("0.1 + 0.2 - 0.3", "0"),
        ("2 ^ 10 - 2 ** 3", "1016"),
        ("2 ** -2", "1/4 = 0.25"),
        ("7 // 2 + -7 % 3", "5"),
        ("-2 ** 2", "-4"),
        ("3 × 4 ÷ 6 − 1", "1"),
        ("1e3 + 2.5e-1", "4001/4 = 1000.25"),
        ("0.12345678901234567890 * 10 ** 20", "12345678901234567890"),
        ("1 / 10 ** 12", "1/1000000000000 ≈ 0"),
        (" 1_000 \n", "1000"),
        ("2 ** 400 / 3 ** 2 > 1", None),
        ("2 +", None),
        ("", None),
        ("1 / 0", None),
        ("0 ** -1", None),
        ("5 % 0", None),
        ("sqrt(4)", None),
        ("__import__('os').getpid()", None),
        ("[1, 2]", None),
        ("'a' * 9", None),
        ("True + 1", None),
        ("2 ** 0.5", None),
        ("1j", None),
        ("10 ** 10 ** 10", None),
        ("1e999999999", None),
        ("1e-999999999", None),
        ("2 ** 10000 * 2", None),
        ("9" * 2_000, None),
        ("(" * 400 + "1" + ")" * 400, None),
        ("-" * 999 + "1", None),
        ("1\0", None),
        ("\ud800", None),
    ],
)
@pytest.mark.timeout(10)
def test_the_calculator_by_hand(text, shown):
    result = CALCULATOR(text)
    if shown is None:
        assert result.status == "error" and result.text.startswith("[error: ")
    else:
        assert result == Result(shown)


def test_a_long_number_is_shortened():
    result = CALCULATOR("7 ** 3000")
    assert result.status == "cut" and "characters left out" in result.text
    assert len(result.text) < 250 and result.text.endswith(str(7**3000)[-100:])


@given(st.one_of(st.text(), st.text(alphabet="0123456789+-*/().e% ^")))
def test_the_calculator_takes_any_text(text):
    result = CALCULATOR(text)
    assert result.text and result.status in ("ok", "cut", "error")


@given(st.integers(-99, 99), st.integers(1, 99), st.integers(-99, 99))
def test_the_calculator_is_pythons_own_on_whole_numbers(a, b, c):
    text = f"({a}) * {b} - ({c}) // {b} + ({a}) % {b}"
    assert CALCULATOR(text) == Result(str(eval(text)))


# --- Python


def test_what_code_prints_and_its_last_value():
    assert PYTHON("print('a')\n6 * 7") == Result("a\n42")
    assert PYTHON("x = 1") == Result("[no output]")
    assert PYTHON("import sys; print('b', file=sys.stderr)") == Result("b")


def test_state_is_that_of_the_earlier_calls_of_the_episode():
    earlier = (Call("x = 6\nprint('not again')", "ok"), Call("y = 7\n1 / 0\nx = 0", "error"))
    assert PYTHON("print(x * y)", earlier) == Result("42")
    alone = PYTHON("print(x * y)")
    assert alone.status == "error" and "NameError" in alone.text
    hung = (*earlier, Call("import time; time.sleep(60)", "timeout"), Call("exit = 5", "ok"))
    assert PYTHON("exit + x", hung) == Result("11")


def test_the_same_calls_have_the_same_result():
    text = "import random, numpy\nprint(random.random(), numpy.random.rand(), {'a', 'b', 'c', 'd'})"
    other = make_tool("python", timeout=TIMEOUT + 1, characters=200)  # another server
    first = PYTHON(text)
    assert first.status == "ok"
    assert [PYTHON(text), other(text), PYTHON(text)] == [first] * 3
    again = PYTHON("print(random.random())", (Call(text, "ok"),))
    assert again == PYTHON("print(random.random())", (Call(text, "ok"),)) != first


def test_what_is_raised_is_told_without_places_of_this_machine():
    result = PYTHON("import json\njson.loads('{')")
    assert result.status == "error" and '"<block 1>", line 2' in result.text
    assert "JSONDecodeError" in result.text and "site-packages" not in result.text
    assert "/" not in result.text
    assert PYTHON("def f(:").text.splitlines()[-1].startswith("SyntaxError")
    assert PYTHON("raise SystemExit(3)").status == "error"
    assert PYTHON("print(1); exit()") == Result("1")


@pytest.mark.parametrize(
    "text",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import threading; threading.Event().wait()",
    ],
)
def test_code_that_hangs_is_stopped_at_its_deadline(text):
    began = time.monotonic()
    result = PYTHON(text)
    assert time.monotonic() - began < TIMEOUT + 30.0
    assert result == Result("[timeout: the code ran longer than 2 s and was stopped]", "timeout")


@pytest.mark.parametrize(
    "text",
    ["import os; os._exit(0)", "import os; os.abort()", "import ctypes; ctypes.string_at(0)"],
)
def test_code_that_dies_is_told(text):
    assert PYTHON(text) == Result("[died: the code ended its process]", "died")
    assert PYTHON("1 + 1") == Result("2")


def test_an_earlier_call_that_comes_to_no_end_when_it_is_run_again_is_named():
    result = PYTHON("1", (Call("import os; os._exit(0)", "ok"),))
    assert result == Result("[died: code of an earlier call ended its process]", "died")


def test_a_megabyte_is_cut_in_the_middle():
    result = PYTHON("print('start'); print('a' * 1_000_000); print('end')")
    assert result.status == "cut" and len(result.text) < 260
    assert result.text.startswith("start\naaa") and result.text.endswith("aaa\nend")
    assert "[999811 characters left out]" in result.text
    endless = PYTHON("while True: print('b' * 100_000)")
    assert endless.status == "timeout"


def test_a_traceback_behind_a_megabyte_is_seen():
    result = PYTHON("print('a' * 1_000_000)\n1 / 0")
    assert result.status == "error" and result.text.endswith("ZeroDivisionError: division by zero")


def test_memory_and_the_network_have_limits():
    assert "MemoryError" in PYTHON("x = bytearray(1 << 40)").text
    result = PYTHON("import socket; socket.create_connection(('192.0.2.1', 80), 1)")
    assert result.status == "error"


def test_code_cannot_forge_more_than_its_own_reply():
    forged = (
        "import os\nfor fd in range(3, 60):\n  try: os.write(fd, b'{}\\n')\n  except OSError: pass"
    )
    assert PYTHON(forged).status in ("died", "ok")
    assert PYTHON("1 + 1") == Result("2")


@given(st.text(), st.integers(2, 40))
def test_shortened_keeps_start_and_end(text, most):
    kept, cut = shortened(text, most)
    assert cut == (len(text) > most)
    if not cut:
        assert kept == text
    else:
        start, end = text[: most - most // 2], text[len(text) - most // 2 :]
        assert kept == f"{start}\n[{len(text) - most} characters left out]\n{end}"


# --- functions of one's own


def test_a_function_runs_in_a_process_of_its_own():
    assert own("shout")("abc") == Result("ABC")
    assert own("shout")(" ") == Result("[no output]")
    assert own("shout").description == "Write anything; you get it in capitals"
    assert own("process")("").text != str(os.getpid())


def test_a_function_that_hangs_dies_or_says_too_much():
    began = time.monotonic()
    hung = own("hang")("x")
    assert hung == Result("[timeout: the tool ran longer than 2 s and was stopped]", "timeout")
    assert time.monotonic() - began < 60
    assert own("die")("x") == Result("[died: the tool ended its process]", "died")
    long = own("megabyte")("x")
    assert long.status == "cut" and "[999800 characters left out]" in long.text
    assert len(long.text) < 250


def test_a_function_that_raises_tells_the_model_and_one_without_text_the_user():
    assert own("fail")("key") == Result("[error: KeyError: 'no key']", "error")
    with pytest.raises(TypeError, match=rf"{OWN}:number returned 7 \(int\)"):
        own("number")("x")
    task = with_tools(f"{OWN}:number")
    with pytest.raises(TaskError, match=r"ToolTask\.respond\(\).*row 0 failed: TypeError"):
        replied(task, "<tool number>x</tool>")


@pytest.mark.parametrize(
    ("name", "refusal"),
    [
        ("pyton", r"'pyton'; it must be one of calculator, python, or module:function"),
        (f"{OWN}:nothing", "could not be imported"),
        (f"{OWN}:untold", "with a docstring"),
        (7, "Got tool 7"),
    ],
)
def test_tools_that_do_not_exist_are_refused(name, refusal):
    with pytest.raises(ValueError, match=refusal):
        make_tool(name, timeout=1.0, characters=200)


@pytest.mark.parametrize("limits", [{"timeout": 0.0}, {"timeout": float("nan")}, {"characters": 9}])
def test_limits_out_of_bounds_are_refused(limits):
    with pytest.raises(ValueError, match="it must be a"):
        make_tool("python", **{"timeout": 1.0, "characters": 200, **limits})


# --- tasks with tools


@pytest.mark.parametrize(
    ("completion", "call"),
    [
        ("<tool python>1 + 1</tool>", ("python", "1 + 1")),
        ("I try.\n<tool python>\nprint(1)\n</tool> \n", ("python", "\nprint(1)\n")),
        ("<tool a>1</tool> then <tool  b >2</tool>", ("b", "2")),
        ("<tool a>if x < 3 > 2: '<tool b>'</tool>", ("a", "if x < 3 > 2: '<tool b>'")),
        ("no call </tool>", ("", "")),
        ("<tool>1</tool>", ("", "")),
        ("<tool a>1</tool> is 7", None),
        ("<tool a>1", None),
        ("37", None),
        ("", None),
    ],
)
def test_which_call_ends_a_turn(completion, call):
    assert called(completion) == call


def test_an_episode_with_tools():
    task = with_tools(call_cost=0.1)
    turns = replied(
        task,
        "<tool python>total = 17 + 20</tool>",
        "<tool python>total</tool>",
        "<tool calculator>17 + 20</tool>",
        "It is 37.",
    )
    replies = [turn.reply for turn in turns]
    assert replies[:3] == [
        Reply("[no output]", "tool", -0.1), Reply("37", "tool", -0.1), Reply("37", "tool", -0.1)
    ]  # fmt: skip
    assert replies[3] is None
    assert task.grade_turns(SUM, turns, truncated=False) == Grade(1.0, "correct", "37")
    assert task.grade_turns(SUM, turns[:2], truncated=True) == Grade(0.0, "too_long")


def test_calls_that_cannot_be_made():
    task = with_tools()
    (unknown,) = replied(task, "<tool shell>ls</tool>")
    assert unknown.reply == Reply(
        "[unknown tool 'shell'; the tools are: python, calculator]", "tool", status="unknown_tool"
    )
    (long,) = replied(task, f"<tool {'x' * 10_000}>ls</tool>")
    assert long.reply.status == "unknown_tool" and len(long.reply.text) < 120
    (malformed,) = replied(task, "37 </tool>")
    assert malformed.reply.status == "malformed" and "<tool NAME>" in malformed.reply.text


def test_the_last_call_and_the_one_after_it():
    task = with_tools("calculator", calls=2)
    turns = replied(task, *["<tool calculator>37</tool>"] * 3)
    assert [turn.reply.text for turn in turns] == [
        "37", "37\n[no calls are left: answer now]", "[no calls are left]"
    ]  # fmt: skip
    assert [turn.reply.over for turn in turns] == [False, False, True]
    assert turns[-1].reply.status == "no_calls_left"
    assert task.grade_turns(SUM, turns, truncated=False) == Grade(0.0, "no_answer")
    assert task.grade(SUM, "<tool calculator>37</tool>") == Grade(0.0, "no_answer")


def test_state_skips_what_hung_and_keeps_episodes_apart():
    task = with_tools("python")
    turns = replied(
        task,
        "<tool python>x = 1</tool>",
        "<tool python>x = 2\nwhile True: pass</tool>",
        "<tool python>x</tool>",
    )
    assert [turn.reply.status for turn in turns] == ["ok", "timeout", "ok"]
    assert turns[2].reply.text == "1"
    (alone,) = replied(task, "<tool python>x</tool>")
    assert alone.reply.status == "error"


def test_replies_depend_on_their_arguments_alone():
    task = with_tools("python")
    before = [Turn("<tool python>x = [1]</tool>", Reply("[no output]", "tool"))]
    last = [*before, Turn("<tool python>x.append(2); x</tool>")]
    replies = [
        one.respond(SUM, last, Draws(b"any"))
        for one in (task, task, pickle.loads(pickle.dumps(task)), with_tools("python"))
    ]
    assert replies == [Reply("[1, 2]", "tool")] * 4


def test_all_else_is_the_inner_tasks():
    task = make_task("tools", task="sums", tools=["calculator"], split="test", seed=3, largest=9)
    inner = SumsTask("test", seed=3, largest=9)
    assert (task.name, task.split, len(task)) == ("sums+tools", "test", len(inner))
    assert task.problem(5) == inner.problem(5)
    assert task.instruction(SUM).startswith(inner.instruction(SUM))
    assert "- calculator: write an expression" in task.instruction(SUM)
    assert task.describe_splits() == inner.describe_splits()
    assert len({one.grading_key(SUM) for one in (task, inner)}) == 2
    texts = ["37", "<tool calculator>37</tool>", "38", "37"]
    grades = task.grade_many([SUM] * 4, texts, [False, True, False, True])
    assert [grade.status for grade in grades] == ["correct", "too_long", "wrong", "correct"]


def test_rows_are_left_out_with_the_inner_task(tmp_path):
    data = tmp_path / "problems.jsonl"
    rows = [f'{{"problem": "What is {i} + 1?", "answer": "{i + 1}"}}' for i in range(6)]
    data.write_text("\n".join(rows))
    task = make_task("tools", task="math", data=str(data), holdout=0.0)
    fewer = task.without([0, 1])
    assert (len(task), len(fewer)) == (6, 4)
    assert isinstance(fewer, ToolTask) and fewer.problem(0) != task.problem(0)


class Dense(SumsTask):
    has_step_reward = True


@pytest.mark.parametrize(
    ("config", "refusal"),
    [
        ({"task": "mastermind"}, "'mastermind', which has turns of its own"),
        ({"task": Dense()}, "'sums', which has step rewards of its own"),
        ({"task": "smus"}, "Got task 'smus'"),
        ({"task": "sums", "largest": 99}, "largest=99"),
        ({"task": SumsTask(), "largest": 9}, r"finished task and \['largest'\]"),
        ({"tools": "python"}, "must be a list of names"),
        ({"tools": []}, "must be a list of names"),
        ({"tools": ["python", "python"]}, "their names must differ"),
        ({"tools": ["perl"]}, "Got tool 'perl'"),
        ({"calls": 0}, r"calls=0; it must be in 1\.\.64"),
        ({"call_cost": 2.0}, r"call_cost=2\.0; it must be in 0\.\.1"),
        ({"tool_timeout": -1.0}, r"timeout=-1\.0"),
        ({"reply_characters": 10}, "Got 10 characters"),
    ],
)
def test_what_cannot_be_is_refused(config, refusal):
    with pytest.raises(ValueError, match=refusal):
        make_task("tools", **{"task": "sums", **config})


def test_an_episode_in_the_token_environment():
    env = TokenEnv("tools", task_config={"task": "sums"}, tokenizer=byte_tokenizer(CHAT),
                   max_prompt_tokens=2_000, max_completion_tokens=500)  # fmt: skip
    assert env.stop == ("</tool>",)
    env.reset(options={"row": 3})
    result = env.task.problem(3).data["result"]
    infos = []
    for text in (f"<tool python>print({result})</tool>", f"{result}"):
        for token in env.tokenizer.encode(text, add_special_tokens=False):
            *_, info = env.step(token)
        infos.append(info)
    assert infos[0]["reply"] == Reply(str(result), "tool")
    _, reward, terminated, _, info = env.step(env.eos_token_id)
    assert (reward, terminated, info["grade"].status) == (1.0, True, "correct")


def test_the_small_tokenizer_cannot_call_tools_and_says_so():
    with pytest.raises(ValueError, match="</tool>"):
        TokenEnv("tools", task_config={"task": "sums"})


def test_the_registry():
    assert set(TOOLS) == {"calculator", "python"}
    assert issubclass(ToolTask, Task)
