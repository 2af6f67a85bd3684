"""Rows as data sets publish them: paths into nested rows, chats as prompts, formats by name."""

from __future__ import annotations

import base64
import io
import json
import pickle
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from hashlib import blake2b
from typing import Any

_STEP = re.compile(r"\.?([^.\[\]]+)|\[(-?\d+)\]")
ROLES = ("system", "developer", "user", "assistant", "tool")
AS_IT_IS = "as_it_is"
"""Field of a row whose problem says by itself how to answer: no instruction goes around it."""
_ASKS = re.compile(r"\\boxed|####|Answer:")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def check_path(path: str) -> None:
    """Raises ValueError unless a text is a field's name or a path such as `a.b[-1].c`."""
    if not path or "".join(match.group() for match in _STEP.finditer(path)) != path:
        raise ValueError(
            f"Got the field {path!r}; it must be a name, or a path such as prompt[-1].content or "
            "reward_model.ground_truth."
        )


def look_up(row: Mapping[str, Any], path: str) -> Any:
    """What stands at a path, None where nothing does; a text that holds JSON is looked into."""
    if path in row:
        return row[path]
    found: Any = row
    for match in _STEP.finditer(path):
        if isinstance(found, str):
            found = _json(found)
        name, index = match.groups()
        if index is not None:
            inside = isinstance(found, list) and -len(found) <= int(index) < len(found)
            found = found[int(index)] if inside else None
        else:
            found = found.get(name) if isinstance(found, Mapping) else None
    return found


def read_chat(value: Any) -> tuple[str, list[dict[str, str]]]:
    """The last message of a chat, which must be the user's, and the messages before it.

    Args:
        value: A list of `{"role": ..., "content": ...}`, the same as JSON, or a plain text.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(value, str):
        chat = _json(value) if re.match(r'\s*\[\s*\{\s*"(role|content)"', value) else None
        if not isinstance(chat, list):
            return value, []
        value = chat
    messages = [_message(message) for message in value]
    if not messages or messages[-1]["role"] != "user":
        last = f"ends with a message of {messages[-1]['role']!r}" if messages else "is empty"
        raise ValueError(f"holds a chat that {last}; it must end with the user's question")
    if not messages[-1]["content"].strip():
        raise ValueError("holds a chat whose last message is empty")
    return messages[-1]["content"], messages[:-1]


def _message(message: Any) -> dict[str, str]:
    content = message.get("content") if isinstance(message, Mapping) else None
    if isinstance(content, list):  # OpenAI's content parts
        texts = [p.get("text") for p in content if isinstance(p, Mapping)]
        whole = len(texts) == len(content) and all(isinstance(t, str) for t in texts)
        content = "".join(map(str, texts)) if whole else None
    if not isinstance(content, str) or message.get("role") not in ROLES:
        raise ValueError(
            f"holds the message {message!r:.60}; each must have a role ({', '.join(ROLES)}) and a "
            "text as content"
        )
    return {"role": str(message["role"]), "content": content}


@dataclass(frozen=True)
class Format:
    """How a data set is published.

    Attributes:
        name: What `format` in `task_config` calls it.
        tasks: The tasks that can grade it.
        row: From a row as published to one with `problem` and `answer`, or `problem` and `tests`;
            what it raises is a fault of the row.
    """

    name: str
    tasks: tuple[str, ...]
    row: Callable[[Mapping[str, Any]], dict[str, Any]]


def find_format(name: str, task: str) -> Format:
    """A format by its name, in any spelling.

    Raises:
        ValueError: If there is none of this name, or the task cannot grade it.
    """
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    found = FORMATS.get(ALIASES.get(plain, plain))
    if found is None:
        near = NEAREST.get(plain) or next(iter(get_close_matches(plain, FORMATS, 1, 0.5)), None)
        hint = f" The nearest is {near!r}." if near else " Otherwise map the fields by `fields`."
        raise ValueError(f"Got format={name!r}; there are {', '.join(sorted(FORMATS))}.{hint}")
    if found.tasks and task not in found.tasks:
        raise ValueError(
            f"Got format={name!r} for the task {task!r}; rows of this form are for "
            f"{' or '.join(found.tasks)}."
        )
    return found


def _need(row: Mapping[str, Any], *names: str) -> Any:
    """The first of some fields that the row has."""
    for name in names:
        value = look_up(row, name)
        if value is not None:
            return value
    raise ValueError(f"{' or '.join(repr(name) for name in names)} is missing")


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _gsm8k(row: Mapping[str, Any]) -> dict[str, Any]:
    answer = str(_need(row, "answer"))
    _, mark, gold = answer.rpartition("####")
    if not mark:
        raise ValueError("'answer' holds no '####' before the result")
    return {**row, "problem": _need(row, "question", "problem"), "answer": gold.strip()}


def _math(row: Mapping[str, Any]) -> dict[str, Any]:
    answer = row.get("answer")
    if answer is None:
        answer = _boxed(str(_need(row, "solution")))
    return {**row, "problem": _need(row, "problem", "question"), "answer": answer}


def _boxed(solution: str) -> str:
    from distrl_envs.grading.extraction import last_balanced_box

    box = last_balanced_box(solution)
    if box is None:
        raise ValueError("'solution' holds no \\boxed{} with the result")
    return box


def _chat_row(row: Mapping[str, Any], prompt: Any, gold: Any) -> dict[str, Any]:
    """A row whose prompt is a chat or a text, asked as it is where it says how to answer."""
    text, context = read_chat(prompt)
    told = any(_ASKS.search(m["content"]) for m in [*context, {"content": text}])
    return {**row, "problem": prompt, "answer": gold, AS_IT_IS: told}


def _verl(row: Mapping[str, Any]) -> dict[str, Any]:
    prompt, gold = _need(row, "prompt"), _need(row, "reward_model.ground_truth")
    tests = _json(gold) if isinstance(gold, str) else gold
    if isinstance(tests, Mapping) and "inputs" in tests:
        text, _ = read_chat(prompt)
        return {**row, "problem": text, **_input_output(tests)}
    return _chat_row(row, prompt, gold)


def _trl(row: Mapping[str, Any]) -> dict[str, Any]:
    if "chosen" in row or "completion" in row or "messages" in row:
        raise ValueError(
            "it is TRL's preference or supervised form, which has no answer to grade; the form "
            "taken is 'prompt' with 'solution', 'answer' or 'ground_truth'"
        )
    gold = _need(row, "solution", "answer", "ground_truth")
    if isinstance(gold, str) and "\\boxed" in gold:
        gold = _boxed(gold)
    return _chat_row(row, _need(row, "prompt"), gold)


def _humaneval(row: Mapping[str, Any]) -> dict[str, Any]:
    prompt = _need(row, "prompt")
    return {
        **row,
        "problem": f"Complete this Python function:\n\n```python\n{str(prompt).rstrip()}\n```",
        "tests": [_need(row, "test")],
        "entry_point": _need(row, "entry_point"),
    }


def _mbpp(row: Mapping[str, Any]) -> dict[str, Any]:
    """The tests belong to the question: they alone name the function (Austin et al. 2021)."""
    tests = _need(row, "test_list")
    shown = "\n".join(map(str, tests))
    text = _need(row, "text", "prompt")
    problem = f"{text}\n\nYour program must pass these tests:\n\n```python\n{shown}\n```"
    return {**row, "problem": problem, "tests": list(tests)}


def _apps(row: Mapping[str, Any]) -> dict[str, Any]:
    cases = _need(row, "input_output")
    cases = _json(cases) if isinstance(cases, str) else cases
    if not isinstance(cases, Mapping):
        raise ValueError("'input_output' holds no JSON with 'inputs' and 'outputs'")
    text = _with_starter(row, _need(row, "question", "problem"))
    return {**row, "problem": text, **_input_output(cases)}


def _input_output(cases: Mapping[str, Any]) -> dict[str, Any]:
    """Tests in the form of APPS: arguments of `fn_name`, or texts for stdin and from stdout."""
    if not _need(cases, "inputs") or len(_need(cases, "outputs")) != len(cases["inputs"]):
        raise ValueError("its tests have no inputs, or another number of outputs")
    return {"tests": dict(cases), "entry_point": cases.get("fn_name") or None}


def _livecodebench(row: Mapping[str, Any]) -> dict[str, Any]:
    public = _need(row, "public_test_cases")
    public = _json(public) if isinstance(public, str) else public
    tests = list(public or []) + _private(row.get("private_test_cases"))
    if not tests or not all(isinstance(t, Mapping) and "testtype" in t for t in tests):
        raise ValueError("'public_test_cases' holds no JSON list of tests with a 'testtype'")
    calls = {test["testtype"] == "functional" for test in tests}
    name = look_up(row, "metadata.func_name")
    if len(calls) != 1 or (calls == {True} and not name):
        raise ValueError("its tests are of two types, or metadata does not name their function")
    text = _with_starter(row, _need(row, "question_content"))
    return {
        **row,
        "problem": text,
        "tests": tests,
        "entry_point": name if calls == {True} else None,
    }


class _PlainUnpickler(pickle.Unpickler):
    """Reads pickled texts; anything that would import a name is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _private(packed: Any) -> list[Any]:
    """LiveCodeBench's hidden tests: JSON, or base64 of zlib of a pickled text with JSON."""
    if not packed:
        return []
    tests = _json(packed)
    if tests is None:
        try:
            raw = zlib.decompress(base64.b64decode(packed))
            tests = json.loads(_PlainUnpickler(io.BytesIO(raw)).load())
        except Exception as error:
            raise ValueError(f"'private_test_cases' cannot be unpacked: {error}") from error
    return list(tests)


def _with_starter(row: Mapping[str, Any], text: Any) -> str:
    starter = row.get("starter_code")
    if not isinstance(starter, str) or not starter.strip():
        return str(text)
    return f"{text}\n\nStart from this code:\n\n```python\n{starter.rstrip()}\n```"


def _gpqa(row: Mapping[str, Any]) -> dict[str, Any]:
    question, right = str(_need(row, "Question")), str(_need(row, "Correct Answer")).strip()
    wrong = [str(_need(row, f"Incorrect Answer {n}")).strip() for n in (1, 2, 3)]
    # An order that depends on the question alone, so that runs and machines agree on it.
    options = sorted([right, *wrong], key=lambda o: blake2b((question + o).encode()).digest())
    return _multiple(row, question, options, options.index(right))


def _multiple_choice(row: Mapping[str, Any]) -> dict[str, Any]:
    """MMLU (`choices`, a number), MMLU-Pro (`options`, a letter), ARC (labels, `answerKey`)."""
    question, options = str(_need(row, "question")), _need(row, "choices", "options")
    labels: list[Any] = list(LETTERS)
    if isinstance(options, Mapping):
        labels, options = list(_need(options, "label")), _need(options, "text")
    answer = _need(row, "answer", "answerKey", "answer_index")
    if isinstance(answer, str):
        answer = labels.index(answer.strip()) if answer.strip() in labels else -1
    if not 0 <= answer < len(options):
        raise ValueError("the answer is none of the choices")
    return _multiple(row, question, list(options), int(answer))


def _multiple(
    row: Mapping[str, Any], question: str, options: list[Any], right: int
) -> dict[str, Any]:
    shown = "\n".join(f"{LETTERS[i]}) {option}" for i, option in enumerate(options))
    text = f"{question.strip()}\n\n{shown}\n\nAnswer with the letter of the right choice."
    return {**row, "problem": text, "answer": LETTERS[right]}


FORMATS = {
    made.name: made
    for made in (
        Format("gsm8k", ("math", "custom"), _gsm8k),
        Format("math", ("math", "custom"), _math),
        Format("dapo", ("math", "custom"), _verl),
        Format("deepscaler", ("math", "custom"), _math),
        Format("verl", ("math", "code", "custom"), _verl),
        Format("trl", ("math", "custom"), _trl),
        Format("humaneval", ("code", "custom"), _humaneval),
        Format("mbpp", ("code", "custom"), _mbpp),
        Format("apps", ("code", "custom"), _apps),
        Format("livecodebench", ("code", "custom"), _livecodebench),
        Format("gpqa", ("math", "custom"), _gpqa),
        Format("multiplechoice", ("math", "custom"), _multiple_choice),
    )
}
ALIASES = {
    "dapo17k": "dapo", "dapomath17k": "dapo", "deepscalerpreview": "deepscaler",
    "deepscalerpreviewdataset": "deepscaler", "hendrycksmath": "math", "math500": "math",
    "openaihumaneval": "humaneval", "mbppsanitized": "mbpp", "lcb": "livecodebench",
    "gpqadiamond": "gpqa", "mmlu": "multiplechoice", "mmlupro": "multiplechoice",
    "arc": "multiplechoice", "numinamath": "math", "numinamathcot": "math",
}  # fmt: skip
NEAREST = {
    "codecontests": "apps", "codeforces": "apps", "taco": "apps", "alpaca": "trl",
    "sharegpt": "trl", "ultrafeedback": "trl", "dpo": "trl", "sft": "trl", "openr1": "math",
    "orz": "verl", "skywork": "verl", "eurus": "verl", "triviaqa": "gsm8k", "hotpotqa": "gsm8k",
}  # fmt: skip
"""Formats that are not supported, with the supported one that is most like them."""
