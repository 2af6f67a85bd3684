"""A categorical head without ends takes its range from the first batch, and keeps it."""

import pytest
import torch

from tests.learner.rig import hot_config, make_learner, sample

HEAD = {"name": "categorical", "bins": 9}


@pytest.fixture(scope="module")
def episodes():
    return sample(hot_config())


def learner_of(**training):
    return make_learner(hot_config(head=HEAD, critic_lambda=1.0, bonus_coeff=0.0, **training))


@pytest.mark.parametrize("critic", ["separate", "twin"])
def test_the_range_is_that_of_the_first_returns_and_travels_with_the_state(episodes, critic):
    learner = learner_of(critic=critic, gamma=1.0)
    returns = torch.cat(
        [torch.tensor(e.rewards.data[::-1].cumsum()[::-1].copy()) for e in episodes]
    )
    columns = learner.columns(episodes)
    rollouts = learner.batch_pass(columns, 1).rollouts
    ends = rollouts.support[0], rollouts.support[-1]
    assert ends == pytest.approx((float(returns.min()), float(returns.max())), abs=1e-5)
    assert rollouts.metrics["critic_targets_clipped"] == 0.0
    mean = sum(float(e.rewards.data.sum()) for e in episodes) / len(episodes)
    # Twins are drawn apart at the start.
    assert float(rollouts.law.mean[0, 0]) == pytest.approx(
        mean, abs=0.1 * (critic == "twin") + 1e-3
    )
    for episode in episodes:
        episode.rewards.data[:] *= 2
    try:
        again = learner.batch_pass(learner.columns(episodes), 2).rollouts
    finally:
        for episode in episodes:
            episode.rewards.data[:] /= 2
    assert (again.support[0], again.support[-1]) == ends
    beyond = ((2 * returns > ends[1] + 1e-4) | (2 * returns < ends[0] - 1e-4)).float().mean()
    assert again.metrics["critic_targets_clipped"] == pytest.approx(float(beyond), abs=1e-6) != 0
    other = learner_of(critic=critic)
    other.set_state(learner.get_state())
    found = other.batch_pass(columns, 3).rollouts
    assert found.support == rollouts.support
    torch.testing.assert_close(found.quantiles, rollouts.quantiles)
