"""Algorithms whose learners share out their weights, beside those with one learner."""

import pytest
import torch

from rllib_distrl.algorithm.export import export_critic, policy_state
from rllib_distrl.algorithm.inspection import inspect_policy
from rllib_distrl.rllib_traps import optimizer_steps
from tests.helpers import distrl_config, save_untied, with_model_config

pytestmark = pytest.mark.usefixtures("ray_session")

KL = {"regularisers": [{"name": "kl", "coeff": 0.1}]}
LORA = {"lora": {"r": 4, "alpha": 8}}
PRETRAINING = {"rollouts": 12, "minibatch_size": 6, "epochs": 2}


def small(**training):
    return distrl_config(prompts=4, generations=3, init_value=0.5, **training)


def with_learners(config, number, sharding="none"):
    config = config.copy(copy_frozen=False).training(sharding=sharding)
    return config.learners(num_learners=number, num_cpus_per_learner=0.5)


def mean_difference(one, other):
    assert one.keys() == other.keys()
    return float(torch.cat([(one[name] - other[name]).abs().flatten() for name in one]).mean())


def stamps_of(algo):
    results = algo.learner_group.foreach_learner(lambda learner: learner.weights_stamp)
    return [result.get() for result in results]


def moved(one, other):
    return any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("tied", "settings", "model_config", "plain", "bound"),
    [
        (False, {"critic": "separate", "bonus_stat": "ensemble", **KL}, {}, 0, 2e-5),
        (False, {"critic": "separate", **KL}, LORA, 0, 2e-5),
        # Pretraining draws the minibatches of each learner.
        (True, {"critic": "detached", "critic_pretraining": PRETRAINING, "bonus_stat": "distance"},
         {}, 2, 2e-5),
        (True, {"critic": "shared", "precision": "bf16", "activation_checkpointing": True}, {},
         0, 2e-4),
    ],
    ids=["ensemble", "lora", "pretraining", "bf16"],
)  # fmt: skip
def test_a_run_goes_on_with_plain_learners_and_back(
    build, tmp_path, tied, settings, model_config, plain, bound
):
    """Bounds are of float noise, which Adam turns into steps; a step is 1e-3 here."""
    config = with_model_config(small(micro_batch_tokens=100, **settings), **model_config)
    if not tied:
        config = with_model_config(config, model=save_untied(tmp_path / "untied"))
    one, two = build(with_learners(config, plain)), build(with_learners(config, 2, "fsdp"))
    start = policy_state(one)
    assert mean_difference(start, policy_state(two)) == 0.0
    for algo in (one, two):
        algo.train()
    assert moved(start, policy_state(two))
    assert mean_difference(policy_state(one), policy_state(two)) < bound

    for saved, restored in ((two, one), (one, two)):
        path = saved.save_to_path(str(tmp_path / saved.config.sharding))
        restored.restore_from_path(path)
        assert mean_difference(policy_state(saved), policy_state(restored)) == 0.0
        assert optimizer_steps(saved) == optimizer_steps(restored) > 0
        for algo in (one, two):
            algo.train()
        assert mean_difference(policy_state(one), policy_state(two)) < bound

    two.export_model(tmp_path / "model")
    from transformers import AutoModelForCausalLM

    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    own = policy_state(two)
    assert all(torch.equal(own[name], exported[name]) for name in own)
    if not model_config:
        export_critic(two, tmp_path / "critic")
    stamps = stamps_of(two)
    off = abs(inspect_policy(two, problems=2).numbers("logp_difference"))
    assert off.mean() < (3e-2 if "precision" in settings else 1e-5)
    assert stamps_of(two) == stamps  # Whoever only looks does not seem to have changed weights.
    two.set_weights(one.get_weights())
    assert stamps_of(two) != stamps
    assert mean_difference(policy_state(one), policy_state(two)) == 0.0


@pytest.mark.parametrize(
    ("settings", "learners", "message"),
    [
        ({}, 0, "num_learners is 0: one learner holds everything anyway"),
        ({"policy_loss": {"name": "hpt", "gate": 1}}, 2, "would not all have solutions"),
        ({"sharding": "zero"}, 2, "sharding"),
    ],
)
def test_what_cannot_be_sharded_is_refused(settings, learners, message):
    config = small(**{"sharding": "fsdp", **settings}).learners(num_learners=learners)
    with pytest.raises(ValueError, match=message):
        config.validate()
