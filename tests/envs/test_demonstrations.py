"""Worked solutions that an environment shows to learners."""

import json

import pytest

from distrl_envs.task import TaskError
from distrl_envs.tasks.countdown import CountdownTask
from distrl_envs.tasks.math import MathTask
from distrl_envs.token_env import TokenEnv
from tests.envs.byte_tokenizer import CHAT, byte_tokenizer


@pytest.mark.parametrize("name", ["countdown", "arithmetic", "sums", "graph_path", "json_record"])
def test_what_is_shown_is_right(name):
    small = () if name == "json_record" else (None,)  # it has no tokenizer of its own
    for tokenizer in (*small, byte_tokenizer(chat_template=CHAT)):
        env = TokenEnv(name, tokenizer=tokenizer, demonstrations=True)
        for row in range(10):
            ids = env.reset(options={"row": row})[1]["demonstration_ids"]
            *_, (_, reward, terminated, _, info) = [env.step(token) for token in ids]
            assert (terminated, info["finish_reason"], reward) == (True, "stop", 1.0)


def test_it_is_always_the_same_of_a_problem_and_part_of_nothing_else():
    env, plain = TokenEnv(demonstrations=True), TokenEnv()
    shown, info = env.reset(options={"row": 3}), plain.reset(options={"row": 3})
    again = TokenEnv(demonstrations=True).reset(options={"row": 3})[1]["demonstration_ids"]
    assert shown[1].pop("demonstration_ids").tolist() == again.tolist()
    assert shown == info


def rows(tmp_path, *solutions):
    file = tmp_path / "rows.jsonl"
    lines = [
        {"problem": f"What is {n} + 1?", "answer": n + 1, "chat": [{"text": text}]}
        for n, text in enumerate(solutions)
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def test_data_has_them_in_a_field(tmp_path):
    file = rows(tmp_path, "So \\boxed{1}", "It is \\boxed{2} <eos>", "\\boxed{3}")
    tokenizer = byte_tokenizer(chat_template=CHAT)
    task = MathTask(file, holdout=0.0, solution="chat[0].text")
    env = TokenEnv(task, tokenizer=tokenizer, demonstrations=True)
    ids = env.demonstration_ids(1).tolist()
    assert tokenizer.decode(ids[:-1]) == "It is \\boxed{2} <eos>"
    assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1
    plain = MathTask(file, holdout=0.0)
    assert task.grading_key(task.problem(0)) == plain.grading_key(plain.problem(0))
    with pytest.raises(ValueError, match=r"rows.jsonl:1: field 'chat\[1\].text' is missing"):
        MathTask(file, holdout=0.0, solution="chat[1].text")
    with pytest.raises(ValueError, match=r"row 1 \(.*:2\) has \d+ tokens, EOS .* is 15"):
        TokenEnv(task, tokenizer=tokenizer, demonstrations=True, max_completion_tokens=15)
    with pytest.raises(ValueError, match=r"'math' has no worked solutions.*solution = 'FIELD'"):
        TokenEnv(plain, tokenizer=tokenizer, demonstrations=True)


def test_a_published_form_may_have_them_beside(tmp_path):
    file = tmp_path / "gsm8k.jsonl"
    row = {"question": "1 + 1?", "answer": "1 + 1 = 2\n#### 2", "worked": "\\boxed{2}"}
    file.write_text(json.dumps(row))
    task = MathTask(file, holdout=0.0, format="gsm8k", solution="worked")
    assert task.worked_solution(task.problem(0)) == "\\boxed{2}"


class Speechless(CountdownTask):
    def worked_solution(self, problem):
        return " "


def test_what_cannot_be_shown():
    with pytest.raises(ValueError, match="'mastermind' replies, and only completions of one turn"):
        TokenEnv("mastermind", demonstrations=True)
    with pytest.raises(TaskError, match=r"Speechless.worked_solution.* on row 2 returned ' '"):
        TokenEnv(Speechless(), demonstrations=True).reset(options={"row": 2})
    env = TokenEnv(demonstrations=True, max_completion_tokens=8)
    with pytest.raises(ValueError, match=r"worked solution of row 0 has .* tokens, EOS included"):
        env.reset(options={"row": 0})
