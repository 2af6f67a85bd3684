import json
import os

import numpy as np
import pytest
import torch
from ray.rllib.core import COMPONENT_RL_MODULE
from ray.rllib.core.columns import Columns
from ray.rllib.utils.metrics import WEIGHTS_SEQ_NO

from distrl_envs.tokenizers import small_tokenizer
from rllib_distrl.engine import TorchEngine
from rllib_distrl.engine.sampling import sample
from rllib_distrl.engine.weights import content_hash
from rllib_distrl.method.prompt_samplers import PromptRequest
from rllib_distrl.rollout.completion_env_runner import CompletionEnvRunner
from tests.helpers import COUNTDOWN, distrl_config

PROMPTS = [PromptRequest(row, 0) for row in range(4)]


def make_runner(env=None, workers=0, index=0, in_evaluation=False, **rollout):
    config = distrl_config().rollout(**rollout).env_runners(num_env_runners=workers)
    if env is not None:
        config.environment(env[0], env_config=env[1])
    config.validate()
    config.in_evaluation = in_evaluation
    return CompletionEnvRunner(config=config, worker_index=index, num_workers=workers)


def data_env(kind, rows, folder, **task_config):
    """An environment over rows that the tiny model's own tokenizer can read."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "task_config": {"data": str(path), "holdout": 0.0, **task_config},
        "tokenizer": small_tokenizer(),
    }
    return f"distrl_envs:distrl/{kind}-v0", config


@pytest.fixture(scope="module")
def runner():
    return make_runner(temperature=2.0)


def tokens(episodes):
    return [episode.actions.data.tolist() for episode in episodes]


def test_only_the_engine_is_on_the_runners_device():
    runner = make_runner()
    runner._device = torch.device("meta")  # noqa: SLF001  (RLlib's, which asks PyTorch for GPUs)
    runner.make_module()
    assert {parameter.device.type for parameter in runner.module.parameters()} == {"cpu"}
    assert runner._device.type == "meta"  # noqa: SLF001


def test_groups_come_whole_and_in_order(runner):
    report = runner.sample_prompts(PROMPTS, num_generations=3)
    assert report.error is None
    rows = [episode.infos[0]["row"] for episode in report.episodes]
    assert rows == [row for row in range(4) for _ in range(3)]
    assert len({len(episode) for episode in report.episodes}) > 1


def test_what_is_sampled_does_not_depend_on_the_batch(runner):
    together = tokens(runner.sample_prompts(PROMPTS, 3).episodes)
    apart = [tokens(runner.sample_prompts([prompt], 3).episodes) for prompt in reversed(PROMPTS)]
    assert together == [row for group in reversed(apart) for row in group]
    assert together == tokens(make_runner(temperature=2.0, max_batch_size=2)
                              .sample_prompts(PROMPTS, 3).episodes)  # fmt: skip


def test_a_later_visit_samples_anew(runner):
    again = [PromptRequest(prompt.row, 1) for prompt in PROMPTS]
    assert tokens(runner.sample_prompts(PROMPTS, 2).episodes) != tokens(
        runner.sample_prompts(again, 2).episodes
    )


def test_episodes_are_what_the_env_says(runner):
    env = runner.token_env
    for episode in runner.sample_prompts(PROMPTS, 2).episodes:
        _, info = env.reset(options={"row": episode.infos[0]["row"]})
        assert info["prompt_ids"] == episode.infos[0]["prompt_ids"]
        rewards = [env.step(int(token))[1] for token in episode.actions.data]
        np.testing.assert_array_equal(rewards, episode.rewards.data)
        assert episode.is_terminated
        assert episode.infos[-1]["finish_reason"] in ("stop", "length")


def test_logp_is_that_of_a_full_forward_pass(runner):
    policy = runner.module.policy
    for episode in runner.sample_prompts(PROMPTS, 2).episodes:
        prompt, completion = episode.infos[0]["prompt_ids"], episode.actions.data.tolist()
        with torch.no_grad():
            logits = policy(torch.tensor([prompt + completion])).logits[0] / 2.0
        logps = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        expected = logps[torch.arange(len(completion)), torch.tensor(completion)]
        got = torch.tensor(episode.extra_model_outputs[Columns.ACTION_LOGP].data)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
        inputs = episode.extra_model_outputs[Columns.ACTION_DIST_INPUTS].data
        np.testing.assert_array_equal(inputs[:, 0], got)
        assert np.isnan(inputs[:, 1]).all()  # nobody has computed the entropy


def test_rllib_sampling_by_episodes_and_by_steps(runner):
    assert len(runner.sample(num_episodes=5)) == 5
    episodes = runner.sample(num_timesteps=100)
    steps = sum(len(episode) for episode in episodes)
    assert 100 <= steps <= 300
    assert runner.get_metrics()["num_env_steps_sampled"].peek() > 0


def test_without_exploration_sampling_is_greedy(runner):
    first, second = (tokens(runner.sample(num_episodes=3, explore=False)) for _ in range(2))
    env = runner.token_env
    episode = runner.sample(num_episodes=1, explore=False)[0]
    with torch.no_grad():
        prompt = episode.infos[0]["prompt_ids"]
        logits = runner.module.policy(torch.tensor([prompt])).logits[0, -1]
    assert int(logits.argmax()) == int(episode.actions.data[0])
    assert len(first) == len(second) == 3
    assert env.unwrapped.max_completion_tokens >= max(map(len, first))


def test_new_weights_reach_the_engine_also_older_ones(runner):
    state = runner.module.get_state()
    changed = {name: value + 0.01 if value.ndim else value for name, value in state.items()}
    runner.set_state({COMPONENT_RL_MODULE: changed, WEIGHTS_SEQ_NO: 7})
    report = runner.sample_prompts(PROMPTS[:1], 1)
    policy = {name.removeprefix("policy."): torch.tensor(v) for name, v in changed.items()}
    assert (report.weights_version, report.weights_hash) == (7, content_hash(policy))
    runner.set_state({COMPONENT_RL_MODULE: state, WEIGHTS_SEQ_NO: 3})
    report = runner.sample_prompts(PROMPTS[:1], 1)
    policy = {name.removeprefix("policy."): torch.tensor(v) for name, v in state.items()}
    assert (report.weights_version, report.weights_hash) == (3, content_hash(policy))


def test_a_receipt_names_the_weights_and_nothing_is_sampled_with_others(runner):
    state = runner.module.get_state()
    receipt = runner.load_weights({COMPONENT_RL_MODULE: state, WEIGHTS_SEQ_NO: 9})
    policy = {name.removeprefix("policy."): torch.tensor(v) for name, v in state.items()}
    assert receipt[:2] == (9, content_hash(policy))
    assert receipt.process.startswith(f"pid {os.getpid()} on ")
    report = runner.sample_prompts(PROMPTS, 2, weights=receipt[:2])
    assert len(report.episodes) == 8
    assert report.process == receipt.process
    for other in ((8, receipt.hash), (9, "another")):
        report = runner.sample_prompts(PROMPTS, 2, weights=other)
        assert (report.episodes, report.error) == ([], None)
        assert (report.weights_version, report.weights_hash) == receipt[:2]


def test_errors_travel_as_data(runner):
    report = runner.sample_prompts([PromptRequest(-5, 0)], 1)
    assert report.episodes == []
    assert "row -5" in report.error.text


def visited(episodes):
    return [(episode.infos[0]["row"], episode.infos[0]["visit"]) for episode in episodes]


def test_every_validation_sees_the_same_problems():
    runner = make_runner(in_evaluation=True)
    first = runner.sample(num_episodes=5)
    runner.sample(num_timesteps=40)
    second = runner.sample(num_episodes=5)
    assert visited(first) == visited(second) == [(row, 0) for row in range(5)]
    assert tokens(first) == tokens(second)


def test_a_validation_in_rounds_goes_on_until_it_is_forced_to_begin_again():
    runner = make_runner(in_evaluation=True)
    seen = visited(runner.sample(num_timesteps=60)) + visited(runner.sample(num_timesteps=60))
    assert seen == [(row, 0) for row in range(len(seen))]
    assert visited(runner.sample(num_timesteps=1, force_reset=True))[0] == (0, 0)


def test_validation_runners_share_the_problems_of_a_small_data_set(tmp_path):
    rows = [{"problem": f"{n} + {n} =", "answer": str(2 * n)} for n in range(5)]
    env = data_env("Math", rows, tmp_path, data={"validation": str(tmp_path / "rows.jsonl")})
    seen = [
        visited(make_runner(env, 2, index, in_evaluation=True).sample(num_episodes=3))
        for index in (1, 2)
    ]
    assert seen == [[(0, 0), (2, 0), (4, 0)], [(1, 0), (3, 0), (0, 1)]]


def test_runners_that_draw_prompts_by_themselves_never_share_a_random_number():
    runners = [make_runner(workers=2, index=index) for index in (1, 2)]
    visits = [
        {episode.infos[0]["visit"] for episode in runner.sample(num_timesteps=80)}
        for runner in runners
    ]
    assert all(visits)
    assert not visits[0] & visits[1]


def test_a_batch_is_graded_by_all_workers_of_the_grader_at_once(tmp_path):
    rows = [{"problem": f"{n} {n + 1} -> {n + 2}", "answer": "x"} for n in range(8)]
    pattern = {"answer_pattern": "(.+)", "instruction": "{problem}", "workers": 2}
    runner = make_runner(data_env("Math", rows, tmp_path, **pattern), temperature=2.0)
    task = runner.token_env.unwrapped.task
    with task.grader:
        report = runner.sample_prompts([PromptRequest(row, 0) for row in range(8)], 2)
        assert report.error is None
        assert all(worker.jobs for worker in task.grader.pool.workers)
    for episode in report.episodes:
        first, last = episode.infos[0], episode.infos[-1]
        alone = task.grade(task.problem(first["row"]), last["completion"],
                           truncated=last["finish_reason"] == "length")  # fmt: skip
        assert last["grade"] == alone
        assert episode.rewards.data[-1] == alone.score
    statuses = report.metrics["grade_status"]
    assert sum(status.peek() for status in statuses.values()) == 16


SCORES = """
def broken(prompt, completion, row):
    return 1 / row["count"]
"""


def test_a_scorer_that_fails_names_its_row(tmp_path, monkeypatch):
    (tmp_path / "failing_scores.py").write_text(SCORES)
    monkeypatch.syspath_prepend(tmp_path)
    rows = [{"problem": "1 2", "count": 4}, {"problem": "2 3", "count": 0}]
    runner = make_runner(data_env("Custom", rows, tmp_path, score="failing_scores:broken"))
    assert runner.sample_prompts([PromptRequest(0, 0)], 2).episodes[0].rewards.data[-1] == 0.25
    report = runner.sample_prompts([PromptRequest(0, 0), PromptRequest(1, 0)], 2)
    assert report.episodes == []
    assert "row 1" in report.error.text and "rows.jsonl:2" in report.error.text
    assert "ZeroDivisionError" in report.error.text


def test_an_evaluation_asks_no_training_problems_unless_told():
    keys = {}
    for split in (None, "train"):
        env = (COUNTDOWN, {} if split is None else {"split": split})
        runner = make_runner(env, in_evaluation=True)
        keys[split] = {runner.token_env.unwrapped.task.split}
    assert keys == {None: {"validation"}, "train": {"train"}}


class PlainEngine(TorchEngine):
    """Knows nothing of stop strings: what follows one is cut off."""

    stops = False


@pytest.mark.parametrize("decoder", ["compiled", "fast", "generic", None])
def test_nothing_is_sampled_behind_a_stop_string(runner, decoder):
    stopping = make_runner(("distrl_envs:distrl/Countdown-v0", {"stop": ["="]}), temperature=2.0)
    policy, eos = stopping.module.policy, stopping.token_env.unwrapped.eos_token_ids
    made = TorchEngine if decoder else PlainEngine
    # Rows that have ended make room for others.
    engine = made(policy.config, eos, decoder=decoder or "auto", max_batch_size=4)
    engine.load_weights(policy.state_dict(), 0)
    sampled, stream = [], engine.stream

    def watched(*args):
        for place, completion in stream(*args):
            sampled.append(len(completion.tokens))
            yield place, completion

    engine.stream, stopping.engine = watched, engine
    whole = runner.sample_prompts(PROMPTS, num_generations=3).episodes
    cut = stopping.sample_prompts(PROMPTS, num_generations=3)
    assert cut.error is None
    kept = sum(map(len, cut.episodes))
    assert sum(sampled) == kept if decoder else sum(sampled) > kept
    equals = small_tokenizer().get_vocab()["="]
    assert any(equals in ids for ids in tokens(whole))
    for before, after in zip(whole, cut.episodes, strict=True):
        ids = before.actions.data.tolist()
        length = ids.index(equals) + 1 if equals in ids else len(ids)
        assert after.actions.data.tolist() == ids[:length]
        np.testing.assert_allclose(
            after.extra_model_outputs[Columns.ACTION_LOGP].data,
            before.extra_model_outputs[Columns.ACTION_LOGP].data[:length],
            atol=2e-5,
        )
        if equals in ids:
            assert after.infos[-1]["finish_reason"] == "stop"


def test_an_engine_that_samples_another_model_is_refused(monkeypatch):
    def other(logits, *rest):
        return sample(logits * 1.5, *rest)

    monkeypatch.setattr("rllib_distrl.engine.scheduler.sample", other)
    with pytest.raises(ValueError, match="other probabilities than Qwen2ForCausalLM has"):
        make_runner()
