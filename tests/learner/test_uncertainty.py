"""The learned statistics of the bonus, in a real learner."""

import math

import pytest
import torch

from tests.learner.rig import hot_config, make_learner, sample

STATISTICS = ["ensemble", "distance"]


def updated(learner, episodes, k):
    return learner.update(
        episodes=episodes,
        timesteps={"num_env_steps_sampled_lifetime": 0, "training_iteration": k},
    )["default_policy"]


@pytest.fixture(scope="module", params=STATISTICS)
def rig(request):
    config = hot_config(bonus_stat=request.param, n_quantiles=1, minibatch_size=6)
    return config, make_learner(config), sample(config)


def statistic(learner, episodes):
    columns = learner.columns(episodes)
    rollouts = learner.batch_pass(columns, 1).rollouts
    return rollouts.extras[learner.config.bonus_stat], rollouts


def test_it_is_the_bonus_and_zero_in_the_padding(rig):
    _, learner, episodes = rig
    found, rollouts = statistic(learner, episodes)
    mask = rollouts.loss_mask
    assert (found[~mask] == 0).all()
    assert (found[mask] > 0).all()
    mean = found[mask].mean().item()
    assert rollouts.metrics["optimism_stat_mean"] == pytest.approx(mean, rel=1e-5)


def test_looking_changes_nothing_and_learning_does(rig):
    _, learner, episodes = rig
    first, _ = statistic(learner, episodes)
    again, _ = statistic(learner, episodes)
    assert torch.equal(first, again)
    metrics = updated(learner, episodes, 1)
    assert math.isfinite(metrics["optimism_ratio"].peek())
    after, _ = statistic(learner, episodes)
    assert not torch.allclose(first, after)


def test_a_restored_learner_goes_on_bit_exactly(rig):
    config, learner, episodes = rig
    updated(learner, episodes, 1)
    state = learner.get_state()
    updated(learner, episodes, 2)
    expected, _ = statistic(learner, episodes)
    other = make_learner(config)
    other.set_state(state)
    updated(other, episodes, 2)
    assert torch.equal(statistic(other, episodes)[0], expected)


def test_micro_batches_do_not_change_an_ensembles_step():
    found = []
    for tokens in (120, 16_384):
        config = hot_config(bonus_stat="ensemble", micro_batch_tokens=tokens)
        learner = make_learner(config)
        episodes = sample(config)
        columns = learner.columns(episodes)
        rollouts = learner.batch_pass(columns, 1).rollouts
        loss = learner.uncertainty.learn(columns, rollouts)["ensemble_loss"]
        found.append((loss, statistic(learner, episodes)[0]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-4)


def test_states_of_a_prompt_seen_for_the_first_time_are_farther():
    config = hot_config(bonus_stat="distance", distance={"decay": 1.0})
    learner = make_learner(config)
    episodes = sample(config, prompts=4, generations=8)
    for k in range(1, 6):
        updated(learner, episodes[:24], k)
    found, rollouts = statistic(learner, episodes)
    per_row = found.sum(1) / rollouts.lengths
    assert per_row[24:].mean() > 1.1 * per_row[:24].mean()


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("ensemble", {"sise": 4}, "nearest one is 'size'"),
        ("ensemble", {"size": 1}, "ensemble.size is 1"),
        ("ensemble", {"prior_scale": -0.1}, "prior_scale is -0.1"),
        ("ensemble", {"width": 7}, "width is 7; .* multiple of 2"),
        ("distance", {"decay": 0.0}, "decay is 0.0"),
        ("distance", {"ridge": 0.0}, "ridge is 0.0"),
    ],
)
def test_refusals(name, given, words):
    with pytest.raises(ValueError, match=words):
        hot_config(**{name: given})
