"""How often the critic learns, and what of it does."""

import pytest
import torch

from tests.learner.rig import hot_config, make_learner, sample

PLAIN = {"minibatch_size": 4, "lr": 1e-3, "critic_lr": 1e-3, "init_value": 0.5}


@pytest.fixture(scope="module")
def episodes():
    return sample(hot_config())


def weights_after(episodes, *, num_epochs=1, **training):
    """The weights of policy and critic after one update, by name, and what it reported."""
    learner = make_learner(hot_config(**{**PLAIN, **training}))
    results = learner.update(
        episodes=episodes,
        timesteps={"training_iteration": 1},
        num_epochs=num_epochs,
        minibatch_size=4,
    )["default_policy"]
    module = learner.policy_module
    critic = {id(parameter) for parameter in module.critic_parameters()}
    found = ({}, {})
    for name, parameter in module.named_parameters():
        found[id(parameter) in critic][name] = parameter.detach().clone()
    return *found, {name: value.peek() for name, value in results.items()}


def same(one, other):
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])] == []


def test_further_epochs_of_the_critic_move_it_alone_and_as_those_of_both_would(episodes):
    policy, critic, metrics = weights_after(episodes)
    same_policy, further, reported = weights_after(episodes, critic_epochs=2)
    assert same(policy, same_policy) and not same(critic, further)
    assert reported["policy_loss"] == metrics["policy_loss"]
    moved_policy, of_both, _ = weights_after(episodes, num_epochs=2)
    assert not same(policy, moved_policy) and same(further, of_both)


def test_frozen_attention_stays_and_the_rest_learns(episodes):
    learner = make_learner(hot_config(**PLAIN))
    start = {n: p.detach().clone() for n, p in learner.policy_module.critic.named_parameters()}
    _, critic, _ = weights_after(episodes, critic_freeze="attention")
    moved = {n for n in start if not torch.equal(start[n], critic[f"critic.{n}"])}
    frozen = {name for name in start if ".self_attn." in name}
    assert moved | frozen == set(start) and not moved & frozen
    assert any("mlp" in name for name in moved) and len(frozen) >= 2 * 7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"critic_epochs": 1, "num_epochs": 2}, "critic_epochs is 1, but num_epochs is 2"),
        ({"critic": "shared", "critic_freeze": "attention"}, "critic_freeze is 'attention'"),
        ({"critic": "none", "critic_epochs": 2, "bonus_coeff": 0.0,
          "advantage": {"name": "rloo"}}, "critic_epochs is 2"),
    ],
)  # fmt: skip
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        hot_config(**settings)
