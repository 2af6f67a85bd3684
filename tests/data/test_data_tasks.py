import json
import pickle
import re
import sys
from hashlib import blake2b

import gymnasium
import pytest

from distrl_envs import TokenEnv
from distrl_envs.task import SPLITS, distinct_rows
from distrl_envs.tasks import make_task
from distrl_envs.tasks.custom import ScoreError

MATH = [{"problem": f"{n} + {n}?", "answer": str(2 * n)} for n in range(40)]
CALLS = '[{"input": [3], "output": 6}]'
CODE = [
    {"problem": "Double.", "tests": ["assert f(2) == 4"]},
    {"problem": "Double.", "tests": CALLS, "entry_point": "f"},
]
SCORES = """
def length(prompt, completion, row):
    return len(completion) / row["target"]
def broken(prompt, completion, row):
    return 1 / row["zero"]
def endless(prompt, completion, row):
    return float("nan")
def growth(prompt, completion_ids, row):
    return 0.5 * len(completion_ids)
number = 3
"""

HANGS = r"\sum_{n=1}^{10^{9}} \frac{1}{n}"


def make_whole(name, **config):
    """A task whose training split is all of its file."""
    return make_task(name, holdout=0.0, **config)


@pytest.fixture
def math_file(tmp_path):
    return _write(tmp_path / "math.jsonl", MATH)


@pytest.fixture
def scores(tmp_path, monkeypatch):
    (tmp_path / "my_scores.py").write_text(SCORES)
    monkeypatch.syspath_prepend(tmp_path)
    yield _write(tmp_path / "rows.jsonl", [{"problem": "Write.", "target": 4, "zero": 0}])
    sys.modules.pop("my_scores", None)


def test_math_grades_and_asks_for_what_it_grades(math_file):
    task = make_whole("math", data=str(math_file))
    problem = task.problem(3)
    assert problem.data["answer"] == ("6",)
    assert task.instruction(problem).startswith("3 + 3?")
    assert r"\boxed{}" in task.instruction(problem)
    texts = [r"\boxed{6}", r"\boxed{7}", "six", "six"]
    grades = task.grade_many([problem] * 4, texts, [True, False, False, True])
    assert [grade.status for grade in grades] == ["correct", "wrong", "no_answer", "too_long"]


def test_answers_that_mean_the_same_vote_together(math_file):
    task = make_whole("math", data=str(math_file), timeout=1.0)
    assert task.same_answer(r"\sqrt{8}", r"2\sqrt{2}")
    assert not task.same_answer(r"\sqrt{8}", r"3\sqrt{2}")
    assert not task.same_answer(HANGS, "1")  # Undecided is not the same.


def test_prompt_and_pattern_cannot_disagree(math_file):
    with pytest.raises(ValueError, match="instruction"):
        make_whole("math", data=str(math_file), answer_pattern="Answer: (.*)")
    with pytest.raises(ValueError, match="boxed"):
        make_whole("math", data=str(math_file), instruction="{problem} Be brief.")
    with pytest.raises(ValueError, match="problem"):
        make_whole("math", data=str(math_file), instruction="Box it: \\boxed{}")
    task = make_whole(
        "math", data=str(math_file), answer_pattern=r"Answer: (\d+)",
        instruction="{problem} End with 'Answer: ' and the number.",
    )  # fmt: skip
    assert task.grade(task.problem(1), r"\boxed{3} Answer: 2").score == 1.0


def test_any_of_several_golds_is_right(tmp_path):
    rows = [
        {"problem": "roots", "answer": ["-1", 2]},
        {"problem": "one", "answer": "5"},
        {"problem": "huge", "answer": [HANGS, "1"]},
    ]
    path = _write(tmp_path / "several.jsonl", rows)
    task = make_whole("math", data=str(path), timeout=1.0)
    problems = [task.problem(row) for row in (0, 0, 0, 1, 1, 2, 2)]
    answers = ["2", "-1.0", "3", "5", "2", "1", rf"2+{HANGS}"]
    texts = [rf"\boxed{{{answer}}}" for answer in answers]
    statuses = [grade.status for grade in task.grade_many(problems, texts, [False] * 7)]
    assert statuses == ["correct", "correct", "wrong", "correct", "wrong", "correct", "timeout"]
    assert task.grade_many([], [], []) == []


def test_lists_of_golds_are_checked_like_golds(tmp_path):
    rows = [{"problem": "a", "answer": []}, {"problem": "b", "answer": ["1", None]},
            {"problem": "c", "answer": ["1", " "]}, {"problem": "d", "answer": [True]},
            {"problem": "e", "answer": ["1", "2"]}, {"problem": "e", "answer": ["2", "1.0"]},
            {"problem": "f", "answer": ["1", "2"]}, {"problem": "f", "answer": "1"}]  # fmt: skip
    with pytest.raises(ValueError) as caught:
        make_whole("math", data=str(_write(tmp_path / "bad.jsonl", rows)))
    faults = str(caught.value).splitlines()
    assert "6 faults" in faults[0]
    expected = [
        (1, "is empty"), (2, "lists NoneType"), (3, "holds no answer"), (4, "lists bool"),
        (7, "different golds"), (8, "different golds"),
    ]  # fmt: skip
    for line, words in expected:
        assert any(f"bad.jsonl:{line}: " in fault and words in fault for fault in faults)


def test_gold_pattern(tmp_path):
    rows = [{"problem": "a", "answer": "2*3=6\n#### 6"}, {"problem": "b", "answer": "none"}]
    path = _write(tmp_path / "gsm.jsonl", rows)
    pattern = r"####\s*(.+?)\s*$"
    with pytest.raises(ValueError, match=r"gsm.jsonl:2: .*gold_pattern"):
        make_whole("math", data=str(path), gold_pattern=pattern)
    task = make_whole("math", data=str(path), gold_pattern=pattern, on_bad_row="skip")
    assert task.problem(0).data["answer"] == ("6",)


def test_equal_golds_written_differently_are_no_conflict(tmp_path):
    same = [{"problem": "half", "answer": "1/2"}, {"problem": "half", "answer": "0.5"}]
    assert len(make_whole("math", data=str(_write(tmp_path / "a.jsonl", same)))) == 2
    other = [*same, {"problem": "half", "answer": "2"}]
    with pytest.raises(ValueError, match="3 faults"):
        make_whole("math", data=str(_write(tmp_path / "b.jsonl", other)))


def test_three_splits_by_a_hash_of_the_problem(math_file):
    parts = {split: make_task("math", data=str(math_file), split=split) for split in SPLITS}
    keys = {split: {task.problem(row).key for row in range(len(task))}
            for split, task in parts.items()}  # fmt: skip
    assert keys["train"] | keys["validation"] | keys["test"] == {row["problem"] for row in MATH}
    assert sum(map(len, keys.values())) == len(MATH)
    # 80, 10 and 10 %: by hand, blake2b(key) / 2**64 below .1, below .2, above.
    share = {key: int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big") / 2**64
             for key in (row["problem"] for row in MATH)}  # fmt: skip
    assert keys["validation"] == {key for key, value in share.items() if value < 0.1}
    assert keys["test"] == {key for key, value in share.items() if 0.1 <= value < 0.2}
    counts = ", ".join(f"{split} {len(keys[split])}" for split in SPLITS)
    assert f"{counts}, cut by a hash of the problem (holdout = 0.2)" in (
        parts["test"].describe_splits()
    )


def test_nothing_held_out_is_said_instead_of_serving_training_problems(math_file):
    assert len(make_task("math", data=str(math_file), holdout=0.0)) == len(MATH)
    for split in ("validation", "test"):
        with pytest.raises(ValueError, match="nothing is held out") as caught:
            make_task("math", data=str(math_file), split=split, holdout=0.0)
        assert "split = 'train'" in str(caught.value)
    with pytest.raises(ValueError, match="no problems for the split 'train'"):
        make_task("math", data={"test": str(math_file)})
    with pytest.raises(ValueError, match=r"Got data for \['dev'\]"):
        make_task("math", data={"dev": str(math_file)})


def test_a_file_for_each_split_and_their_overlap(tmp_path, math_file):
    other = [{"problem": f"{n}  + {n}?", "answer": str(2 * n)} for n in range(36, 46)]
    files = {"train": str(math_file), "test": str(_write(tmp_path / "test.jsonl", other))}
    parts = {split: make_task("math", data=files, split=split) for split in SPLITS}
    keys = {split: {task.problem(row).key for row in range(len(task))}
            for split, task in parts.items()}  # fmt: skip
    assert keys["test"] == {f"{n} + {n}?" for n in range(36, 46)}  # The whole file.
    assert not keys["train"] & (keys["test"] | keys["validation"])
    # The hash still cuts validation out of the training file; its share for test stays there.
    assert keys["validation"] | keys["train"] == {f"{n} + {n}?" for n in range(36)}
    overlaps = [
        int(n) for n in re.findall(r"(\d+) problems of the file", parts["train"].describe_splits())
    ]
    assert sum(overlaps) == 4


def test_repeated_problems_are_asked_once_and_counted(tmp_path):
    rows = [MATH[0], MATH[1], MATH[0]]
    task = make_task("math", data={"test": str(_write(tmp_path / "a.jsonl", rows))}, split="test")
    assert "test 2 (1 of 3 rows repeat one)" in task.describe_splits()
    assert distinct_rows(task, 3) == [0, 1]


def test_math_task_pickles(math_file):
    task = pickle.loads(pickle.dumps(make_whole("math", data=str(math_file))))
    assert task.grade(task.problem(5), r"\boxed{10}").score == 1.0


def test_code_reads_both_kinds_of_tests(tmp_path):
    task = make_whole("code", data=str(_write(tmp_path / "code.jsonl", CODE)))
    good = "```python\ndef f(x):\n    return 2 * x\n```"
    bad = "```python\ndef f(x):\n    return x + 2\n```"
    problems = [task.problem(0), task.problem(1)]
    assert [g.score for g in task.grade_many(problems, [good, good], [False] * 2)] == [1.0, 1.0]
    assert [g.score for g in task.grade_many(problems, [bad, bad], [False] * 2)] == [1.0, 0.0]
    assert task.grade(problems[0], "```python\ndef", truncated=True).status == "too_long"


def test_code_faults_name_their_lines(tmp_path):
    rows = [
        *CODE,
        {"problem": "p", "tests": [{"input": [1], "output": 1}]},
        {"problem": "q", "tests": []},
    ]
    path = _write(tmp_path / "code.jsonl", rows)
    with pytest.raises(ValueError, match=r"2 faults(.|\n)*:3: .*entry_point(.|\n)*:4: .*empty"):
        make_whole("code", data=str(path))


def test_custom_scores(scores):
    task = make_whole("custom", data=str(scores), score="my_scores:length")
    problem = task.problem(0)
    assert (task.grade(problem, "ab").score, task.grade(problem, "ab").status) == (0.5, "wrong")
    assert task.grade(problem, "abcd").status == "correct"
    assert pickle.loads(pickle.dumps(task)).grade(problem, "abcd").score == 1.0


@pytest.mark.parametrize("name, reason", [("broken", "ZeroDivisionError"), ("endless", "nan")])
def test_custom_failures_are_reported_with_the_row(scores, name, reason):
    task = make_whole("custom", data=str(scores), score=f"my_scores:{name}")
    with pytest.raises(ScoreError, match=rf"row 0 \(.*rows.jsonl:1\).*{reason}"):
        task.grade(task.problem(0), "text")


@pytest.mark.parametrize("name", ["my_scores:missing", "no_such_module:f", "my_scores:number", "f"])
def test_custom_functions_must_exist(scores, name):
    with pytest.raises(ValueError):
        make_whole("custom", data=str(scores), score=name)


def test_dense_rewards_and_length_penalty(scores):
    task = make_whole("custom", data=str(scores), score="my_scores:length",
                     step_score="my_scores:growth", length_penalty=0.25)  # fmt: skip
    assert task.has_step_reward
    assert task.step_reward(task.problem(0), [7, 8]) == 0.75
    plain = make_whole("custom", data=str(scores), score="my_scores:length")
    assert not plain.has_step_reward


@pytest.mark.parametrize("name", ["math", "code", "custom"])
def test_an_argument_that_no_task_takes_is_named(name, math_file):
    config = {"score": "m:f"} if name == "custom" else {}
    with pytest.raises(ValueError, match="on_bad_rows"):
        make_whole(name, data=str(math_file), on_bad_rows="skip", **config)


def test_environments_are_registered(math_file, scores):
    for name, config in (
        ("Math", {"data": str(math_file), "length_penalty": 0.125, "holdout": 0.0}),
        ("Custom", {"data": str(scores), "score": "my_scores:length", "holdout": 0.0}),
    ):
        env = gymnasium.make(
            f"distrl_envs:distrl/{name}-v0", task_config=config, tokenizer=_tokenizer(),
            max_completion_tokens=3,
        )  # fmt: skip
        _, info = env.reset(seed=0, options={"row": 0})
        rewards = [env.step(4)[1] for _ in range(3)]
        assert rewards[:2] == ([-0.125, -0.125] if name == "Math" else [0.0, 0.0])
        assert info["row"] == 0
    assert "distrl/Code-v0" in gymnasium.registry


def test_the_system_prompt_travels_with_the_task(math_file):
    config = {"data": str(math_file), "system_prompt": "Think in boxes."}
    env = TokenEnv("math", task_config=config, tokenizer=_tokenizer())
    assert env.system_prompt == "Think in boxes."
    with pytest.raises(ValueError, match=r"system_prompt='Mine\.'.*task_config"):
        TokenEnv("math", task_config=config, tokenizer=_tokenizer(), system_prompt="Mine.")
    plain = TokenEnv("math", task_config={"data": str(math_file)}, tokenizer=_tokenizer(),
                     system_prompt="Mine.")  # fmt: skip
    assert plain.system_prompt == "Mine."


def _write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def _tokenizer():
    """A character-level tokenizer of printable ASCII."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    characters = ["<eos>", "<unk>", *map(chr, range(32, 127))]
    words = Tokenizer(WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<unk>"))
    words.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>")


def test_the_longest_prompt_is_checked_before_anything_is_sampled(tmp_path, capsys):
    rows = [{"problem": f"{n}" + " please" * (40 if n == 3 else 0), "answer": str(n)}
            for n in range(6)]  # fmt: skip
    config = {"data": str(_write(tmp_path / "a.jsonl", rows)), "holdout": 0.0,
              "instruction": "{problem} boxed"}  # fmt: skip
    options = {"task_config": config, "tokenizer": _tokenizer(), "max_completion_tokens": 10}
    for limit in ({"max_prompt_tokens": 100}, {"max_prompt_tokens": 512, "window": 110}):
        with pytest.raises(
            ValueError, match=r"row 3 \(.*a.jsonl:4\) has 287 tokens;.* is 100"
        ) as e:
            TokenEnv("math", **options, **limit)
        assert "on_long_prompt = 'skip'" in str(e.value)
        env = TokenEnv("math", **options, **limit, on_long_prompt="skip")
        assert "left out 1 of 6 problems" in capsys.readouterr().err
        answers = [env.task.problem(row).data["answer"][0] for row in range(len(env.task))]
        assert answers == ["0", "1", "2", "4", "5"]
        assert "train 6" in env.task.describe_splits()  # as `distrl train` asks
    assert len(TokenEnv("math", **options, max_prompt_tokens=287).task) == 6
    with pytest.raises(ValueError, match="must be 'error' or 'skip'"):
        TokenEnv("math", **options, on_long_prompt="cut")
    with pytest.raises(ValueError, match="leaves no room for a prompt"):
        TokenEnv("math", **options, window=10)


def test_a_scorer_gets_a_row_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "own_scores.py").write_text(
        "import sys\ndef grow(prompt, completion, row):\n    row['tags'].append(1)\n"
        "    return float(len(row['tags']))\ndef leave(prompt, completion, row):\n    sys.exit(3)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    path = str(_write(tmp_path / "rows.jsonl", [{"problem": "Write.", "tags": []}]))
    task = make_whole("custom", data=path, score="own_scores:grow")
    assert [task.grade(task.problem(0), "x").score for _ in range(2)] == [1.0, 1.0]
    leaving = make_whole("custom", data=path, score="own_scores:leave")
    with pytest.raises(ScoreError, match=r"row 0 \(.*rows.jsonl:1\).*SystemExit: 3"):
        leaving.grade(leaving.problem(0), "x")
    with pytest.raises(ValueError, match="module:name"):
        make_whole("custom", data=path, score="./own_scores.py:grow")
