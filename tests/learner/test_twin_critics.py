"""Two critics in the place of one: the smaller mean counts, and apart from that they are two."""

import pytest
import torch
from ray.rllib.core.columns import Columns

from rllib_distrl.algorithm.estimates import ModelShape, learner_memory
from rllib_distrl.algorithm.registry import algorithm_config
from rllib_distrl.algorithm.wiring import wire_language_model
from rllib_distrl.model.critics import PARTS, check_critic, load_critic, save_critic
from rllib_distrl.settings import RolloutSettings
from tests.helpers import COUNTDOWN, TINY
from tests.learner.rig import gradients, hot_config, make_learner, sample


@pytest.fixture(scope="module")
def episodes():
    return sample(hot_config(critic_observation="state"))


def twins(**training):
    return make_learner(hot_config(**{"critic": "twin", **training}))


def parts_of(module, number):
    """One of the twins' parameters, by the names of a critic alone."""
    outputs = module.n_value_outputs // 2
    mine = slice(number * outputs, (number + 1) * outputs)
    found = {}
    for name, x in module.state_dict(keep_vars=True).items():
        if name.startswith("value_head."):
            found[name] = x[mine]
        elif name.startswith((f"critic.{number}.", f"observation_head.{number}.")):
            found[name.replace(f".{number}.", ".", 1)] = x
    return found


def values_of_each(learner, columns, **training):
    """(2, B, T): what two critics say that are alone, with the twins' weights."""
    found = []
    for number in (0, 1):
        alone = make_learner(hot_config(**training)).policy_module
        own = {k: v.detach().clone() for k, v in parts_of(learner.policy_module, number).items()}
        assert not alone.load_state_dict(own, strict=False).unexpected_keys
        assert own.keys() == {k for k in alone.state_dict() if k.startswith(PARTS)}
        found.append(alone.compute_values(columns))
    return torch.stack(found)


def disturbed(learner):
    generator = torch.Generator().manual_seed(5)
    for name, x in learner.policy_module.named_parameters():
        if name.startswith(("critic.", "value_head.weight", "observation_head")):
            x.data.add_(0.05 * torch.randn(x.shape, generator=generator))
    return learner


@pytest.mark.parametrize("observation", ["none", "state"])
def test_the_value_is_the_smaller_of_both_and_both_learn_its_returns(episodes, observation):
    told = {"critic_observation": observation, "init_value": 0.3}
    gamma, lambda_ = 0.9, 0.8
    learner = disturbed(twins(**told, target="expected_value", gamma=gamma, critic_lambda=lambda_))
    learner.policy_module.initialise_values(0.3)
    columns = learner.columns(episodes)
    mask = columns[Columns.LOSS_MASK]
    each = values_of_each(learner, columns, **told)
    lower = each.amin(0)
    assert bool((each[0] < each[1])[mask].any()) and bool((each[0] > each[1])[mask].any())
    rollouts = learner.batch_pass(columns, 1).rollouts
    torch.testing.assert_close(rollouts.values[mask], lower[mask], rtol=0, atol=1e-5)
    for row, length in enumerate(mask.sum(1).tolist()):
        v = [*lower[row, :length].tolist(), 0.0]
        ahead = 0.0
        for t in reversed(range(length)):
            r = float(columns[Columns.REWARDS][row, t])
            ahead = r + gamma * v[t + 1] - v[t] + gamma * lambda_ * ahead
            found = float(rollouts.target_quantiles[row, t, 0])
            assert found == pytest.approx(v[t] + ahead, abs=1e-5)


def test_twins_that_are_equal_learn_as_one_alone_does(episodes):
    alone, learner = make_learner(hot_config()), twins()
    own = alone.policy_module.state_dict()
    with torch.no_grad():
        for number in (0, 1):
            for name, x in parts_of(learner.policy_module, number).items():
                x.copy_(own[name])
    metrics, wanted = gradients(alone, episodes)
    seen, _ = gradients(learner, episodes)
    assert seen["policy_loss"] == metrics["policy_loss"]
    assert seen["vf_loss"] == pytest.approx(2 * metrics["vf_loss"], rel=1e-6)
    module = learner.policy_module
    for number in (0, 1):
        trunk = f"critic.{number}."
        found = {n.replace(trunk, "critic."): p.grad for n, p in module.named_parameters()}
        head = wanted["value_head.weight"].shape[0]
        found["value_head.weight"] = module.value_head.weight.grad[number * head :][:head]
        for name in wanted:
            if name.startswith(("critic.layers", "value_head.weight")):
                torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-7)


def test_they_start_apart_and_what_one_learns_of_given_targets_is_its_own(episodes):
    """Returns as targets: nothing of the second critic is in the first one's gradient."""

    def gradient(move):
        learner = twins(target="monte_carlo", critic_observation="state")
        with torch.no_grad():
            for name, x in parts_of(learner.policy_module, 1).items():
                x.add_(move * torch.ones_like(x)) if "norm" not in name else None
        _, found = gradients(learner, episodes)
        return learner, found

    learner, plain = gradient(0.0)
    first, second = (parts_of(learner.policy_module, number) for number in (0, 1))
    assert not torch.equal(first["value_head.weight"], second["value_head.weight"])
    _, moved = gradient(0.01)
    named = [name for name in plain if name.startswith(("critic.0.", "observation_head.0."))]
    assert len(named) > 5
    assert all(torch.equal(plain[name], moved[name]) for name in named)
    others = [name for name in plain if name.startswith("critic.1.")]
    assert not any(torch.equal(plain[name], moved[name]) for name in others)


def test_a_folder_and_a_learners_state_keep_both(episodes, tmp_path):
    config = hot_config(critic="twin")
    learner = disturbed(make_learner(config))
    columns = learner.columns(episodes)
    wanted = learner.policy_module.compute_quantiles(columns)
    named = {n: x for n, x in learner.policy_module.state_dict().items() if n.startswith(PARTS)}
    head = {name: getattr(config, name) for name in ("head", "n_quantiles", "head_center")}
    save_critic(tmp_path, named, **head, trunk_config={}, critic="twin")
    restored, started = twins(), twins()
    restored.set_state(learner.get_state())
    load_critic(started.policy_module, tmp_path)
    for other in (restored, started):
        assert torch.equal(other.policy_module.compute_quantiles(columns), wanted)
    check_critic(tmp_path, **head, critic="twin")
    with pytest.raises(ValueError, match=r"critic='twin', the settings say 'separate'. Set critic"):
        check_critic(tmp_path, **head)


def test_the_estimate_counts_both():
    shape = ModelShape(1000, 900, 2, 10, 40, 10, 50)
    plain, both = (
        learner_memory(shape, critic=critic, critic_outputs=k, micro_batch_tokens=100)
        for critic, k in (("separate", 4), ("twin", 8))
    )
    assert plain["critic weights"] == 4 * (900 + 11 * 4)
    assert both["critic weights"] == 2 * plain["critic weights"]
    of_activations = "activations of a micro-batch"
    assert 2 * both[of_activations] == 3 * plain[of_activations]


def test_refusals():
    config = algorithm_config("PPO").environment(COUNTDOWN)
    config.rl_module(model_config={"critic": "twin"})
    with pytest.raises(ValueError, match=r"critic = 'twin'.*teach one of two critics alone"):
        wire_language_model(config, TINY, RolloutSettings())
