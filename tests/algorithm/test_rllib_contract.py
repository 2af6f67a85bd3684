"""RLlib's settings are honoured or refused in one sentence, from Python."""

import sys

import gymnasium
import numpy as np
import pytest
from ray.rllib.algorithms.dqn import DQNConfig
from ray.rllib.algorithms.sac import SACConfig
from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.tune import register_env

from rllib_distrl import RolloutSettings, SequencesFromEpisodes, wire_language_model
from rllib_distrl.algorithm.registry import algorithm_config
from rllib_distrl.recipe_schema import check_environment
from rllib_distrl.rollout.completion_env_runner import CompletionEnvRunner
from tests.helpers import COUNTDOWN, TINY, distrl_config


class Nothing(ConnectorV2):
    def __call__(self, *, batch, **kwargs):
        return batch


def nothing(*args):
    return Nothing()


EVERYWHERE = [
    (lambda c: c.env_runners(env_to_module_connector=nothing), "env_to_module_connector has no"),
    (lambda c: c.env_runners(module_to_env_connector=nothing), "module_to_env_connector has no"),
    (
        lambda c: c.env_runners(add_default_connectors_to_env_to_module_pipeline=False),
        "add_default_connectors_to_env_to_module_pipeline is False",
    ),
    (lambda c: c.environment(clip_rewards=True), "clip_rewards is True"),
    (lambda c: c.environment("CartPole-v1"), r"no token environment \(CartPoleEnv\)"),
    (lambda c: c.environment("distrl/Cuontdown-v0"), "cannot be made: .*Countdown"),
    (lambda c: c.environment(env_config={"tsk": "countdown"}), "nearest one is 'task'"),
    (lambda c: c.environment(env_config={"obs_mode": "context"}), "has obs_mode='context'"),
    (
        lambda c: c.environment(env_config={"max_completion_tokens": 7}),
        r"has max_completion_tokens=7, but the rollout has 24.*rollout\(max_completion_tokens=7\)",
    ),
    (
        lambda c: c.api_stack(
            enable_rl_module_and_learner=False, enable_env_runner_and_connector_v2=False
        ),
        "old API stack",
    ),
    (
        lambda c: c.multi_agent(policies={"a", "b"}, policy_mapping_fn=lambda *_: "a"),
        r"multi_agent\(policies=...\) names",
    ),
    (lambda c: c.framework("tf2"), "framework is 'tf2'"),
    (lambda c: c.framework(torch_compile_worker=True), "torch_compile_worker is True"),
    (
        lambda c: c.fault_tolerance(restart_failed_sub_environments=True),
        "restart_failed_sub_environments is True",
    ),
]
OURS = [
    (lambda c: c.training(train_batch_size_per_learner=64), "train_batch_size_per_learner is 64"),
    (lambda c: c.training(train_batch_size=64), "train_batch_size is 64"),
    (lambda c: c.env_runners(rollout_fragment_length=50), "rollout_fragment_length is 50"),
    (lambda c: c.env_runners(batch_mode="complete_episodes"), "batch_mode is 'complete_ep"),
    (lambda c: c.env_runners(num_envs_per_env_runner=4), r"is 4.*rollout\(max_batch_size=...\)"),
    (lambda c: c.training(model={"fcnet_hiddens": [8]}), "model is .*language model"),
    (lambda c: c.learners(num_learners=-2), "num_learners is -2; it must be >= 0"),
    (lambda c: c.env_runners(num_cpus_per_env_runner=-1), "num_cpus_per_env_runner is -1"),
    (lambda c: c.env_runners(sample_timeout_s=0), "sample_timeout_s is 0"),
    (lambda c: c.evaluation(evaluation_interval=-3), "evaluation_interval is -3"),
    (lambda c: c.rl_module(model_config={"model": TINY, "lorra": {}}), "nearest one is 'lora'"),
    (lambda c: c.training(controllers=[{"name": "uuid:uuid4"}]), "UUID, which names no setting"),
    (lambda c: c.training(prompt_sampler={"name": "operator:add"}), r"int, which has no next"),
    (lambda c: c.resources(num_gpus=1), "num_gpus is 1.*num_gpus_per_learner"),
    (lambda c: c.training(optimizer={"type": "sgd"}), "optimizer is"),
    (
        lambda c: c.rl_module(algorithm_config_overrides_per_module={"default_policy": {"lr": 1}}),
        "algorithm_config_overrides_per_module is .*there is one module",
    ),
    (lambda c: c.framework(torch_compile_learner=True), "torch_compile_learner is True"),
    (lambda c: c.update_from_dict({"num_generations": 8}), r"Use rollout\(num_generations=...\)"),
    (lambda c: c.update_from_dict({"n_quantile": 8}), "Did you mean 'n_quantiles'"),
    (lambda c: setattr(c, "entropy_coef", 0.1), "Did you mean 'entropy_coeff'"),
    (
        lambda c: c.training(
            learner_connector=nothing, add_default_connectors_to_learner_pipeline=False
        ).build_learner_connector(None, None),
        "has no SequencesFromEpisodes",
    ),
]


def stock(name, change=lambda config: None):
    config = algorithm_config(name).environment(COUNTDOWN) if isinstance(name, str) else name()
    config.environment(COUNTDOWN)
    change(config)
    return wire_language_model(config, TINY, RolloutSettings(max_completion_tokens=24))


@pytest.mark.parametrize(("change", "words"), EVERYWHERE + OURS)
def test_what_would_be_ignored_is_refused(change, words):
    config = distrl_config()
    with pytest.raises(ValueError, match=words):
        change(config)
        config.validate()


@pytest.mark.parametrize(("change", "words"), EVERYWHERE)
def test_rllibs_own_algorithms_refuse_the_same(change, words):
    with pytest.raises(ValueError, match=words):
        stock("PPO", change)


def test_settings_after_the_wiring_are_refused_by_the_drivers_runner():
    config = stock("PPO").env_runners(env_to_module_connector=nothing)
    with pytest.raises(ValueError, match="env_to_module_connector has no effect"):
        CompletionEnvRunner(config=config, worker_index=0)


@pytest.mark.parametrize("config", [DQNConfig, SACConfig])
def test_algorithms_without_a_stochastic_policy_are_refused(config):
    with pytest.raises(ValueError, match="Use one of ours, or RLlib's PPO, APPO or IMPALA"):
        stock(config)


def test_a_minibatch_of_ppo_holds_a_row():
    with pytest.raises(ValueError, match=r"minibatch_size is 24, .* has 25"):
        stock("PPO", lambda c: c.training(minibatch_size=24))
    stock("PPO", lambda c: c.training(minibatch_size=25))


def test_a_foreign_environment_of_tunes_registry_is_named():
    register_env("my-cart-pole", lambda config: gymnasium.make("CartPole-v1"))
    config = distrl_config().environment("my-cart-pole")
    config.validate()
    with pytest.raises(ValueError, match=r"no token environment \(CartPoleEnv\)"):
        CompletionEnvRunner(config=config, worker_index=0)


def test_what_tune_adds_to_a_trials_configuration_is_no_setting():
    variant = {**distrl_config().to_dict(), "__stderr_file__": None, "__trial_info__": None}
    config = type(distrl_config())().update_from_dict(variant)
    config.validate()
    assert config.rollout_settings.num_generations == 2


def test_limits_may_be_changed_between_validations():
    config = distrl_config()
    config.validate()
    config.rollout(max_completion_tokens=12)
    config.validate()
    assert config.env_config["max_completion_tokens"] == 12


def test_without_a_seed_every_build_has_another():
    seeds = set()
    for _ in range(2):
        config = distrl_config().debugging(seed=None)
        config.validate()
        seeds.add(config.seed)
        config.validate()
        seeds.add(config.seed)
    assert len(seeds) == 2
    assert None not in seeds


class Zeroed(ConnectorV2):
    """Takes all rewards away, from the episodes or, where there is one, from the batch."""

    def __call__(self, *, episodes, batch, **kwargs):
        if "default_policy" in batch:
            batch["default_policy"]["rewards"] *= 0
        for episode in episodes if not batch else ():
            episode.set_rewards(new_data=np.zeros(len(episode), dtype=np.float32))
        return batch


@pytest.mark.parametrize(
    "connector",
    [
        lambda obs, act: Zeroed(obs, act),
        lambda obs, act: [Zeroed(obs, act), Nothing(obs, act)],
        lambda obs, act: [SequencesFromEpisodes(obs, act), Zeroed(obs, act)],
    ],
)
def test_learner_connectors_run_before_the_batch_is_made_or_after_it(connector):
    config = distrl_config().training(learner_connector=connector)
    config.validate()
    runner = CompletionEnvRunner(config=config, worker_index=0)
    (episode,) = runner.sample(num_episodes=1)
    episode.set_rewards(new_data=np.ones(len(episode), dtype=np.float32))
    pipeline = config.build_learner_connector(runner.env.single_observation_space, None)
    batch = pipeline(
        rl_module=None, batch={}, episodes=[episode], shared_data={}, metrics=runner.metrics
    )["default_policy"]
    assert batch["rewards"].shape == (1, len(episode))
    assert not batch["rewards"].any()
    assert batch["loss_mask"].all()


def test_modules_of_the_working_directory_are_found(tmp_path, monkeypatch):
    """A console script does not have it on Python's path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path])
    (tmp_path / "own_envs.py").write_text(
        "import gymnasium\n"
        'gymnasium.register("own/E-v0", entry_point="distrl_envs.token_env:TokenEnv")\n'
    )
    (tmp_path / "own_stages.py").write_text("def same(batch, advantages):\n    return advantages\n")
    (tmp_path / "own_exit.py").write_text("import sys\nsys.exit(3)\n")
    shapers = [{"name": "own_stages:same"}]
    for own in (lambda: check_environment({"env": "own_envs:own/E-v0"}),
                distrl_config().environment("own_envs:own/E-v0").validate,
                distrl_config(shapers=shapers).validate):  # fmt: skip
        sys.path[:] = [path for path in sys.path if path != str(tmp_path)]
        for name in ("own_envs", "own_stages"):
            sys.modules.pop(name, None)
        gymnasium.registry.pop("own/E-v0", None)
        own()
    shapers[0]["name"] = "own_exit:same"
    with pytest.raises(ValueError, match=r"shaper: 'own_exit:same' could .*SystemExit: 3.*py:2"):
        distrl_config(shapers=shapers).validate()
