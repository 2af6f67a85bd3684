"""Env runners come and go while training."""

import pytest
from ray import tune

from rllib_distrl.algorithm.export import policy_state
from rllib_distrl.algorithm.scaling import check_scale, scale_env_runners
from rllib_distrl.algorithm.weight_sync import runner_weights
from tests.algorithm.recorded_distrl import (
    RecordedDistRL,
    held_weights,
    recorded,
    runner_metric,
)
from tests.algorithm.test_distrl import assert_same_update
from tests.algorithm.test_stock_algorithms import stock
from tests.helpers import distrl_config, with_model_config

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
        assert algo.fleet.serving() == [1]  # training does not wait for the new ones
        results.append(algo.train())
        assert algo.fleet.wait_for(3, timeout_s=400)
        results.append(algo.train())
        assert algo.contributors[-1] == {1: 4, 2: 4, 3: 4}
        assert set(held_weights(algo).values()) == {algo.fleet.weights}

        algo.scale_env_runners(1)
        results.append(algo.train())
        assert algo.contributors[-1] == {1: 12}
        assert algo.env_runner_group.num_remote_env_runners() == 1
        sizes = [result["env_runners"]["num_env_runners"] for result in results]
        assert sizes[0] == 1 and sizes[2:] == [3, 1]
        assert runner_metric(results, "num_failed_env_runners") == 0
        for _ in results:
            undisturbed.train()
        assert algo.keys == undisturbed.keys
        assert_same_update(policy_state(undisturbed), policy_state(algo))
    finally:
        algo.stop()
        undisturbed.stop()


@pytest.mark.slow
def test_one_three_one_inside_a_tune_trial(tmp_path):
    def scale(*, algorithm, result, **kwargs):
        # Runs in the trial's process, between two iterations.
        held = set(held_weights(algorithm).values())
        result["held"] = int(held == {algorithm.fleet.weights})
        result["contributors"] = len(algorithm.contributors[-1])
        if algorithm.iteration == 1:
            algorithm.scale_env_runners(3)
            result["up"] = int(algorithm.fleet.wait_for(3, timeout_s=400))
        if algorithm.iteration == 3:
            algorithm.scale_env_runners(1)

    config = recorded(1).callbacks(on_train_result=scale)
    tuner = tune.Tuner(
        RecordedDistRL,
        param_space=config,
        run_config=tune.RunConfig(
            storage_path=str(tmp_path), stop={"training_iteration": 4}, verbose=0
        ),
    )
    result = tuner.fit()[0]
    assert result.error is None
    history = result.metrics_dataframe
    assert history["env_runners/num_env_runners"].tolist() == [1, 3, 3, 1]
    assert history["contributors"].tolist() == [1, 3, 3, 1]
    assert history["held"].tolist() == [1, 1, 1, 1]
    assert history["env_runners/num_failed_env_runners"].sum() == 0


@pytest.mark.slow
def test_rllibs_own_algorithms_are_scaled_by_the_same_function():
    config = stock("PPO", train_batch_size_per_learner=128, minibatch_size=64, num_epochs=1)
    # The probes of new runners are then held to what bfloat16 can hold.
    with_model_config(config, precision="bf16")
    algo = config.env_runners(num_env_runners=1, num_cpus_per_env_runner=0.25).build_algo()
    try:
        algo.train()
        scale_env_runners(algo, 2)
        _, weights = runner_weights(algo.learner_group)
        held = algo.env_runner_group.foreach_env_runner(
            lambda runner: (runner.engine.version, runner.engine.weights_hash()),
            local_env_runner=False,
        )
        assert held[1] == weights
        result = algo.train()
        assert result["fault_tolerance"]["num_healthy_workers"] == 2
        scale_env_runners(algo, 1)
        assert algo.train()["fault_tolerance"]["num_healthy_workers"] == 1
    finally:
        algo.stop()
