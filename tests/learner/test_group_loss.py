"""A loss on whole groups in the learner: minibatches keep groups, micro-batches may cut them."""

import pytest
import torch

from rllib_distrl.learner.minibatches import minibatch, row_orders
from rllib_distrl.maths.group_losses import copg
from tests.learner.rig import gradients, hot_config, make_learner, sample

SETTINGS = {
    "policy_loss": {"name": "copg", "beta": 0.2},
    "advantage": {"name": "zero"},
    "critic": "none",
    "bonus_coeff": 0.0,
    "whiten_advantages": False,
    "grad_clip": None,
}


@pytest.fixture(scope="module")
def episodes():
    return sample(hot_config())


def moved(learner):
    """Away from the reference, where x would be 0."""
    with torch.no_grad():
        learner.policy_module.policy.get_output_embeddings().weight.mul_(1.3)
    return learner


def test_its_gradient_is_autograds_in_one_micro_batch_and_in_many(episodes):
    learner = moved(make_learner(hot_config(**SETTINGS)))
    columns = learner.columns(episodes)
    rollouts = learner.batch_pass(columns, 1).rollouts
    logp, _ = learner.policy_module.forward_train(columns)["action_dist_inputs"].unbind(-1)
    loss = copg(
        logp, rollouts.ref_logp, rollouts.returns, rollouts.group, beta=0.2,
        loss_mask=rollouts.loss_mask,
    ).mean()  # fmt: skip
    loss.backward()
    expected = {n: p.grad for n, p in learner.policy_module.named_parameters()}
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert largest > 0.1
    for budget in (16_384, 80):
        other = moved(make_learner(hot_config(**SETTINGS, micro_batch_tokens=budget)))
        metrics, found = gradients(other, episodes)
        assert metrics["policy_loss"] == pytest.approx(loss.item(), rel=1e-5)
        for name, gradient in expected.items():
            assert float((found[name] - gradient).abs().max()) < 2e-6 * largest, name


def test_minibatches_are_whole_groups_in_an_order_of_their_own(episodes):
    learner = make_learner(hot_config(**SETTINGS, minibatch_size=6))
    columns = learner.columns(episodes)
    rollouts = learner.batch_pass(columns, 1).rollouts
    orders = row_orders(rollouts, 6, seed=0, shuffle=True, whole_groups=True)
    assert len({tuple(order.tolist()) for order in orders}) > 2
    for order in orders:
        assert sorted(order.tolist()) == list(range(12))
        for rows in order.split(6):
            part = minibatch(columns, rollouts, rows, learner.method.aggregation)["rollouts"]
            assert sorted(part.group.bincount().tolist())[-2:] == [3, 3]


def test_it_learns_what_pays(episodes):
    """Completions that got more than their group become likelier, and the others less."""
    learner = make_learner(hot_config(**SETTINGS, minibatch_size=6, lr=3e-3))
    columns = learner.columns(episodes)
    before = learner.policy_module.compute_logps(columns).sum(1)
    for k in range(1, 6):
        learner.update(
            episodes=episodes, timesteps={"training_iteration": k}, num_epochs=2, minibatch_size=6
        )
    moved_by = learner.policy_module.compute_logps(columns).sum(1) - before
    returns = columns["rewards"].sum(1)
    for group in range(4):
        rows = columns["groups"] == group
        best, worst = returns[rows].argmax(), returns[rows].argmin()
        assert moved_by[rows][best] > moved_by[rows][worst]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"minibatch_size": 4}, "there are 3, and minibatch_size is 4"),
        ({"advantage": {"name": "grpo"}}, "copg.*advantage = {'name': 'zero'}"),
        ({"importance_correction": "masked"}, "copg.*importance_correction = 'none'"),
        ({"policy_loss": {"name": "copg", "beta": -1.0}}, "beta -1.0; it must be >= 0"),
        ({"policy_loss": {"name": "copgg"}}, "did you mean 'copg'"),
    ],
)
def test_refusals(changed, words):
    with pytest.raises(ValueError, match=words):
        hot_config(**{**SETTINGS, **changed})
