"""Optimiser steps counted by the optimisers themselves."""

import pytest

from rllib_distrl import RolloutSettings, wire_language_model
from rllib_distrl.algorithm.optimizer_steps import optimizer_steps
from rllib_distrl.algorithm.registry import algorithm_config
from tests.helpers import COUNTDOWN, TINY, distrl_config

pytestmark = pytest.mark.usefixtures("ray_session")


def test_steps_are_minibatches_times_epochs_and_survive_a_checkpoint(build, tmp_path):
    # 4 prompts x 2 completions in minibatches of 4, twice: four steps an iteration.
    config = distrl_config(minibatch_size=4, num_epochs=2)
    algo = build(config.copy())
    assert optimizer_steps(algo) is None
    for iteration in (1, 2):
        algo.train()
        assert optimizer_steps(algo) == 4 * iteration
    folder = algo.save_to_path(str(tmp_path / "checkpoint"))
    again = build(config.copy())
    again.restore_from_path(folder)
    again.train()
    assert optimizer_steps(again) == 12


@pytest.mark.slow
@pytest.mark.parametrize("learners", [0, 1])
def test_steps_of_rllibs_own_ppo(build, learners):
    rollout = RolloutSettings(num_generations=2, max_completion_tokens=24)
    config = algorithm_config("PPO").environment(COUNTDOWN).debugging(seed=1)
    config.env_runners(num_env_runners=0).learners(num_learners=learners)
    config.training(train_batch_size_per_learner=128, minibatch_size=64, num_epochs=2)
    algo = build(wire_language_model(config, TINY, rollout))
    trained = algo.train()["learners"]["default_policy"]["num_module_steps_trained"]
    # The last minibatch of an epoch is not full.
    assert optimizer_steps(algo) == -(-trained // 64) > 2
