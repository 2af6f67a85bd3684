"""What Ray 2.60's RLlib lacks or gets wrong and has no public way around; each worked around once.

Private names of Ray are read here, or are inherited from RLlib's classes; `PRIVATE_NAMES` lists all
of both, and those of other libraries, and a test says which are gone when one of these is upgraded.
Where nothing else is said, no issue was found upstream.
"""

import os
from collections.abc import Mapping
from typing import Any

EVALUATION, SECONDS = "evaluation", "seconds"
OPTIMIZER_STEPS = "num_optimizer_steps_lifetime"
_STEPS_TIMEOUT_S = 30.0

PRIVATE_NAMES: Mapping[str, tuple[str, ...]] = {
    # Read or set by the functions below.
    "ray.rllib.env.env_runner_group:EnvRunnerGroup": ("_worker_manager",),
    "ray.rllib.utils.actor_manager:FaultTolerantActorManager": ("_next_id", "_num_actor_restarts"),
    "ray.tune.registry": ("_global_registry",),
    # What is refused where it has no effect, and what modules are told.
    "ray.rllib.algorithms.algorithm_config:AlgorithmConfig": (
        "_env_to_module_connector",
        "_model_config",
        "_model_config_auto_includes",
        "_module_to_env_connector",
        "_rl_module_spec",
        "_train_batch_size_per_learner",
    ),
    # Inherited: whole completions in place of a loop over steps, with its metrics and callbacks.
    "ray.rllib.env.single_agent_env_runner:SingleAgentEnvRunner": (
        "_callbacks",
        "_device",
        "_done_episodes_for_metrics",
        "_increase_sampled_metrics",
        "_log_env_steps",
        "_make_on_episode_callback",
        "_metrics_num_env_steps_sampled",
        "_needs_initial_reset",
        "_sample",
        "_seed",
        "_weights_seq_no",
    ),
    # Inherited: minibatches of sequences, micro-batches, steps that can be refused.
    "ray.rllib.core.learner.torch.torch_learner:TorchLearner": (
        "_device",
        "_learner_connector",
        "_log_trainable_parameters",
        "_make_modules_ddp_if_necessary",
        "_map_module_to_device",
        "_module",
        "_named_optimizers",
        "_optimizer_parameters",
        "_params",
        "_set_optimizer_state",
        "_uncompiled_update",
        "_update",
        "_weights_seq_no",
    ),
    # Inherited: a state that all learners put together.
    "ray.rllib.core.learner.learner_group:LearnerGroup": (
        "_check_component",
        "_get_results",
        "_get_subcomponents",
        "_worker_manager",
    ),
    # RLlib's own hooks, for all their names.
    "ray.rllib.core.rl_module.torch.torch_rl_module:TorchRLModule": (
        "_forward",
        "_forward_exploration",
        "_forward_inference",
    ),
    # Ray takes SIGTERM while it starts, ends its own processes with it, and never looks at what an
    # upload to W&B has returned.
    "ray._private.utils": ("set_sigterm_handler",),
    "ray._private.worker": ("global_worker",),
    "ray._private.node:Node": ("all_processes",),
    "ray.air.integrations.wandb:WandbLoggerCallback": ("_trial_logging_futures",),
    # Time limits of wrappers.
    "gymnasium.wrappers:TimeLimit": ("_max_episode_steps",),
    # Attention over packed rows, and which models can have it.
    "torch:ops.aten": (
        "_flash_attention_forward",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
    "transformers:PreTrainedModel": (
        "_can_set_attn_implementation",
        "_hf_peft_config_loaded",
        "_is_stateful",
        "_supports_attention_backend",
    ),
    "transformers:PreTrainedConfig": ("_attn_implementation",),
    # Names of parameters under activation checkpointing; writes to a tensor, counted.
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper": ("_CHECKPOINT_PREFIX",),
    "torch:Tensor": ("_version",),
}
"""{module, or module:attribute: private names that this package reads, sets or overrides}."""


def leave_memory_unfilled() -> None:
    """Takes back half of what a seed does to PyTorch: filling all memory before its first use.

    RLlib seeds a process with `torch.use_deterministic_algorithms(True)`, which also fills every
    new tensor with NaN. Nothing here reads memory that it has not written, and filling it took an
    eighth of an update of 135 million parameters.
    """
    from torch.utils import deterministic

    deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


def actor_manager(env_runner_group: Any) -> Any:
    """What holds the remote runners of an `EnvRunnerGroup`.

    The group has no method that takes a runner out, says which one is which, or marks one as not
    ready; `add_workers` puts new ones into bundles that the placement group of a Tune trial does
    not have (env/env_runner_group.py, _make_worker; Tune's side is ray-project/ray#14908,
    closed as stale). Its manager can: those of its methods that we call are public.
    """
    return env_runner_group._worker_manager


def next_runner_number(manager: Any) -> int:
    """The number that the manager will give the next runner, which must know it beforehand.

    RLlib's own `add_workers` counts the runners that there are, and so gives the numbers of removed
    ones again, and with them their seeds.
    """
    return manager._next_id


def count_restart(manager: Any) -> None:
    """Counts a runner's restart in RLlib's results; it counts those that it brings back itself."""
    manager._num_actor_restarts += 1


def given_model_config(config: Any) -> dict[str, Any]:
    """What `rl_module(model_config=...)` was given; ``config.model_config`` has defaults too.

    Paths are strings in it.

    Raises:
        ValueError: for anything but a dict, such as RLlib's own `DefaultModelConfig`, and a model
            that is no name.
    """
    given = config._model_config
    if not isinstance(given, Mapping):
        raise ValueError(
            f"rl_module(model_config=...) is a {type(given).__name__}; the network is a language "
            "model, which takes a dict such as {'model': 'builtin:countdown'}."
        )
    found = {k: os.fspath(v) if isinstance(v, os.PathLike) else v for k, v in given.items()}
    if not isinstance(found.get("model") or "", str):
        raise ValueError(
            f"rl_module(model_config=...) has model = {found['model']!r:.80}; it must be a string "
            "or a path: 'builtin:NAME', a folder, or an id on the Hugging Face hub."
        )
    return found


def is_registered_env(env: Any) -> bool:
    """Whether an environment's name is one of Tune's `register_env`; these cannot be listed."""
    from ray.tune.registry import ENV_CREATOR, _global_registry

    return isinstance(env, str) and _global_registry.contains(ENV_CREATOR, env)


def optimizer_steps(algo: Any) -> int | None:
    """Optimiser steps since training began, those before a checkpoint included.

    RLlib's learners do not count them, so the optimisers are asked: the most that any parameter has
    seen, which with a warm-up of the critic are the critic's.

    Args:
        algo: with a learner group.

    Returns:
        None where the optimiser does not count (SGD), or no learner answers.
    """
    answers = algo.learner_group.foreach_learner(_steps, timeout_seconds=_STEPS_TIMEOUT_S)
    found = [answer.get() for answer in answers.ignore_errors()]
    return max((steps for steps in found if steps is not None), default=None)


def _steps(learner: Any) -> int | None:
    from ray.rllib.core import DEFAULT_MODULE_ID

    counts = [
        int(state["step"])
        for _, optimizer in learner.get_optimizers_for_module(DEFAULT_MODULE_ID)
        for state in optimizer.state.values()
        if "step" in state
    ]
    return max(counts, default=None)


def without_repeats(result: Mapping[str, Any]) -> dict[str, Any]:
    """A training result without the evaluation of an earlier iteration.

    RLlib repeats an evaluation's metrics in the result of the next iteration and fills them with
    NaN from then on; only a result with `evaluation/seconds`, which
    `rollout.pool_metrics.time_validations` adds, has an evaluation of its own.
    """
    if SECONDS in result.get(EVALUATION, {}):
        return dict(result)
    return {key: value for key, value in result.items() if key != EVALUATION}
