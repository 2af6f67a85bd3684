"""Cutting a minibatch into micro-batches does not change what is learned."""

import pytest
import torch

from rllib_distrl.learners.minibatches import minibatch
from tests.learners.rig import hot_config, make_learner, sample


@pytest.fixture(scope="module")
def episodes():
    return sample(hot_config())


def gradients(episodes, budget, **training):
    learner = make_learner(hot_config(grad_clip=None, **training))
    columns = learner._columns(episodes)
    rollouts = learner._prepare(columns, 1)
    learner._warming_up, learner._first_step = False, False
    learner.apply_gradients = lambda gradients: None
    learner.config.micro_batch_tokens = budget
    passes = []
    learner._policy_module.policy.register_forward_hook(lambda *call: passes.append(1))
    learner._policy_module.policy.base_model.register_forward_hook(lambda *call: passes.append(1))
    whole = minibatch(columns, rollouts, torch.arange(len(episodes)), learner.config)
    learner._uncompiled_update({"default_policy": whole})
    names = dict(learner._policy_module.named_parameters())
    return len(passes), {name: p.grad for name, p in names.items() if p.grad is not None}


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
def test_gradients_are_those_of_one_big_batch(episodes, aggregation):
    settings = {"aggregation": aggregation, "entropy_coeff": 0.01, "vf_loss_coeff": 0.7}
    one, whole = gradients(episodes, 16_384, **settings)
    many, parts = gradients(episodes, 80, **settings)
    assert (one, many > 3) == (1, True)
    assert parts.keys() == whole.keys()
    for name, gradient in whole.items():
        scale = float(gradient.abs().max())
        if scale > 0:
            difference = float((parts[name] - gradient).abs().max())
            assert difference < max(1e-5 * scale, 1e-6), name
