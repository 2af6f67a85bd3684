import pytest

from rllib_distrl import DistRLConfig, RolloutSettings, wire_language_model
from rllib_distrl.algorithm.registry import algorithm_config
from tests.helpers import COUNTDOWN, TINY, distrl_config, with_model_config

REFUSED = [
    ({"prompt_sampler": {"name": "unifrom"}}, "did you mean 'uniform'"),
    ({"prompt_sampler": {"name": "variance_mix", "share": 2.0}}, "share=2.0"),
    ({"n_quantiles": 0}, "n_quantiles is 0"),
    ({"quantile_huber_kappa": 0.0}, "quantile_huber_kappa is 0.0"),
    ({"lambda_": 1.5}, "lambda_ is 1.5"),
    ({"critic_lambda": -0.1}, "critic_lambda is -0.1"),
    ({"gamma": 2.0}, "gamma is 2.0"),
    ({"n_quantiles": 1}, "one quantile has no spread"),
    ({"bonus_coeff": -1.0}, "bonus_coeff is -1.0"),
    ({"read_out": {"name": "cvar", "level": 0.0}}, "level"),
    ({"read_out": {"name": "median"}}, "unknown read_out 'median'"),
    ({"critic": "sepparate"}, "critic is 'sepparate'"),
    ({"target": "td"}, "unknown target 'td'"),
    ({"bonus_schedule": "linear"}, "needs bonus_horizon"),
    ({"quantile_loss": "matched", "target": "sample_replacement"}, "pairwise"),
    ({"minibatch_size": 3}, "does not divide the 8 sequences"),
    ({"minibatch_size": 16}, "does not divide the 8 sequences"),
    ({"micro_batch_tokens": 10}, "cannot hold one sequence"),
    ({"advantage": {"name": "gea"}}, "did you mean 'gae'"),
    ({"policy_loss": {"name": "clip", "clip_parm": 0.1}}, "clip_param"),
    ({"dual_clip": 0.5}, "dual_clip is 0.5"),
    ({"precision": "fp16"}, "precision is 'fp16'"),
    ({"lr": 0.0}, "lr is 0.0"),
    ({"lr_schedule": "linear"}, "lr_schedule is 'linear'"),
    ({"lr_schedule": "cosine"}, "needs lr_decay_iterations above 1"),
    (
        {"lr_schedule": "cosine", "lr_warmup_iterations": 9, "lr_decay_iterations": 9},
        "above 9",
    ),
    ({"lr_warmup_iterations": -1}, "lr_warmup_iterations is -1"),
    ({"lr_min_ratio": 1.5}, "lr_min_ratio is 1.5"),
    ({"lr": [[0, 1e-3], [9, 0.0]], "lr_warmup_iterations": 2}, "a schedule already"),
    ({"importance_correction": "truncate"}, "did you mean 'truncated'"),
    ({"importance_correction": "masked", "importance_bound": 1.0}, "importance_bound is 1.0"),
    ({"regularisers": [{"name": "kll"}]}, "did you mean 'kl'"),
    ({"regularisers": [{"name": "kl", "coeff": -1.0}]}, "coeff must be >= 0"),
    ({"regularisers": [{"name": "kl", "estimator": "k4"}]}, "must be one of"),
    ({"regularisers": [{"name": "kl", "estimator": "k1"}]}, "zero on average.*'kl_penalty'"),
    ({"reward_transforms": [{"name": "kl_penalty", "estimator": "k"}]}, "must be one of"),
    ({"controllers": [{"name": "adaptive_entropy", "step": 0.0}]}, "step > 0"),
    ({"controllers": [{"name": "adaptive_entropy"}] * 2}, "Two controllers move entropy_coeff"),
    (
        {"controllers": [{"name": "adaptive_entropy"}], "entropy_coeff": 0.01},
        "a controller moves it",
    ),
]


@pytest.mark.parametrize(("training", "message"), REFUSED)
def test_bad_settings_are_refused(training, message):
    with pytest.raises(ValueError, match=message):
        distrl_config(**training).validate()


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        ({"engine": "tensorrt"}, "engine is 'tensorrt'"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"top_p": 0.9}, "another distribution"),
        ({"num_generations": 0}, "num_generations is 0"),
        ({"max_completion_tokens": 500}, "window"),
    ],
)
def test_bad_rollouts_are_refused(rollout, message):
    with pytest.raises(ValueError, match=message):
        distrl_config().rollout(**rollout).validate()


def test_adapters_are_checked_before_anything_starts():
    config = distrl_config()
    with_model_config(config, lora={"targets": ["q"]})
    with pytest.raises(ValueError, match="linear layers down_proj"):
        config.validate()


def test_vllm_must_be_installed(monkeypatch):
    monkeypatch.setattr("rllib_distrl.settings.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"vLLM is not installed.*rllib-distrl\[vllm\]"):
        distrl_config().rollout(engine="vllm").validate()


def test_filters_are_for_corrected_training_only():
    with pytest.raises(ValueError, match=r"engine_options has sleep"):
        distrl_config().rollout(engine_options={"sleep": True}).validate()
    distrl_config(importance_correction="masked").rollout(top_p=0.9).validate()
    rollout = RolloutSettings(max_completion_tokens=24, top_k=5)
    with pytest.raises(ValueError, match="V-trace"):
        wire_language_model(algorithm_config("PPO").environment(COUNTDOWN), TINY, rollout)
    wire_language_model(algorithm_config("IMPALA").environment(COUNTDOWN), TINY, rollout)


def test_groups_must_divide_among_learners():
    with pytest.raises(ValueError, match="does not divide among num_learners=3"):
        distrl_config(prompts=4).learners(num_learners=3).validate()


def test_a_model_must_be_named():
    with pytest.raises(ValueError, match="No model is named"):
        DistRLConfig().environment(COUNTDOWN).validate()


def test_the_modules_settings_are_said_once():
    twice = {"model": TINY, "temperature": 0.7, "precision": "bf16"}
    with pytest.raises(ValueError, match=r"model_config=.*has precision, temperature, which"):
        distrl_config().rl_module(model_config=twice).validate()
    stock = algorithm_config("PPO").environment(COUNTDOWN)
    stock.rl_module(model_config={"precision": "bf17"})
    with pytest.raises(ValueError, match="precision is 'bf17'; it must be one of fp32, bf16"):
        wire_language_model(stock, TINY, RolloutSettings(max_completion_tokens=24))


def test_an_unknown_rollout_setting_is_named():
    with pytest.raises(ValueError, match="num_generation"):
        DistRLConfig().rollout(num_generation=3)


def test_the_nearest_algorithm_is_named():
    with pytest.raises(ValueError, match="Did you mean 'DistRL'"):
        algorithm_config("distrl")


def test_settings_reach_module_and_env():
    config = distrl_config(n_quantiles=5, critic="shared").rollout(temperature=0.7)
    config.validate()
    assert config.model_config["model"] == TINY
    assert config.model_config["n_quantiles"] == 5
    assert config.model_config["temperature"] == 0.7
    assert config.env_config["max_completion_tokens"] == 24
    assert config.env_config["obs_mode"] == "token"
