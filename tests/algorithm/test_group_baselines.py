"""The critic-free baselines: their advantages by hand, and real training."""

import numpy as np
import pytest
import torch

from rllib_distrl.algorithm.distrl import DistRL
from rllib_distrl.algorithm.registry import algorithm_config
from tests.helpers import COUNTDOWN, TINY
from tests.learner.rig import make_learner, sample

BASELINES = ("GRPO", "DrGRPO", "RLOO", "ReinforcePlusPlus", "DAPO", "GSPO", "LAD")
RETURNS = np.array([1, 0, 0, 0, 0, 0, 1, 1, 0, 1, 1, 1], dtype=np.float32)  # four groups of three


def baseline(name, **training):
    config = (
        algorithm_config(name)
        .environment(COUNTDOWN)
        .rl_module(model_config={"model": TINY})
        .rollout(
            prompts_per_iteration=4, num_generations=3, max_completion_tokens=24, temperature=2.0
        )
        .training(**{"lr": 1e-3, **training})
        .debugging(seed=1)
    )
    config.validate()
    return config


def prepared(name, **training):
    """The batch of a baseline's learner for the returns above, and the lengths."""
    config = baseline(name, **training)
    learner = make_learner(config)
    learner.build()
    episodes = sample(config)
    for episode, total in zip(episodes, RETURNS, strict=True):
        episode.rewards.data[: len(episode)] = 0.0
        episode.rewards.data[len(episode) - 1] = total
    rollouts = learner.batch_pass(learner.columns(episodes), 1).rollouts
    assert rollouts.quantiles is None
    return rollouts


def per_row(rollouts):
    """Each row's advantage, which must be the same at all of its tokens."""
    rows = [
        row[mask].numpy() for row, mask in zip(rollouts.advantages, rollouts.loss_mask, strict=True)
    ]
    assert all(np.ptp(row) < 1e-6 for row in rows)
    return np.array([row[0] for row in rows])


# One right of three, all wrong, two right of three, all right; the sample standard deviation of
# the mixed groups is sqrt(1/3), and 1e-6 is added to it.
CENTRED = np.array([2, -1, -1, 0, 0, 0, 1, 1, -2, 0, 0, 0]) / 3
GRPO_ADVANTAGES = CENTRED / (np.sqrt(1 / 3) + 1e-6)


@pytest.mark.parametrize("name", ["GRPO", "GSPO", "LAD"])
def test_group_normalised_advantages(name):
    assert per_row(prepared(name)) == pytest.approx(GRPO_ADVANTAGES, abs=1e-6)


def test_dr_grpo_subtracts_the_mean():
    assert per_row(prepared("DrGRPO")) == pytest.approx(CENTRED, abs=1e-6)


def test_rloo_subtracts_the_mean_of_the_others():
    # The reference is the policy itself before the first step: its KL is zero.
    expected = [1, -1 / 2, -1 / 2, 0, 0, 0, 1 / 2, 1 / 2, -1, 0, 0, 0]
    assert per_row(prepared("RLOO")) == pytest.approx(expected, abs=1e-4)


def test_reinforce_pp_whitens_over_the_tokens_of_the_batch():
    rollouts = prepared("ReinforcePlusPlus")
    lengths = rollouts.lengths.numpy()
    mean = (RETURNS * lengths).sum() / lengths.sum()
    std = np.sqrt((lengths * (RETURNS - mean) ** 2).sum() / lengths.sum())
    found = rollouts.advantages[torch.arange(12), rollouts.lengths - 1].numpy()
    assert found == pytest.approx((RETURNS - mean) / std, abs=1e-3)


def test_dapo_penalises_the_last_fifth_before_the_limit():
    rollouts = prepared("DAPO")
    lengths = rollouts.lengths.numpy()
    cache = 24 // 5
    returns = RETURNS - np.clip((lengths - (24 - cache)) / cache, 0, 1)
    groups = returns.reshape(4, 3)
    expected = (groups - groups.mean(1, keepdims=True)) / (
        groups.std(1, ddof=1, keepdims=True) + 1e-6
    )
    assert lengths.max() == 24  # a completion that was penalised
    assert per_row(rollouts) == pytest.approx(expected.ravel(), abs=1e-4)


def test_the_critic_does_not_change_group_advantages():
    with_critic = baseline("DrGRPO", critic="separate")
    learner = make_learner(with_critic)
    learner.build()
    episodes = sample(with_critic)
    for episode, total in zip(episodes, RETURNS, strict=True):
        episode.rewards.data[: len(episode)] = 0.0
        episode.rewards.data[len(episode) - 1] = total
    rollouts = learner.batch_pass(learner.columns(episodes), 1).rollouts
    assert rollouts.quantiles is not None
    assert torch.equal(rollouts.advantages, prepared("DrGRPO").advantages)


@pytest.mark.slow
@pytest.mark.parametrize("name", BASELINES)
def test_real_training(name, ray_session):
    algo = baseline(name).build_algo()
    try:
        assert isinstance(algo, DistRL) and type(algo).__name__ == name
        for _ in range(2):
            learner = algo.train()["learners"]["default_policy"]
        assert np.isfinite(learner["policy_loss"])
        assert learner["vf_loss"] == 0.0
        assert learner["logp_mismatch_max"] == pytest.approx(1.0, abs=1e-4)
    finally:
        algo.stop()


@pytest.mark.parametrize(
    ("name", "training", "message"),
    [
        ("LAD", {"whiten_advantages": True}, "'lad' is defined with whiten_advantages = False"),
        ("LAD", {"aggregation": "token_mean"}, "aggregation = 'sequence_mean'; got 'token_mean'"),
        ("LAD", {"entropy_coeff": 0.01}, "entropy_coeff = 0.0; got 0.01"),
        ("LAD", {"policy_loss": {"name": "lad", "divergence": "chi"}}, "divergence 'chi'"),
        ("LAD", {"num_epochs": 2}, "one optimiser step per batch.*Here are 2"),
        ("LAD", {"minibatch_size": 4}, "Here are 3.*ratio_level = 'token'"),
        ("GSPO", {"aggregation": "token_mean"}, "'gspo' is defined with aggregation"),
        ("GRPO", {"advantage": {"name": "gae"}}, "'gae' reads the critic, but critic is 'none'"),
        ("GRPO", {"bonus_coeff": 1.0}, "there is no critic to give a bonus"),
        ("GRPO", {"critic_warmup_iterations": 2}, "there is no critic"),
        ("GRPO", {"advantage": {"name": "maxk", "k": 4}}, "a group has 3 completions"),
        ("GRPO", {"advantage": {"name": "opo"}, "num_epochs": 2}, "num_epochs = 1; got 2"),
        ("DAPO", {"reward_transforms": [{"name": "overlong", "cache_tokens": 25}]}, "<= 24"),
    ],
)
def test_combinations_without_meaning_are_refused(name, training, message):
    with pytest.raises(ValueError, match=message):
        baseline(name, **training)


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match="num_generations is 1"):
        baseline("GRPO").copy(copy_frozen=False).rollout(num_generations=1).validate()
