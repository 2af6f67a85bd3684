"""RLlib's own algorithms, unchanged, on the same env id, runner class and module."""

import numpy as np
import pytest
import torch
from ray.rllib.algorithms.ppo import PPO

from rllib_distrl import RolloutSettings, wire_language_model
from rllib_distrl.algorithm.cluster import ClusterChecked
from rllib_distrl.algorithm.export import export_policy, policy_state
from rllib_distrl.algorithm.registry import algorithm_config
from rllib_distrl.model.causal_lm_module import CausalLMModule
from rllib_distrl.rollout.completion_env_runner import CompletionEnvRunner
from tests.helpers import COUNTDOWN, TINY

pytestmark = pytest.mark.usefixtures("ray_session")


def stock(name, told="none", **training):
    config = algorithm_config(name).environment(COUNTDOWN).debugging(seed=1)
    config.env_runners(num_env_runners=0).learners(num_learners=0)
    # The tiny model earns next to nothing: the entropy bonus gives the policy a gradient.
    config.training(lr=1e-3, gamma=1.0, entropy_coeff=0.01, **training)
    config.rl_module(model_config={"critic_observation": told})
    rollout = RolloutSettings(max_completion_tokens=24, num_generations=2, temperature=2.0)
    if told != "none":  # then it earns something, so that there are values to learn
        config.environment(env_config={"task_config": {"partial_credit": True}})
        rollout = rollout.model_copy(update={"temperature": 0.7})
    return wire_language_model(config, TINY, rollout)


def test_ppo_trains_two_iterations(tmp_path):
    algo = stock("PPO", train_batch_size_per_learner=256, minibatch_size=128, num_epochs=1)
    algo = algo.build_algo()
    try:
        assert isinstance(algo, PPO)
        # What lies before PPO's own step only asks afterwards whether there are runners left.
        assert super(ClusterChecked, algo).training_step.__func__ is PPO.training_step
        assert isinstance(algo.env_runner, CompletionEnvRunner)
        assert type(algo.env_runner.module) is CausalLMModule
        before = policy_state(algo)
        results = [algo.train() for _ in range(2)]
        for result in results:
            metrics = result["learners"]["default_policy"]
            assert metrics["entropy"] > 0
            assert metrics["vf_loss"] >= 0
            assert result["env_runners"]["episode_len_mean"] > 1
        after = policy_state(algo)
        assert any(not torch.equal(before[name], after[name]) for name in before)
        export_policy(algo, tmp_path / "model")
        assert (tmp_path / "model" / "model.safetensors").is_file()
    finally:
        algo.stop()


def test_ppo_trains_a_critic_that_is_told_the_verifiers_state():
    sizes = {"train_batch_size_per_learner": 128, "minibatch_size": 128}
    algo = stock("PPO", "state", **sizes, num_epochs=1).build_algo()
    try:
        algo.train()
        state = algo.learner_group.get_state()["learner"]["rl_module"]["default_policy"]
        # It starts at zero: only a gradient through the numbers of the batch moves it.
        assert np.abs(state["observation_head.output"]).max() > 0
    finally:
        algo.stop()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["APPO", "IMPALA"])
def test_asynchronous_algorithms_train(name):
    config = stock(name, train_batch_size_per_learner=100)
    config.env_runners(num_env_runners=1)
    algo = config.build_algo()
    try:
        before = policy_state(algo)
        for _ in range(20):
            result = algo.train()
            if result["env_runners"].get("num_env_steps_sampled_lifetime", 0) > 300:
                break
        after = policy_state(algo)
        assert any(not torch.equal(before[key], after[key]) for key in before)
    finally:
        algo.stop()
