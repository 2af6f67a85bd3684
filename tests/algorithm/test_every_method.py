"""Every method of the registry trains two iterations, named as a recipe names it."""

import math

import pytest

from rllib_distrl.method.registry import KINDS, names
from tests.helpers import COUNTDOWN, distrl_config

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

# Where `training` takes a kind; lists take several methods.
PLACES = {
    "reward": "reward_transforms",
    "shaper": "shapers",
    "regulariser": "regularisers",
    "controller": "controllers",
    "group_loss": "policy_loss",
    "bonus_statistic": "bonus_stat",
}
LISTS = {"reward", "shaper", "regulariser", "controller"}
# What a method must be given.
SETTINGS = {
    "maxk": {"k": 2},
    "noise_backward": {"false_positive_rate": 0.1, "false_negative_rate": 0.1},
    "noise_forward": {"false_negative_rate": 0.1},
    "variance_mix": {"pool": 8},
    "beta_thompson": {"pool": 8},
    "beta_counts": {"pool": 8},
    "token_budget": {"tokens": 64},
    **{name: {"n_min": 1} for name in ("rank_budget", "sqrt_variance", "shadow_price")},
    "overlong": {"cache_tokens": 4},
    "dltv": {"bonus_coeff": 1.0},
}
# Settings of `training` without which it is refused.
WITH = {
    "opo": {"whiten_advantages": False, "entropy_coeff": 0.0},
    "zero": {"bonus_max_ratio": None},
    "lad": {"whiten_advantages": False, "aggregation": "sequence_mean", "entropy_coeff": 0.0},
    **{name: {"whiten_advantages": False} for name in ("maxk", "bnpo", "noise_forward")},
    **{name: {"aggregation": "sequence_mean"} for name in ("gspo", "sapo", "gmpo")},
    "best_of_k": {"whiten_advantages": False},
    "max_min_groups": {
        "reward_transforms": [{"name": "overlong", "cache_tokens": 4}, {"name": "max_min_groups"}]
    },
    "srft": {"advantage": {"name": "zero"}, "bonus_coeff": 0.0},
    "explore_filter_replay": {
        "critic": "none",
        "advantage": {"name": "grpo"},
        "bonus_coeff": 0.0,
        "importance_correction": "truncated",
    },
    "gdpo": {"reward_transforms": [{"name": "overlong", "cache_tokens": 4}]},
}
GROUP_LOSS = {"advantage": {"name": "zero"}, "bonus_coeff": 0.0}


def training(kind, name):
    spec = {"name": name, **SETTINGS.get(name, {})}
    more = {**(GROUP_LOSS if kind == "group_loss" else {}), **WITH.get(name, {})}
    if kind == "shaper" and name == "dltv":
        more["bonus_coeff"] = 0.0  # the setting adds it by itself
    if kind == "target" and name != "monte_carlo":
        more["critic_lambda"] = 0.95  # at 1 all are the observed returns
    return {PLACES.get(kind, kind): [spec] if kind in LISTS else spec, **more}


METHODS = [(kind, name) for kind in KINDS for name in names(kind)]


@pytest.mark.parametrize(("kind", "name"), METHODS)
def test_it_trains_two_iterations(kind, name, build):
    config = distrl_config(**training(kind, name))
    if name == "arpo":  # it branches at replies
        config.environment(COUNTDOWN, env_config={"task": "tests.rollout.turn_tasks:Talk"})
    algo = build(config)
    for _ in range(2):
        learned = algo.train()["learners"]["default_policy"]
    assert math.isfinite(learned["total_loss"]) and learned["num_module_steps_trained"] > 0
