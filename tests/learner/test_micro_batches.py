"""Cutting a minibatch into micro-batches does not change what is learned."""

import pytest
import torch

from rllib_distrl.learner.minibatches import minibatch
from rllib_distrl.maths import lm_head
from tests.learner.rig import gradients, hot_config, make_learner, sample


@pytest.fixture(scope="module")
def episodes():
    return sample(hot_config())


def passes_and_gradients(episodes, budget, dtype=torch.float32, **training):
    learner = make_learner(hot_config(grad_clip=None, micro_batch_tokens=budget, **training))
    module = learner.policy_module.to(dtype)
    passes = []
    module.policy.base_model.register_forward_hook(
        lambda *_: passes.append(torch.is_grad_enabled())
    )
    _, found = gradients(learner, episodes)
    return sum(passes), found


def assert_equal(found, expected, tolerance):
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert largest > 1e-2
    for name, gradient in expected.items():
        assert float((found[name] - gradient).abs().max()) < tolerance * max(largest, 1.0), name


EVERY_TERM = {
    "entropy_coeff": 0.1,
    "vf_loss_coeff": 0.7,
    "regularisers": [{"name": "kl", "coeff": 0.1}],
    "importance_correction": "truncated",
}
GROUP_LOSS = {
    "policy_loss": {"name": "lad"},
    "advantage": {"name": "grpo"},
    "aggregation": "sequence_mean",
    "whiten_advantages": False,
    "critic": "none",
    "bonus_coeff": 0.0,
}
CASES = {
    **{
        aggregation: {**EVERY_TERM, "aggregation": aggregation}
        for aggregation in ("token_mean", "sequence_mean", "constant")
    },
    "lad": GROUP_LOSS,
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_gradients_are_those_of_one_big_batch(episodes, case, dtype, tolerance):
    one, whole = passes_and_gradients(episodes, 16_384, dtype, **CASES[case])
    many, parts = passes_and_gradients(episodes, 80, dtype, **CASES[case])
    assert (one, many > 3) == (1, True)
    assert_equal(parts, whole, tolerance)


def test_the_constant_divisor_is_the_length_limit(episodes):
    config = hot_config(aggregation="constant").rollout(max_completion_tokens=50)
    config.validate()
    learner = make_learner(config)
    columns = learner.columns(episodes)
    rollouts = learner.batch_pass(columns, 1).rollouts
    some = minibatch(columns, rollouts, torch.arange(5), learner.method.aggregation)
    expected = rollouts.loss_mask[:5] / (5 * 50)
    torch.testing.assert_close(some["weights"], expected)
    torch.testing.assert_close(
        some["critic_weights"], rollouts.loss_mask[:5] / rollouts.loss_mask[:5].sum()
    )


def test_chunks_of_the_head_change_no_gradient(episodes, monkeypatch):
    _, whole = passes_and_gradients(episodes, 16_384, **EVERY_TERM)
    monkeypatch.setattr(lm_head, "CHUNK_LOGITS", 3 * 112)  # three tokens of the vocabulary
    _, chunked = passes_and_gradients(episodes, 16_384, **EVERY_TERM)
    assert_equal(chunked, whole, 1e-6)
