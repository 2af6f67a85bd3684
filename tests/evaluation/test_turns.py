"""Evaluating in an environment that replies: what is stored, resumed and graded anew."""

import gymnasium
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from transformers import Qwen2ForCausalLM

from distrl_envs.task import Grade
from rllib_distrl.evaluation.evaluate import evaluate_model
from rllib_distrl.evaluation.result import SCHEMA, load_samples, sample_parts
from rllib_distrl.model.loading import load_model
from rllib_distrl.settings import EvalSettings
from tests.evaluation.test_evaluate import assert_same_samples
from tests.evaluation.tiny_evaluation import ENV_ID, FirstNumber, evaluate_tiny
from tests.rollout.turn_tasks import ShortTalk, Talk

TINY = "builtin:countdown-tiny"
SETTINGS = EvalSettings(problems=6, n=3, k=(1,), chunk=2, seed=3, temperature=1.5)


class CountsReplies(ShortTalk):
    """A grader that changed: a hundredth per word of a reply, a half where nothing was cut."""

    def respond(self, problem, turns, draws):
        raise AssertionError("what was replied is stored")

    def grade_turns(self, problem, turns, *, truncated):
        words = sum(len(turn.reply.text.split()) for turn in turns if turn.reply is not None)
        return Grade(words / 100 + (0.0 if truncated else 0.5), f"turns={len(turns)}")


def evaluate(out=None, task="tests.rollout.turn_tasks:Talk", model=TINY, **kwargs):
    env_config = {"task": task, **kwargs.pop("env_config", {})}
    settings = kwargs.pop("settings", SETTINGS)
    return evaluate_model(model, ENV_ID, env_config, settings, out=out, **kwargs)


def played(sample, task, **env_config):
    """The sample's tokens played step by step in an environment of its own."""
    env = gymnasium.make(ENV_ID, task=task, **env_config)
    address = (SETTINGS.seed, sample.row, sample.sample, 0)
    _, info = env.reset(options={"row": sample.row, "address": address})
    replies, prompt = [], len(info["prompt_ids"])
    for at, token in enumerate(sample.token_ids, start=1):
        _, _, terminated, truncated, info = env.step(int(token))
        assert (terminated or truncated) == (at == len(sample.token_ids))
        if "reply" in info:
            replies.append((at, info.get("reply_ids", []), info["reply"]))
    return replies, info, prompt


def assert_as_played(frame, task, **env_config):
    for sample in frame.itertuples():
        replies, last, _ = played(sample, task, **env_config)
        grade = last["grade"]
        assert sample.completion == last["completion"]
        assert sample.finish_reason == last["finish_reason"]
        assert (sample.score, sample.status) == (grade.score, grade.status)
        assert sample.tokens == len(sample.token_ids)
        assert [(r["at"], list(r["ids"])) for r in sample.replies] == [r[:2] for r in replies]
        for stored, (_, _, reply) in zip(sample.replies, replies, strict=True):
            assert {name: stored[name] for name in vars(reply)} == vars(reply)


@pytest.fixture(scope="module")
def whole():
    """The evaluation in memory, texts included."""
    return evaluate().frame


def test_samples_keep_replies_transcript_and_why_they_ended(whole):
    assert_as_played(whole, Talk("test"))
    said = whole[whole["finish_reason"] == "turns"].iloc[0]
    assert [reply["finish"] for reply in said["replies"]] == [None, None, "turns"]
    lines = said["completion"].split("\n")
    assert lines[1::2] == [f"[user] {reply['text']}" for reply in said["replies"]]
    assert said["replies"][1]["reward"] == 0.25
    assert (whole["logp_sum"] < 0).all()


def test_episodes_that_replies_or_the_context_end():
    short = evaluate(task=ShortTalk("test"), settings=SETTINGS.changed(problems=12)).frame
    assert_as_played(short, ShortTalk("test"))
    over = [[reply["over"] for reply in replies] for replies in short["replies"]]
    stopped = (short["finish_reason"] == "stop").tolist()
    assert {(True, 1), (True, 2)} <= {(s, len(o)) for s, o in zip(stopped, over, strict=True)}
    assert [False, True] in over
    limit = {"max_context_tokens": 32}
    narrow = evaluate(env_config=limit).frame
    assert_as_played(narrow, Talk("test"), **limit)
    assert "context" in set(narrow["finish_reason"])


def test_replies_stay_within_the_models_window():
    model = load_model(TINY)
    config = type(model.config).from_dict({**model.config.to_dict(), "max_position_embeddings": 36})
    narrow = Qwen2ForCausalLM(config).eval()
    narrow.load_state_dict(model.state_dict())
    settings = SETTINGS.changed(max_tokens=28)
    frame = evaluate(model=narrow, settings=settings).frame
    for sample in frame.itertuples():
        limits = {"max_completion_tokens": 28, "max_context_tokens": 36}
        replies, _, prompt = played(sample, Talk("test"), **limits)
        assert prompt + sample.tokens + sum(len(ids) for _, ids, _ in replies) <= 36
    assert "context" in set(frame["finish_reason"])
    with pytest.raises(ValueError, match=r"max_context_tokens=37, but the model's window has 36"):
        evaluate(model=narrow, settings=settings, env_config={"max_context_tokens": 37})


def test_a_stored_evaluation_is_resumed_without_sampling_again(tmp_path, whole):
    evaluate(tmp_path, settings=SETTINGS.changed(problems=4))
    before = {part: part.read_bytes() for part in sample_parts(tmp_path)}
    seen = []
    evaluate(tmp_path, on_progress=seen.append)
    assert (seen[0].resumed, seen[-1].samples) == (4, 2 * SETTINGS.n)
    assert {part: part.read_bytes() for part in before} == before
    evaluate(tmp_path / "at_once")
    assert_same_samples(load_samples(tmp_path), load_samples(tmp_path / "at_once"))
    assert load_samples(tmp_path)["completion"].tolist() == whole["completion"].tolist()
    seen.clear()
    evaluate(tmp_path, on_progress=seen.append)
    assert seen[-1].samples == 0
    fewer = Talk("test")
    fewer.max_turns = 2  # By the task, not by a setting.
    with pytest.raises(ValueError, match="max_turns: there 3, now 2"):
        evaluate(tmp_path, task=fewer)


def test_a_grader_that_changed_grades_the_stored_turns_anew(tmp_path, capsys):
    evaluate(tmp_path, task=ShortTalk("test"))
    before = load_samples(tmp_path)
    seen = []
    result = evaluate(tmp_path, task=CountsReplies("test"), on_progress=seen.append)
    assert seen[-1].samples == 0
    assert f"Graded {len(before)} stored samples anew" in capsys.readouterr().err
    after = load_samples(tmp_path)
    for old, new in zip(before.itertuples(), after.itertuples(), strict=True):
        words = sum(len(reply["text"].split()) for reply in old.replies)
        assert new.score == pytest.approx(words / 100 + 0.5 * (old.finish_reason == "stop"))
        ends = [*(reply["at"] for reply in old.replies), old.tokens]
        assert new.status == f"turns={len(set(ends))}"
    assert after["score"].nunique() > 3
    assert result.frame["score"].tolist() == after["score"].tolist()
    graded = ["score", "status", "answer", "grading"]
    for name in set(SCHEMA.names) - {*graded, "replies", "token_ids"}:
        assert before[name].tolist() == after[name].tolist(), name
    for name in ("replies", "token_ids"):
        assert repr(before[name].tolist()) == repr(after[name].tolist())
    evaluate(tmp_path, task=CountsReplies("test"))
    assert "anew" not in capsys.readouterr().err


def test_an_evaluation_of_an_earlier_version_without_replies_is_read(tmp_path):
    class Corrected(FirstNumber):
        """All golds are another."""

        def problem(self, row):
            problem = super().problem(row)
            problem.data["low"] = not problem.data["low"]
            return problem

    evaluate_tiny(tmp_path)
    for part in sample_parts(tmp_path):
        pq.write_table(pq.read_table(part).drop_columns(["replies"]), part)
    before = load_samples(tmp_path)
    assert before["replies"].isna().all()
    seen = []
    evaluate_tiny(tmp_path, on_progress=seen.append)
    evaluate_tiny(tmp_path, task=Corrected(), on_progress=seen.append)
    assert seen[-1].samples == 0
    after = load_samples(tmp_path)
    answered = (before["status"] != "no_answer").to_numpy()
    assert after["score"].tolist() == np.where(answered, 1.0 - before["score"], 0.0).tolist()
    pd.testing.assert_series_equal(after["completion"], before["completion"])
