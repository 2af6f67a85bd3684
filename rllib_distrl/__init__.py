"""Distributional RL of language models as a Ray RLlib plugin.

>>> from rllib_distrl import DistRLConfig
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rllib_distrl.algorithms.distrl import DistRL
    from rllib_distrl.algorithms.distrl_config import DistRLConfig
    from rllib_distrl.algorithms.inspection import inspect_policy
    from rllib_distrl.algorithms.language_model import export_policy, wire_language_model
    from rllib_distrl.connectors.sequences_from_episodes import SequencesFromEpisodes
    from rllib_distrl.env_runners.completion_env_runner import CompletionEnvRunner
    from rllib_distrl.learners.distrl_learner import DistRLLearner
    from rllib_distrl.modules.causal_lm_module import CausalLMModule
    from rllib_distrl.modules.distrl_module import DistRLModule
    from rllib_distrl.runs import load_run
    from rllib_distrl.settings import RolloutSettings
    from rllib_distrl.token_table import TokenTable

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
    "CausalLMModule": "modules.causal_lm_module",
    "CompletionEnvRunner": "env_runners.completion_env_runner",
    "DistRL": "algorithms.distrl",
    "DistRLConfig": "algorithms.distrl_config",
    "DistRLLearner": "learners.distrl_learner",
    "DistRLModule": "modules.distrl_module",
    "RolloutSettings": "settings",
    "SequencesFromEpisodes": "connectors.sequences_from_episodes",
    "TokenTable": "token_table",
    "export_policy": "algorithms.language_model",
    "inspect_policy": "algorithms.inspection",
    "load_run": "runs",
    "wire_language_model": "algorithms.language_model",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    if _MODULES[name].startswith("algorithms."):
        _register_with_tune()
    return found


def _register_with_tune() -> None:
    """Makes `tune.Tuner("DistRL", ...)` work."""
    import_module(f"{__name__}.algorithms.registry").register_with_tune()


# Who has imported Tune pays nothing for the algorithms; others get their names with the first of
# our classes that they use.
_tune = sys.modules.get("ray.tune")
if _tune is not None and not getattr(_tune.__spec__, "_initializing", False):
    _register_with_tune()
