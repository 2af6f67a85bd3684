"""Distributional RL of language models as a Ray RLlib plugin.

>>> from rllib_distrl import DistRLConfig
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from rllib_distrl import moved

if TYPE_CHECKING:
    from rllib_distrl.algorithm.distrl import DistRL, DistRLConfig
    from rllib_distrl.algorithm.export import export_policy
    from rllib_distrl.algorithm.inspection import inspect_policy
    from rllib_distrl.algorithm.wiring import wire_language_model
    from rllib_distrl.learner.connector import SequencesFromEpisodes
    from rllib_distrl.learner.distrl_learner import DistRLLearner
    from rllib_distrl.method.token_table import TokenTable
    from rllib_distrl.model.causal_lm_module import CausalLMModule, DistRLModule
    from rllib_distrl.rollout.completion_env_runner import CompletionEnvRunner
    from rllib_distrl.runs.reading import load_run
    from rllib_distrl.settings import RolloutSettings

__all__ = [
    "CausalLMModule",
    "CompletionEnvRunner",
    "DistRL",
    "DistRLConfig",
    "DistRLLearner",
    "DistRLModule",
    "RolloutSettings",
    "SequencesFromEpisodes",
    "TokenTable",
    "export_policy",
    "inspect_policy",
    "load_run",
    "wire_language_model",
]

# Imported when first used: `distrl --help` should not wait for Ray and torch.
_MODULES = {
    "CausalLMModule": "model.causal_lm_module",
    "CompletionEnvRunner": "rollout.completion_env_runner",
    "DistRL": "algorithm.distrl",
    "DistRLConfig": "algorithm.distrl",
    "DistRLLearner": "learner.distrl_learner",
    "DistRLModule": "model.causal_lm_module",
    "RolloutSettings": "settings",
    "SequencesFromEpisodes": "learner.connector",
    "TokenTable": "method.token_table",
    "export_policy": "algorithm.export",
    "inspect_policy": "algorithm.inspection",
    "load_run": "runs.reading",
    "wire_language_model": "algorithm.wiring",
}


moved.install()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    if _MODULES[name].startswith("algorithm."):
        _register_with_tune()
    return found


def _register_with_tune() -> None:
    """Makes `tune.Tuner("DistRL", ...)` work."""
    import_module(f"{__name__}.algorithm.registry").register_with_tune()


# Who has imported Tune pays nothing for the algorithms; others get their names with the first of
# our classes that they use.
_tune = sys.modules.get("ray.tune")
if _tune is not None and not getattr(_tune.__spec__, "_initializing", False):
    _register_with_tune()
