"""Rollouts in an environment that replies: runner, episodes, learner, whole algorithms."""

import numpy as np
import pytest
import torch
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns

from rllib_distrl.algorithm.registry import algorithm_config
from rllib_distrl.algorithm.wiring import wire_language_model
from rllib_distrl.learner.connector import SequencesFromEpisodes
from rllib_distrl.method.prompt_samplers import PromptRequest
from rllib_distrl.model.sequences import INPUT_IDS
from rllib_distrl.rollout.completion_env_runner import CompletionEnvRunner
from rllib_distrl.settings import RolloutSettings
from tests.helpers import COUNTDOWN, TINY, distrl_config

TALK = "tests.rollout.turn_tasks:Talk"
PROMPTS = [PromptRequest(row, 0) for row in range(6)]


def talking(config, task=TALK, **env_config):
    return config.environment(COUNTDOWN, env_config={"task": task, **env_config})


def make_runner(task=TALK, env_config=None, **rollout):
    config = talking(distrl_config(), task, **(env_config or {})).rollout(**rollout)
    config.validate()
    return CompletionEnvRunner(config=config, worker_index=0, num_workers=0)


def sampled(runner):
    report = runner.sample_prompts(PROMPTS, 12)  # so many that some end early, whoever made TINY
    assert report.error is None, report.error
    return report.episodes


@pytest.fixture(scope="module")
def runner():
    return make_runner(temperature=1.5)


@pytest.fixture(scope="module")
def episodes(runner):
    return sampled(runner)


def whole(episode):
    """Prompt, sampled tokens and replies as they follow each other; where the sampled ones are."""
    ids, places, done = list(episode.infos[0]["prompt_ids"]), [], 0
    tokens = episode.actions.data.tolist()
    for at, reply in [*episode.infos[0].get("replies", ()), (len(tokens), ())]:
        places += range(len(ids), len(ids) + at - done)
        ids += [*tokens[done:at], *reply]
        done = at
    return ids, places


def test_episodes_hold_sampled_tokens_and_say_where_replies_stand(runner, episodes):
    env, turns = runner.token_env.unwrapped, []
    for episode in episodes:
        replies = episode.infos[0].get("replies", ())
        turns.append(1 + len(replies))
        # A number, or two, and the mark behind prompts.
        assert [len(ids) for _, ids in replies] == [2, 3][: len(replies)]
        for number, (at, ids) in enumerate(replies):
            assert episode.actions.data[at - 1] == env.eos_token_id
            info = episode.infos[at]
            assert (info["reply_ids"], info["turn"]) == (list(ids), number + 1)
            assert episode.rewards.data[at - 1] == 0.25
        last = episode.infos[-1]
        answered = episode.actions.data[-1] == env.eos_token_id
        assert episode.rewards.data[-1] == np.float32(last["grade"].score + 0.25 * answered)
        assert [turn.reply is not None for turn in last["turns"]] == [
            *[True] * len(replies),
            answered,
        ]
        if answered and len(episode) < env.max_completion_tokens:
            assert (last["finish_reason"], len(last["turns"])) == ("turns", 3)
    assert {2, 3} <= set(turns)


def test_the_env_gives_the_same_episode_when_it_is_asked_step_by_step(runner, episodes):
    env = runner.token_env
    for episode in episodes[::16]:
        first = episode.infos[0]
        key = (runner.config.seed, first["row"], first["sample"], first["visit"])
        observation, _ = env.reset(options={"row": first["row"], "address": key})
        observations, rewards = [observation], []
        for token in episode.actions.data.tolist():
            observation, reward, *_ = env.step(token)
            observations.append(observation)
            rewards.append(reward)
        np.testing.assert_array_equal(np.float32(rewards), episode.rewards.data)
        np.testing.assert_array_equal(np.array(observations), np.array(episode.observations.data))


def test_logps_are_those_of_a_full_forward_over_all_turns_for_runner_and_learner(runner, episodes):
    module = runner.module
    batch = SequencesFromEpisodes(None, None)(rl_module=None, batch={}, episodes=episodes)
    learner = module.compute_logps(batch[DEFAULT_MODULE_ID])
    for row, episode in enumerate(episodes):
        ids, places = whole(episode)
        assert batch[DEFAULT_MODULE_ID][INPUT_IDS][row, : len(ids)].tolist() == ids
        with torch.no_grad():
            logits = module.policy(torch.tensor([ids])).logits[0] / 1.5
        tokens = torch.from_numpy(episode.actions.data)
        want = logits.log_softmax(-1)[[p - 1 for p in places], tokens]
        got = torch.from_numpy(episode.extra_model_outputs[Columns.ACTION_LOGP].data)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
        torch.testing.assert_close(learner[row, : len(tokens)], want, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"max_batch_size": 4},
        {"task": "tests.rollout.turn_tasks:SlowTalk", "max_batch_size": 5},
    ],
)
def test_neither_batches_nor_decoders_nor_slow_tools_change_an_episode(episodes, options):
    def said(some):
        return [(e.actions.data.tolist(), e.infos[0].get("replies", ())) for e in some]

    assert said(sampled(make_runner(temperature=1.5, **options))) == said(episodes)


def test_limits_end_episodes():
    for episode in sampled(make_runner(temperature=1.5, env_config={"max_turns": 2})):
        assert len(episode.infos[-1]["turns"]) <= 2
    some = sampled(make_runner(temperature=1.5, env_config={"max_context_tokens": 30}))
    assert {"context"} <= {episode.infos[-1]["finish_reason"] for episode in some}
    assert max(len(whole(episode)[0]) for episode in some) <= 30


def test_distrl_trains(ray_session, build):
    algo = build(talking(distrl_config()).rollout(num_generations=4))
    for _ in range(2):
        result = algo.train()
    learner = result["learners"]["default_policy"]
    assert learner["logp_mismatch_max"] < 1.001
    assert result["env_runners"]["episode_return_mean"] > 0.5


@pytest.mark.slow
def test_stock_ppo_trains_with_the_same_module(ray_session, build):
    config = talking(algorithm_config("PPO").debugging(seed=1))
    config.training(train_batch_size_per_learner=400, minibatch_size=200, num_epochs=2)
    rollout = RolloutSettings(max_completion_tokens=24, num_generations=2)
    algo = build(wire_language_model(config, TINY, rollout))
    for _ in range(2):
        result = algo.train()
    learner = result["learners"]["default_policy"]
    assert result["env_runners"]["episode_return_mean"] > 0.5
    assert np.isfinite(learner["policy_loss"])
