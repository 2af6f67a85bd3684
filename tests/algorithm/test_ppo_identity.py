"""One quantile and no bonus are RLlib's PPO: same targets, same loss, same gradients."""

import copy

import gymnasium
import numpy as np
import pytest
import torch
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.learner.training_data import TrainingData
from ray.rllib.evaluation.postprocessing import Postprocessing

from rllib_distrl import RolloutSettings, wire_language_model
from rllib_distrl.maths.advantages import gae
from rllib_distrl.rollout.completion_env_runner import CompletionEnvRunner
from tests.helpers import COUNTDOWN, TINY, distrl_config
from tests.learner.rig import gradients

SETTINGS = {"gamma": 0.97, "lambda_": 0.9, "clip_param": 0.2, "vf_loss_coeff": 0.7}
TEMPERATURE = 3.0  # Hot, so that completions have different lengths.


def ppo_config():
    config = PPOConfig().environment(COUNTDOWN).env_runners(num_env_runners=0).debugging(seed=1)
    config.training(
        **SETTINGS, vf_clip_param=0.3, entropy_coeff=0.01, train_batch_size_per_learner=100,
        minibatch_size=100, num_epochs=1, lr=1e-3, grad_clip=None,
    )  # fmt: skip
    rollout = RolloutSettings(max_completion_tokens=24, num_generations=2, temperature=TEMPERATURE)
    return wire_language_model(config, TINY, rollout)


def our_config():
    config = distrl_config(
        n_quantiles=1, bonus_coeff=0.0, critic_lambda=0.9, vf_clip_param=0.3, entropy_coeff=0.01,
        whiten_advantages=False, grad_clip=None, init_value=0.0, micro_batch_tokens=120, **SETTINGS,
    )  # fmt: skip
    config.rollout(temperature=TEMPERATURE).validate()
    return config


@pytest.fixture(scope="module")
def episodes_and_learners():
    config = ppo_config()
    runner = CompletionEnvRunner(config=config)
    episodes = runner.sample(num_episodes=12)
    # Rewards that differ, so that advantages do: the tiny model rarely solves anything.
    rng = np.random.default_rng(0)
    for episode in episodes:
        episode.rewards.data[:] = rng.normal(size=len(episode)).astype(np.float32)
    env = gymnasium.make(COUNTDOWN, **config.env_config)
    spaces = {DEFAULT_MODULE_ID: (env.observation_space, env.action_space)}
    theirs = config.build_learner(spaces=spaces)
    ours = our_config().build_learner(spaces=spaces)
    state = theirs.module[DEFAULT_MODULE_ID].state_dict()
    generator = torch.Generator().manual_seed(3)
    state["value_head.weight"] = 0.3 * torch.randn(
        state["value_head.weight"].shape, generator=generator
    )
    theirs.module[DEFAULT_MODULE_ID].load_state_dict(state)
    ours.module[DEFAULT_MODULE_ID].load_state_dict(state, strict=False)
    ours.module[DEFAULT_MODULE_ID].value_initialised.fill_(True)
    return episodes, theirs, ours


def rllib_batch(learner, episodes):
    data = TrainingData(episodes=copy.deepcopy(episodes))  # RLlib's connectors edit episodes.
    made = learner._make_batch_if_necessary(data)  # noqa: SLF001  (RLlib's; its `update` does more)
    return made.policy_batches[DEFAULT_MODULE_ID]


def test_targets_losses_and_gradients_agree(episodes_and_learners):
    episodes, theirs, ours = episodes_and_learners
    batch = rllib_batch(theirs, episodes)
    columns = ours.columns(episodes)
    rollouts = ours.batch_pass(columns, 1).rollouts
    lens = [len(episode) for episode in episodes]

    # Targets: RLlib's columns have an artificial step behind each episode.
    for row, length in enumerate(lens):
        torch.testing.assert_close(
            rollouts.target_quantiles[row, :length, 0],
            batch[Postprocessing.VALUE_TARGETS][row, :length],
            rtol=1e-5, atol=1e-6,
        )  # fmt: skip

    # RLlib always standardises, artificial steps included; give both the same advantages.
    batch[Postprocessing.ADVANTAGES] = torch.zeros_like(batch[Postprocessing.ADVANTAGES])
    for row, length in enumerate(lens):
        batch[Postprocessing.ADVANTAGES][row, :length] = rollouts.advantages[row, :length]

    module = theirs.module[DEFAULT_MODULE_ID]
    fwd_out = module.forward_train(batch)
    their_loss = theirs.compute_loss_for_module(
        module_id=DEFAULT_MODULE_ID, config=theirs.config, batch=batch, fwd_out=fwd_out
    )
    module.zero_grad()
    their_loss.backward()

    metrics, our_gradients = gradients(ours, episodes)  # in several micro-batches
    assert float(metrics["total_loss"]) == pytest.approx(their_loss.item(), rel=1e-5)
    compared = 0
    for name, parameter in module.named_parameters():
        if parameter.grad is not None and float(parameter.grad.abs().max()) > 0:
            torch.testing.assert_close(
                our_gradients[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name
            )
            compared += 1
    assert compared > 20


def test_whitening_differs_from_rllib_only_by_its_artificial_step(episodes_and_learners):
    episodes, theirs, ours = episodes_and_learners
    batch = rllib_batch(theirs, episodes)
    rollouts = ours.batch_pass(ours.columns(episodes), 1).rollouts
    raw = gae(rollouts.values, rollouts.rewards, rollouts.loss_mask, 0.97, 0.9)
    row, length = 0, len(episodes[0])
    theirs_row = batch[Postprocessing.ADVANTAGES][row, :length]
    ours_row = raw[row, :length]
    # Affine in one another: standardising with other constants.
    slope = (theirs_row[0] - theirs_row[1]) / (ours_row[0] - ours_row[1])
    torch.testing.assert_close(
        theirs_row - theirs_row[0], slope * (ours_row - ours_row[0]), rtol=1e-4, atol=1e-5
    )


def test_action_logp_is_the_learners(episodes_and_learners):
    episodes, _, ours = episodes_and_learners
    columns = ours.columns(episodes)
    with torch.no_grad():
        outputs = ours.module[DEFAULT_MODULE_ID].forward_train(columns)
    logp = outputs[Columns.ACTION_DIST_INPUTS][..., 0]
    mask = columns[Columns.LOSS_MASK]
    assert len({int(n) for n in mask.sum(-1)}) > 2, "the batch must be ragged"
    difference = (logp - columns[Columns.ACTION_LOGP])[mask].abs().max()
    assert float(difference) < 1e-4
