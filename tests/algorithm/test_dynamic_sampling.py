"""Groups of equal returns are sampled anew."""

import pytest

from rllib_distrl.algorithm.dynamic_sampling import sample_informative
from rllib_distrl.algorithm.sampling import SampledGroups
from tests.helpers import distrl_config


class Finished:
    """An episode of which only the return is read."""

    def __init__(self, total):
        self.total = total

    def get_return(self):
        return self.total


class Rounds:
    """Serves the given rounds of returns, and notes how many groups each was asked for."""

    def __init__(self, *rounds):
        self.rounds, self.asked = list(rounds), []

    def __call__(self, n):
        self.asked.append(n)
        groups = [[Finished(total) for total in returns] for returns in self.rounds.pop(0)]
        assert len(groups) == n
        return SampledGroups(groups, [f"round {len(self.asked)}"], {1: 2 * n})


def returns(groups):
    return [[episode.total for episode in group] for group in groups]


def test_missing_groups_are_sampled_until_the_batch_is_full():
    rounds = Rounds([[0, 0], [1, 0], [1, 1]], [[0, 0], [0, 1]], [[0.5, 0]])
    batch, counts = sample_informative(rounds, 3, max_rounds=10)
    assert rounds.asked == [3, 2, 1]
    assert returns(batch.groups) == [[1, 0], [0, 1], [0.5, 0]]
    assert returns(batch.dropped) == [[0, 0], [1, 1], [0, 0]]
    assert batch.metrics == ["round 1", "round 2", "round 3"]
    assert batch.episodes_per_runner == {1: 12}
    assert counts == {"num_sampling_rounds": 3, "num_dropped_groups": 3}


def test_the_bound_fills_the_batch_with_what_was_dropped():
    rounds = Rounds([[0, 0], [1, 0], [1, 1]], [[0, 0], [0, 0]])
    batch, counts = sample_informative(rounds, 3, max_rounds=2)
    assert returns(batch.groups) == [[1, 0], [0, 0], [1, 1]]
    assert counts == {"num_sampling_rounds": 2, "num_dropped_groups": 2}


def test_one_round_keeps_every_group():
    batch, counts = sample_informative(Rounds([[0, 0], [1, 0]]), 2, max_rounds=1)
    assert returns(batch.groups) == [[0, 0], [1, 0]]
    assert counts == {"num_sampling_rounds": 1, "num_dropped_groups": 0}


def test_real_sampling_counts_every_token_and_serves_fresh_prompts(ray_session):
    # The tiny model earns nothing: every round is dropped, and the bound ends it.
    config = distrl_config(prompts=4, generations=2, max_sampling_rounds=3)
    algo = config.build_algo()
    try:
        result = algo.train()
        runners = result["env_runners"]
        assert runners["num_sampling_rounds"] == 3
        assert runners["num_dropped_groups"] == 8
        assert runners["num_episodes_lifetime"] == 24
        assert result["learners"]["default_policy"]["advantages_std"] >= 0
    finally:
        algo.stop()


@pytest.mark.parametrize(
    ("rollout", "training", "message"),
    [
        ({}, {"max_sampling_rounds": 0}, "max_sampling_rounds is 0"),
        ({"num_generations": 1}, {"max_sampling_rounds": 2}, "a group of one always has equal"),
        (
            {"max_staleness": 1},
            {"max_sampling_rounds": 2},
            "before it is known what is missing",
        ),
    ],
)
def test_bad_settings_are_refused(rollout, training, message):
    config = distrl_config(**training).rollout(**rollout)
    if rollout.get("max_staleness"):
        config.env_runners(num_env_runners=1)
    with pytest.raises(ValueError, match=message):
        config.validate()
