import math

import pytest
import torch

from tests.learner.rig import gradients, hot_config, make_learner, sample


@pytest.fixture(scope="module")
def episodes():
    return sample(hot_config())


def test_the_reference_stays_while_the_policy_moves(episodes):
    learner = make_learner(hot_config(lr=1e-2, regularisers=[{"name": "kl", "coeff": 0.5}]))
    before = [p.clone() for p in learner.reference.policy.parameters()]
    results = []
    for iteration in (1, 2):
        results.append(
            learner.update(episodes=episodes, timesteps={"training_iteration": iteration})
        )
    for one, other in zip(before, learner.reference.policy.parameters(), strict=True):
        assert torch.equal(one, other)
    values = [result["default_policy"]["regularisation"].peek() for result in results]
    assert values[0] == pytest.approx(0.0, abs=1e-6)  # The policy still is the reference.
    assert values[1] > 1e-3


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_kl_in_the_loss_is_the_estimators_mean_and_gradient(episodes, estimator):
    settings = {"name": "kl", "coeff": 0.7, "estimator": estimator}
    with_kl = make_learner(hot_config(regularisers=[settings], grad_clip=None))
    without = make_learner(hot_config(grad_clip=None))
    for learner in (with_kl, without):
        with torch.no_grad():  # Away from the reference, where all three would be zero.
            learner.policy_module.policy.get_output_embeddings().weight.mul_(1.3)
    losses, own = gradients(with_kl, episodes)
    plain, bare = gradients(without, episodes)

    rollouts = with_kl.batch_pass(with_kl.columns(episodes), 1).rollouts
    outputs = with_kl.policy_module.forward_train(with_kl.columns(episodes))
    logp, _ = outputs["action_dist_inputs"].unbind(-1)
    ratio = rollouts.ref_logp - logp
    formula = {"k2": ratio.square() / 2, "k3": ratio.exp() - 1 - ratio}[estimator]
    expected = 0.7 * formula[rollouts.loss_mask].mean()
    assert float(losses["regularisation"]) == pytest.approx(expected.item(), rel=1e-4)
    assert float(losses["total_loss"] - plain["total_loss"]) == pytest.approx(
        expected.item(), rel=1e-3
    )
    name = "policy.model.norm.weight"
    parameters = dict(with_kl.policy_module.named_parameters())
    (gradient,) = torch.autograd.grad(expected, [parameters[name]])
    difference = own[name] - bare[name]
    assert float(gradient.abs().max()) > 1e-4
    torch.testing.assert_close(difference, gradient, rtol=1e-3, atol=1e-6)


def test_kl_in_the_reward_by_hand(episodes):
    transform = {"name": "kl_penalty", "coeff": 0.25, "estimator": "k1"}
    learner = make_learner(hot_config(reward_transforms=[transform]))
    with torch.no_grad():
        learner.reference.policy.get_output_embeddings().weight.mul_(1.3)
    columns = learner.columns(episodes)
    rewards = columns["rewards"].clone()
    rollouts = learner.batch_pass(columns, 1).rollouts
    row, token = 1, 2
    difference = float(columns["action_logp"][row, token] - rollouts.ref_logp[row, token])
    assert abs(difference) > 1e-3
    assert float(rollouts.rewards[row, token]) == pytest.approx(
        float(rewards[row, token]) - 0.25 * difference, rel=1e-4
    )


def test_the_checkpoint_knows_the_reference(episodes):
    learner = make_learner(hot_config(regularisers=[{"name": "kl"}]))
    state = learner.get_state()
    learner.set_state(state)
    state["reference"]["hash"] = "0" * 64
    with pytest.raises(ValueError, match="is another one now"):
        learner.set_state(state)


def test_adaptive_entropy_moves_the_bonus_and_resumes(episodes):
    controller = {"name": "adaptive_entropy", "target": 10.0, "step": 0.25, "maximum": 1.0}
    learner = make_learner(hot_config(controllers=[controller]))
    coefficients = []
    for iteration in (1, 2):
        result = learner.update(episodes=episodes, timesteps={"training_iteration": iteration})
        coefficients.append(result["default_policy"]["entropy_coeff"].peek())
    assert coefficients == [0.25, 0.5]  # The entropy is below 10 nats.
    other = make_learner(hot_config(controllers=[controller]))
    other.set_state(learner.get_state())
    result = other.update(episodes=episodes, timesteps={"training_iteration": 3})
    assert result["default_policy"]["entropy_coeff"].peek() == 0.75
    # Looking at completions is no iteration.
    other.batch_pass(other.columns(episodes), 3)
    assert other.get_state()["controllers"] == {"adaptive_entropy": {"coeff": 0.75}}


def test_a_controllers_bonus_reaches_the_gradient(episodes):
    controller = {"name": "adaptive_entropy", "target": 10.0, "step": 0.25, "maximum": 1.0}
    moved = make_learner(hot_config(controllers=[controller]))
    fixed = make_learner(hot_config(entropy_coeff=0.25))
    losses = []
    for learner in (moved, fixed):
        result = learner.update(episodes=episodes, timesteps={"training_iteration": 1})
        losses.append(result["default_policy"]["total_loss"].peek())
    assert losses[0] == losses[1]
    assert math.isfinite(losses[0])
    for one, other in zip(
        moved.policy_module.parameters(), fixed.policy_module.parameters(), strict=True
    ):
        assert torch.equal(one, other)
