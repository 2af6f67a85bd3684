"""Env runners come and go while training."""

import pytest

from rllib_distrl.algorithms.language_model import policy_state
from rllib_distrl.algorithms.scaling import check_scale, scale_env_runners
from tests.algorithms.recorded_distrl import (
    held_weights,
    recorded,
    runner_metric,
    train_until,
)
from tests.algorithms.test_distrl import assert_same_update
from tests.helpers import distrl_config

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.mark.parametrize(
    ("runners", "limit", "n", "message"),
    [
        (1, 0, -1, "must be >= 0"),
        (1, 0, 0, "Ask for at least 1"),
        (1, 0, 3, "3 x 1 CPU, and the cluster has 2"),
        (1, 4, 5, "max_env_runners is 4"),
    ],
)
def test_numbers_that_are_refused(runners, limit, n, message):
    config = distrl_config().env_runners(num_env_runners=runners).rollout(max_env_runners=limit)
    with pytest.raises(ValueError, match=message):
        check_scale(config, n)


def test_numbers_that_are_allowed():
    check_scale(distrl_config().env_runners(num_env_runners=0), 0)
    check_scale(distrl_config().env_runners(num_env_runners=1), 2)
    check_scale(distrl_config().rollout(max_env_runners=5), 5)


def test_a_limit_below_the_first_number_is_refused():
    config = distrl_config().env_runners(num_env_runners=3).rollout(max_env_runners=2)
    with pytest.raises(ValueError, match="num_env_runners=3 exceeds"):
        config.validate()


@pytest.mark.slow
def test_one_three_one_costs_nothing_and_everybody_contributes():
    undisturbed = recorded(0).build_algo()
    algo = recorded(1).build_algo()
    try:
        results = [algo.train()]
        scale_env_runners(algo, 3)
        assert algo.fleet.present() == 3
        assert len(algo.fleet.serving()) == 1  # the new ones are not waited for
        results += train_until(algo, serving=3)
        results.append(algo.train())
        assert set(algo.contributors[-1]) == set(algo.fleet.serving())
        assert len(set(held_weights(algo).values())) == 1
        assert set(held_weights(algo).values()) == {algo.fleet.weights}

        algo.scale_env_runners(1)
        results.append(algo.train())
        assert algo.contributors[-1] == {1: 12}
        assert algo.env_runner_group.num_remote_env_runners() == 1
        assert [r["env_runners"]["num_env_runners"] for r in (results[0], *results[-2:])] == [
            1,
            3,
            1,
        ]
        assert runner_metric(results, "num_failed_env_runners") == 0
        for _ in results:
            undisturbed.train()
        assert algo.keys == undisturbed.keys
        assert_same_update(policy_state(undisturbed), policy_state(algo))
    finally:
        algo.stop()
        undisturbed.stop()
