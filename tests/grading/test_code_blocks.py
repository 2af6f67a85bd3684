import time

import pytest

from distrl_envs.grading.code_blocks import extract_program

F = "def f(x):\n    return 2 * x\n"
FENCED = f"```python\n{F}```\n"
CASES = {
    "label": FENCED,
    "CRLF": FENCED.replace("\n", "\r\n"),
    "version": FENCED.replace("python", "python3.11"),
    "capital": FENCED.replace("python", "Python"),
    "title": FENCED.replace("python", 'python title="f.py"'),
    "braces": FENCED.replace("python", "{.python}"),
    "file": FENCED.replace("python", "python:f.py"),
    "no label": FENCED.replace("python", ""),
    "tildes": FENCED.replace("```", "~~~"),
    "four ticks": FENCED.replace("```", "````"),
    "open": FENCED[:-4],
    "list": "1. So:\n\n" + "".join(f"   {line}\n" for line in FENCED.splitlines()),
    "list, deep": "- So:\n" + "".join(f"      {line}\n" for line in FENCED.splitlines()),
    "quoted": "".join(f"> {line}\n" for line in FENCED.splitlines()),
    "after a tag": f"<answer>\n{FENCED}</answer>",
    "shell first": f"```bash\npip install x\n```\nThen:\n{FENCED}",
    "shell after": f"{FENCED}```sh\npython f.py\n```",
    "output after": f"{FENCED}Output:\n```\n4\n```\n",
    "JSON after": f"{FENCED}```json\n4\n```\n",
    "usage after": f"{FENCED}Use:\n```python\nprint(f(2))\n```\n",
    "draft before": f"```python\ndef f(x): return 0\n```\nBetter:\n{FENCED}",
    "other language after": f"{FENCED}In C:\n```c\nint f(int x) {{ return 2 * x; }}\n```",
    "thought": f"<think>\n```python\ndef f(x): return 0\n```\n</think>\n{FENCED}",
    "thought alone": f"<think>{FENCED}</think> That is it.",
    "inline ticks": f"Call `f` or ```f(2)``` as here:\n\n{FENCED}",
    "no fence": F,
}


@pytest.mark.parametrize("name", CASES)
def test_the_program_is_found(name):
    program = extract_program(CASES[name], None, {"f"})
    scope = {}
    exec(program, scope)
    assert scope["f"](2) == 4


def test_helpers_in_other_blocks_belong_to_it():
    helper = "```python\nimport math\ndef g(x): return math.floor(x)\n```\n"
    use = "```python\nassert f(2.5) == 4\n```\n"
    main = "```python\ndef f(x): return 2 * g(x)\n```\n"
    for text in (helper + main + use, main + helper + use):
        scope = {}
        exec(extract_program(text, "f"), scope)
        assert scope["f"](2.5) == 4
    assert "assert" not in extract_program(helper + main + use, "f")


def test_scripts_take_the_last_block_in_python():
    script = "```python\nprint(2 * int(input()))\n```\nFor example\n```\n2\n```\ngives\n```\n4\n```"
    assert extract_program(script) == "print(2 * int(input()))\n"
    assert extract_program(script.replace("python", "")) == "print(2 * int(input()))\n"


def test_methods_and_classes_are_looked_for():
    text = "```python\nclass Solution:\n    def f(self): pass\n```\n```python\nx = Solution()\n```"
    assert extract_program(text, "f").startswith("class Solution")
    assert extract_program(text, "Solution().f").startswith("class Solution")


def test_unfinished_thinking_holds_no_program():
    text = f"<think>Draft:\n{FENCED}but wait"
    assert extract_program(text, "f") is None
    assert extract_program(text, "f", ignore_unfinished_thinking=False) == F
    assert extract_program("plain prose") is None
    assert extract_program("```bash\nls\n```") is None


@pytest.mark.parametrize(
    "piece",
    ["```", "```\n", "```python\nx\n```\n", "> ", "- ", "<", "`", "1. ", "    ", "~~~\n```\n", "(",
     "```\n((((", "<think>", "```python\n" + "-" * 500 + "1\n```\n", "x=1\n"],
)  # fmt: skip
def test_hostile_texts_take_linear_time(piece):
    def seconds(size):
        text = piece * (size // len(piece))
        started = time.process_time()
        extract_program(text, "f")
        return time.process_time() - started

    assert seconds(100_000) < 4.0
