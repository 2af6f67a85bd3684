r"""Rows in the form in which data sets are published, and what is refused with its place."""

import base64
import json
import pickle
import zlib

import pandas as pd
import pytest

from distrl_envs.formats import find_format, look_up, read_chat
from distrl_envs.tasks import make_task

DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
    'What is 30 + 4?\n\nRemember to put your answer on its own line after "Answer:".'
)
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": DAPO}]
MATH_ROWS = {
    "gsm8k": ({"question": "May?", "answer": "She sold 48/2=<<48/2=24>>24.\n#### 72"}, "72"),
    "math": (
        {"problem": "Half?", "level": "Level 5", "type": "Algebra",
         "solution": "We have $x=1$. So it is $\\boxed{\\frac{1}{2}}$."}, "\\frac{1}{2}",
    ),
    "dapo-17k": (
        {"data_source": "math_dapo", "prompt": CHAT[1:], "ability": "MATH",
         "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"},
         "extra_info": {"index": "9a9b6eb4"}}, "34",
    ),
    "DeepScaleR": ({"problem": "Roots?", "answer": "-1", "solution": "No box."}, "-1"),
    "verl": (
        {"data_source": "openai/gsm8k", "prompt": CHAT, "ability": "math",
         "reward_model": {"style": "rule", "ground_truth": "34"},
         "extra_info": {"split": "train", "index": 0}}, "34",
    ),
    "trl": ({"prompt": CHAT[1:], "solution": "Thus $\\boxed{34}$."}, "34"),
    "gpqa": (
        {"Question": "Which?", "Correct Answer": "10^-4 eV", "Incorrect Answer 1": "a",
         "Incorrect Answer 2": "b", "Incorrect Answer 3": "c", "Subdomain": "Physics"}, None,
    ),
    "mmlu": ({"question": "Which?", "choices": ["x", "y", "z", "w"], "answer": 2}, "C"),
    "arc": (
        {"question": "Which?", "choices": {"text": ["x", "y"], "label": ["1", "2"]},
         "answerKey": "2"}, "B",
    ),
}  # fmt: skip


def whole(name, path, **config):
    return make_task(name, data=str(path), holdout=0.0, **config)


def write(folder, *rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", [".jsonl", ".parquet", ".json"])
@pytest.mark.parametrize("form", MATH_ROWS)
def test_mathematics_as_published(form, kind, tmp_path):
    row, gold = MATH_ROWS[form]
    path = tmp_path / f"rows{kind}"
    if kind == ".parquet":
        pd.DataFrame([row]).to_parquet(path)
    else:
        path.write_text(json.dumps([row] if kind == ".json" else row))
    task = whole("math", path, format=form)
    problem = task.problem(0)
    answer = problem.data["answer"][0]
    if gold is None:  # The letter before the right option.
        gold = next(line[0] for line in problem.prompt.splitlines() if line.endswith("10^-4 eV"))
    assert answer == gold
    assert task.grade(problem, f"So \\boxed{{{gold}}}").status == "correct"
    assert task.grade(problem, "So \\boxed{35}").status == "wrong"


def test_a_row_that_says_how_to_answer_is_asked_as_it_is(tmp_path):
    path = write(tmp_path, MATH_ROWS["verl"][0])
    task = whole("math", path, format="verl")
    problem = task.problem(0)
    assert task.instruction(problem) == DAPO
    assert task.context(problem) == CHAT[:1]
    assert task.grade(problem, "30 + 4 = 34.\nAnswer: 34").status == "correct"
    own = whole("math", path, format="verl", instruction="{problem} Box it: \\boxed{}")
    assert own.instruction(problem).endswith("Box it: \\boxed{}")
    with pytest.raises(ValueError, match="brings a system message, and so does system_prompt"):
        whole("math", path, format="verl", system_prompt="Mine.")


HUMANEVAL = {
    "task_id": "HumanEval/0", "prompt": 'def f(x):\n    """Doubles x."""\n', "entry_point": "f",
    "canonical_solution": "    return 2 * x\n",
    "test": "METADATA = {}\n\ndef check(candidate):\n    assert candidate(2) == 4\n"
            "    assert candidate(0) == 0\n",
}  # fmt: skip
MBPP = {
    "task_id": 1, "text": "Write a function to double.", "code": "def f(x): return 2 * x",
    "test_list": ["assert f(2) == 4", "assert f(5) == 10"], "test_setup_code": "",
    "challenge_test_list": [],
}  # fmt: skip
APPS = {
    "problem_id": 1, "question": "Double the number.", "starter_code": "",
    "input_output": json.dumps({"inputs": ["2\n", "5\n"], "outputs": ["4\n", "10\n"]}),
}  # fmt: skip
CASES = [{"input": "2\n", "output": "4", "testtype": "stdin"}]
LIVECODEBENCH = {
    "question_title": "Double", "question_content": "Double the number.", "starter_code": "",
    "public_test_cases": json.dumps(CASES), "metadata": "{}",
    "private_test_cases": base64.b64encode(
        zlib.compress(pickle.dumps(json.dumps([{**CASES[0], "input": "5\n", "output": "10"}])))
    ).decode(),
}  # fmt: skip
FUNCTION, SCRIPT = "def f(x):\n    return {} * x", "print({} * int(input()))"


@pytest.mark.parametrize(
    ("form", "row", "program"),
    [
        ("humaneval", HUMANEVAL, FUNCTION),
        ("mbpp", MBPP, FUNCTION),
        ("apps", APPS, SCRIPT),
        ("livecodebench", LIVECODEBENCH, SCRIPT),
    ],
)
def test_programs_as_published(form, row, program, tmp_path):
    task = whole("code", write(tmp_path, row), format=form)
    problem = task.problem(0)
    texts = [f"```python\n{program.format(factor)}\n```" for factor in (2, 3)]
    statuses = [task.grade(problem, text).status for text in texts]
    assert statuses == ["correct", "wrong"]


def test_packed_tests_never_run_anything(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    packed = base64.b64encode(zlib.compress(pickle.dumps(Evil()))).decode()
    row = {**LIVECODEBENCH, "private_test_cases": packed}
    with pytest.raises(ValueError, match=r"rows.jsonl:1: .*cannot be unpacked: it names"):
        whole("code", write(tmp_path, row), format="livecodebench")


@pytest.mark.parametrize(
    ("name", "task", "words"),
    [
        ("codeforces", "code", "nearest is 'apps'"),
        ("gsm8", "math", "nearest is 'gsm8k'"),
        ("alpaca", "math", "nearest is 'trl'"),
        ("humaneval", "math", "rows of this form are for code"),
    ],
)
def test_other_formats_are_refused_with_the_nearest(name, task, words):
    with pytest.raises(ValueError, match=words):
        find_format(name, task)


def test_a_row_in_another_form_is_a_fault_with_its_columns(tmp_path):
    path = write(tmp_path, {"problem": "1+1", "answer": "2"})
    with pytest.raises(ValueError, match=r"rows.jsonl:1: is not in the form 'gsm8k': 'answer' hol"):
        whole("math", path, format="gsm8k")
    with pytest.raises(ValueError, match=r"'prompt' is missing .the row has problem, answer"):
        whole("math", path, format="verl")
    with pytest.raises(ValueError, match="leave one out"):
        whole("math", path, format="gsm8k", fields={"problem": "problem"})


def test_paths_into_rows(tmp_path):
    row = {"prompt": CHAT, "reward_model": {"ground_truth": "34"}, "a.b": 1, "j": '{"k": [5]}'}
    assert look_up(row, "prompt[-1].content") == DAPO
    assert look_up(row, "prompt[7].content") is look_up(row, "reward_model.x") is None
    assert (look_up(row, "a.b"), look_up(row, "j.k[0]")) == (1, 5)
    fields = {"problem": "prompt", "answer": "reward_model.ground_truth"}
    task = whole("math", write(tmp_path, row), fields=fields)
    assert task.context(task.problem(0)) == CHAT[:1]
    assert task.instruction(task.problem(0)).startswith(DAPO)
    with pytest.raises(ValueError, match=r"Got the field 'prompt\[\]'"):
        whole("math", write(tmp_path, row), fields={**fields, "problem": "prompt[]"})
    with pytest.raises(ValueError, match=r"'reward.truth' is missing .the row has prompt, reward_"):
        whole("math", write(tmp_path, row), fields={**fields, "answer": "reward.truth"})


def test_chats():
    assert read_chat("1+1") == ("1+1", [])
    assert read_chat(json.dumps(CHAT)) == (DAPO, CHAT[:1])
    parts = [{"role": "user", "content": [{"type": "text", "text": "1+"}, {"text": "1"}]}]
    assert read_chat(parts) == ("1+1", [])
    for wrong in ([], CHAT[:1], [{"role": "user"}], ["hi"], [{"role": "me", "content": "x"}]):
        with pytest.raises(ValueError):
            read_chat(wrong)


UNEQUALLED = {
    "gsm8k without its pattern": ("It is 3*24=72.\n#### 72", "format = 'gsm8k'"),
    "a solution without a box": ("We have $x=2$, so the answer is 4.", "map the field"),
    "a sentence": ("The answer is even and positive", "no answer that another could equal"),
    "a placeholder": ("proof", "stands for a missing answer"),
    "not a number": (float("nan"), "is missing"),
    "without an end": (float("inf"), "no answer"),
    "a list as text, damaged": ("['1', '2'", "a list as text"),
    "an open brace": ("\\frac{1}{2", "not right itself"),
}


@pytest.mark.parametrize("case", UNEQUALLED)
def test_golds_that_nothing_can_equal_are_faults(case, tmp_path):
    gold, words = UNEQUALLED[case]
    path = write(tmp_path, {"problem": "good", "answer": "1"}, {"problem": "q", "answer": gold})
    with pytest.raises(ValueError) as caught:
        whole("math", path)
    assert "1 faults" in str(caught.value) and "rows.jsonl:2: " in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "gold", ["3 \\text{ or } 5", "\\text{increasing}", "x^2 + 2x", "(1, 2]", "Sunday", "5 apples"]
)
def test_golds_that_are_answers_stay(gold, tmp_path):
    assert len(whole("math", write(tmp_path, {"problem": "q", "answer": gold}))) == 1


def test_a_list_that_csv_holds_as_text_is_a_list(tmp_path):
    pd.DataFrame([{"problem": "q", "answer": ["1", "2"]}]).to_csv(tmp_path / "a.csv")
    task = whole("math", tmp_path / "a.csv")
    assert task.problem(0).data["answer"] == ("1", "2")
