"""Algorithms by name: ours first, then RLlib's own."""

from importlib import import_module
from typing import Any

from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

from rllib_distrl.recipe_schema import ALIKE, nearest

# Name to "module:config class". RLlib's own are those that sample tokens from a stochastic
# policy; looking them up here avoids RLlib's registry, which imports every algorithm.
ALGORITHMS = {
    "DistRL": "rllib_distrl.algorithm.distrl:DistRLConfig",
    "GRPO": "rllib_distrl.algorithm.presets:GRPOConfig",
    "DrGRPO": "rllib_distrl.algorithm.presets:DrGRPOConfig",
    "RLOO": "rllib_distrl.algorithm.presets:RLOOConfig",
    "ReinforcePlusPlus": "rllib_distrl.algorithm.presets:ReinforcePlusPlusConfig",
    "DAPO": "rllib_distrl.algorithm.presets:DAPOConfig",
    "GSPO": "rllib_distrl.algorithm.presets:GSPOConfig",
    "LAD": "rllib_distrl.algorithm.presets:LADConfig",
    "SAO": "rllib_distrl.algorithm.presets:SAOConfig",
    "PPO": "ray.rllib.algorithms.ppo:PPOConfig",
    "APPO": "ray.rllib.algorithms.appo:APPOConfig",
    "IMPALA": "ray.rllib.algorithms.impala:IMPALAConfig",
}


def register_with_tune() -> None:
    """Lets `tune.Tuner("DistRL", ...)` and `tune.run` find our algorithms by name.

    Ray keeps the names with its cluster: after `ray.shutdown` they have to be given again.
    """
    from ray.tune import register_trainable

    for name, place in ALGORITHMS.items():
        if place.startswith("rllib_distrl."):
            algorithm: Any = _load(place).algo_class
            register_trainable(name, algorithm)


def algorithm_config(name: str) -> AlgorithmConfig:
    """A fresh config of the algorithm called ``name``.

    Raises:
        ValueError: if there is none, with the nearest name.
    """
    if name not in ALGORITHMS:
        by_lower_case = {known.lower(): known for known in ALGORITHMS}
        near = nearest(name.lower(), by_lower_case, ALIKE)
        hint = f" Did you mean {by_lower_case[near]!r}?" if near else ""
        known = ", ".join(ALGORITHMS)
        raise ValueError(f"Unknown algorithm {name!r}.{hint} Known: {known}.")
    return _load(ALGORITHMS[name])


def _load(place: str) -> AlgorithmConfig:
    module, class_name = place.split(":")
    return getattr(import_module(module), class_name)()
