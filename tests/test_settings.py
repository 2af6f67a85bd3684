"""The settings' types, bounds and words, in recipes and in Python."""

import inspect
from pathlib import Path

import numpy as np
import pytest
from ray import tune

from rllib_distrl import DistRLConfig, RolloutSettings, settings, wire_language_model
from rllib_distrl.algorithm.registry import algorithm_config
from rllib_distrl.settings import (
    EvalSettings,
    RunSettings,
    Settings,
    TrainingSettings,
)
from tests.helpers import COUNTDOWN, TINY, distrl_config

REFUSED = [
    (
        TrainingSettings,
        {"micro_batch_tokens": "most"},
        "training.micro_batch_tokens is 'most'; it must be an integer >= 1, or 'auto'.",
    ),
    (RunSettings, {"iterations": 0}, "run.iterations is 0; it must be >= 1."),
    (RunSettings, {"iterations": 1.5}, "run.iterations is 1.5; it must be an integer >= 1."),
    (RunSettings, {"iterations": "8"}, "run.iterations is '8'; it must be an integer >= 1."),
    (RunSettings, {"iterations": True}, "run.iterations is True; it must be an integer >= 1."),
    (EvalSettings, {"top_p": 0}, "eval.top_p is 0; it must be in (0, 1]."),
    (EvalSettings, {"k": [1, True]}, "eval.k[1] is True; it must be an integer."),
    (
        EvalSettings,
        {"split": "tst"},
        "eval.split is 'tst'; it must be one of train, validation, test. Did you mean 'test'?",
    ),
    (
        TrainingSettings,
        {"dual_clip": 0.5},
        "training.dual_clip is 0.5; it must be above 1, or left out.",
    ),
    (
        TrainingSettings,
        {"init_value": float("nan")},
        "training.init_value is nan; it must be a finite number, or left out.",
    ),
    (
        TrainingSettings,
        {"advantage": "gae"},
        "training.advantage is 'gae'; it must be a table such as {name = 'gae'}.",
    ),
    (
        TrainingSettings,
        {"shapers": ["dltv"]},
        "training.shapers[0] is 'dltv'; it must be a table such as {name = 'dltv'}.",
    ),
    (
        TrainingSettings,
        {"critic_pretraining": {"rollout": 8}},
        "Unknown key 'rollout' in [critic_pretraining]. The nearest one is 'rollouts'. "
        "Known keys: epochs, lr, minibatch_size, rollouts, samples.",
    ),
]


@pytest.mark.parametrize(("table", "values", "sentence"), REFUSED)
def test_one_sentence_says_what_was_got_and_what_is_allowed(table, values, sentence):
    with pytest.raises(ValueError) as caught:
        table(**values)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("table", "values", "sentence"),
    [
        (RunSettings, {"iterations": 10**12}, "1000000000000; it must be in [1, 1000000000]."),
        (TrainingSettings, {"bonus_coeff": 1e30}, "1e+30; it must be in [0, 1000000000]."),
        (
            TrainingSettings,
            {"init_value": -1e38},
            "it must be in [-1000000000, 1000000000], or left out.",
        ),
        (TrainingSettings, {"entropy_coeff": [[0, 1e30]]}, "is [[0, 1e+30]]; it must be"),
        (RolloutSettings, {"temperature": 1e-300}, "it must be in [0.001, 1000.0]."),
    ],
)
def test_numbers_beyond_all_reason_are_refused(table, values, sentence):
    with pytest.raises(ValueError) as caught:
        table(**values)
    assert sentence in str(caught.value)


def test_values_are_taken_as_python_and_numpy_write_them():
    taken = TrainingSettings(
        n_quantiles=np.int64(3),
        clip_param=np.float64(0.25),
        micro_batch_tokens=1e6,
        critic_checkpoint=Path("/a/critic"),
        entropy_coeff=[[0, 0.1], [100, 0]],
        vf_loss_coeff=2,
    )
    assert repr(taken.n_quantiles) == "3"
    assert repr(taken.clip_param) == "0.25"
    assert repr(taken.micro_batch_tokens) == "1000000"
    assert taken.critic_checkpoint == "/a/critic"
    assert taken.vf_loss_coeff == 2


def test_the_configuration_holds_the_checked_values():
    config = distrl_config(n_quantiles=np.int64(5), lr=np.float64(1e-3))
    config.rollout(temperature=np.float64(0.5), max_batch_size=64.0)
    config.validate()
    assert repr((config.n_quantiles, config.lr)) == "(5, 0.001)"
    assert repr(config.rollout_settings.temperature) == "0.5"
    assert repr(config.rollout_settings.max_batch_size) == "64"


def test_tuples_are_as_good_as_lists():
    config = distrl_config(
        lr=((0, 1e-3), (100, 1e-4)),
        entropy_coeff=[(0, 0.1), (100, 0.0)],
        shapers=({"name": "entropy_shaped"},),
    )
    config.validate()
    assert config.lr == [[0, 1e-3], [100, 1e-4]]
    assert config.entropy_coeff == [[0, 0.1], [100, 0.0]]
    assert config.shapers == [{"name": "entropy_shaped"}]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"lr": "1e-3"}, "training.lr: wanted a number or a list, got '1e-3'"),
        ({"num_epochs": 1.5}, "training.num_epochs: wanted an integer, got 1.5"),
        ({"n_quantiles": "16"}, "training.n_quantiles is '16'"),
        ({"num_epochs": True}, "training.num_epochs: wanted an integer, got true"),
        ({"lr": None}, "lr is None; it must be above 0"),
        ({"entropy_coeff": [[5, 0.1], [9, 0.0]]}, "the first timestep must be 0"),
        ({"entropy_coeff": [[0, 0.1], [9, float("nan")]]}, "training.entropy_coeff"),
    ],
)
def test_types_are_checked_in_python_too(values, words):
    with pytest.raises(ValueError, match=words):
        distrl_config(**values).validate()


@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.parametrize(
    ("table", "values", "words"),
    [
        ("env_runners", {"num_env_runners": "2"}, "num_env_runners: wanted an integer, got '2'"),
        ("env_runners", {"num_env_runners": 1.5}, "num_env_runners: wanted an integer, got 1.5"),
        ("env_runners", {"explore": "no"}, "explore: wanted true or false"),
        ("evaluation", {"evaluation_interval": "2"}, "evaluation_interval: wanted an integer"),
        ("debugging", {"seed": "3"}, "debugging.seed: wanted an integer, got '3'"),
        ("debugging", {"seed": -1}, r"seed is -1; it must be in \[0, 4294967295\]"),
        ("debugging", {"seed": 2**32}, "seed is 4294967296"),
        ("learners", {"custom_resources_per_learner": "big"}, "wanted a table, got 'big'"),
    ],
)
def test_so_are_those_of_rllibs_own_tables(table, values, words, stock):
    config = algorithm_config("PPO").environment(COUNTDOWN) if stock else distrl_config()
    getattr(config, table)(**values)
    with pytest.raises(ValueError, match=words):
        if stock:
            wire_language_model(config, TINY, RolloutSettings(max_completion_tokens=24))
        config.validate()


def test_rllibs_own_settings_take_numpy_too():
    config = distrl_config().env_runners(num_env_runners=np.int64(2)).debugging(seed=np.int32(3))
    config.evaluation(evaluation_interval=1e1)
    config.validate()
    found = (config.num_env_runners, config.seed, config.evaluation_interval)
    assert repr(found) == "(2, 3, 10)"
    distrl_config(entropy_coeff=np.array([[0, 0.1], [100, 0.0]])).validate()


@pytest.mark.parametrize("kind", [Path, str])
def test_a_model_is_named_by_a_path_or_a_string(kind):
    for config in (distrl_config(kind(TINY)), algorithm_config("PPO").environment(COUNTDOWN)):
        config = wire_language_model(config, kind(TINY), RolloutSettings(max_completion_tokens=24))
        config.validate()
        assert config.model_config["model"] == TINY
    config = distrl_config(kind(TINY))
    config.validate()
    assert config.model_config["model"] == TINY
    with pytest.raises(ValueError, match="has model = 3; it must be a string or a path"):
        distrl_config(3).validate()


def test_python_names_the_nearest_setting():
    with pytest.raises(ValueError, match="nearest one is 'n_quantiles'"):
        DistRLConfig().training(n_quantile=3)


def test_every_default_is_allowed_and_every_setting_explained():
    tables = [each for each in Settings.__subclasses__() if each.__module__ == settings.__name__]
    assert len(tables) == 8
    for table in tables:
        if table.table != "critic_pretraining":  # It has a required choice.
            assert table(**table.defaults()).to_dict() == table().to_dict()
        assert all(field.description for field in table.model_fields.values()), table


def test_help_shows_the_settings():
    parameters = inspect.signature(DistRLConfig.training).parameters
    assert parameters["n_quantiles"].default == 16
    assert DistRLConfig().n_quantiles == 16


def test_tune_searches_rollout_settings():
    config = distrl_config().rollout(num_generations=tune.grid_search([2, 4]))
    found = []

    def trial(variant):
        made = DistRLConfig().update_from_dict(variant)
        found.append(made.rollout_settings.num_generations)

    from ray.tune.search.variant_generator import generate_variants

    for _, variant in generate_variants(config.to_dict()):
        trial(variant)
    assert sorted(found) == [2, 4]
    assert RolloutSettings(num_generations=2).episodes_per_iteration == 64


@pytest.mark.parametrize(
    ("trackers", "message"),
    [
        ([{"project": "x"}], "got the name None; known are mlflow, wandb"),
        ([{"name": "wanbd"}], "got the name 'wanbd'; known are mlflow, wandb"),
        ([{"name": "mlflow"}, {"name": "mlflow"}], "mlflow stands there 2 times"),
    ],
)
def test_bad_trackers_are_refused(trackers, message):
    with pytest.raises(ValueError, match=message):
        RunSettings(trackers=trackers)


def test_a_trackers_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("rllib_distrl.settings.find_spec", lambda name: None)
    run = RunSettings(trackers=[{"name": "wandb"}])
    with pytest.raises(ValueError, match=r"wandb is not installed. pip install 'wandb'"):
        run.check_machine()
