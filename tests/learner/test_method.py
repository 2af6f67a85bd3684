import pytest
import torch

from rllib_distrl.method.batch import SequenceBatch
from rllib_distrl.method.pipeline import Method
from tests.helpers import distrl_config
from tests.learner.rig import hot_config, make_learner, sample


def test_the_bounds_of_the_ratio_reach_the_loss():
    config = distrl_config(clip_param=0.1, clip_param_high=0.3, dual_clip=2.0)
    batch = SequenceBatch(
        rewards=torch.zeros(1, 4),
        loss_mask=torch.ones(1, 4, dtype=torch.bool),
        action_logp=torch.zeros(1, 4),
        group=torch.zeros(1, dtype=torch.long),
        advantages=torch.tensor([[1.0, 1.0, -1.0, -1.0]]),
    )
    logp = torch.tensor([[1.5, 0.5, 0.5, 9.0]]).log()
    losses = Method.from_config(config).policy_loss(logp, batch)
    assert losses[0].tolist() == pytest.approx([-1.3, -0.5, 0.9, 2.0])


TRANSFORMS = [
    ({"name": "overlong", "cache_tokens": 20, "penalty": 5.0}, 1.0),
    ({"name": "noise_backward", "false_positive_rate": 0.2, "false_negative_rate": 0.3}, 1.0),
    ({"name": "kl_penalty", "coeff": 0.5}, 1.0),
    (None, 0.9),
]


@pytest.mark.parametrize(("transform", "gamma"), TRANSFORMS)
def test_the_critic_starts_at_what_it_is_to_learn(transform, gamma):
    config = hot_config(reward_transforms=[transform] if transform else [], gamma=gamma)
    learner = make_learner(config)
    if learner.reference is not None:
        with torch.no_grad():  # not what sampled, so that there is a penalty
            learner.reference.policy.get_output_embeddings().weight.mul_(1.3)
    episodes = sample(config)
    columns = learner.columns(episodes)
    plain = columns["rewards"].clone()
    rollouts = learner.batch_pass(columns, 1).rollouts
    rewards = torch.where(rollouts.loss_mask, rollouts.rewards, 0.0)
    assert torch.equal(columns["rewards"], plain)  # a transform makes rewards of its own
    discounts = gamma ** torch.arange(rewards.shape[1])
    expected = (rewards * discounts).sum(1).mean().item()
    assert rollouts.values[0, 0].item() == pytest.approx(expected, abs=1e-5)
    if transform:
        assert abs(expected - plain.sum(1).mean().item()) > 0.05


def test_the_bonus_from_distances_keeps_no_hidden_states_of_the_batch():
    """64 features of states of width 64 and a constant; what a stage asks for it still gets."""
    config = hot_config(bonus_stat="distance", distance={"features": 8}, micro_batch_tokens=80)
    learner = make_learner(config)
    rollouts = learner.batch_pass(learner.columns(sample(config)), 1).rollouts
    wide = [x for x in {**rollouts.filled(), **rollouts.extras}.values() if x.dim() > 2]
    assert {x.shape[2] for x in wide} == {config.n_quantiles}
    assert rollouts.extras["distance"][rollouts.loss_mask].min() > 0
