"""What of RLlib's settings a runner of whole completions can honour; the rest is refused."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import gymnasium
from gymnasium.envs.registration import load_env_creator

from distrl_envs.token_env import TokenEnv
from distrl_envs.user_code import search_working_directory
from rllib_distrl.rllib_traps import is_registered_env

_TOKEN_ENVS = (
    "Use one of distrl_envs, such as 'distrl_envs:distrl/Countdown-v0', with a task of your own if "
    "need be (env_config={'task': 'module:class'}), or wrap one."
)
_CONNECTORS = (
    "completions are generated whole, in the engine, where no connector runs between two tokens. "
    "Change observations, rewards or infos in a wrapper around the environment, or batches in "
    "training(learner_connector=...)."
)
_WHOLE = "episodes are whole completions, whatever it says. Leave it out."
_BATCH = "rollout(prompts_per_iteration=..., num_generations=...) says how large a batch is."
_OLD_STACK = "it belongs to RLlib's old API stack."

# Settings of RLlib that nothing here reads, and what to use.
_ENV_SIDE: Mapping[str, str] = {
    "_env_to_module_connector": _CONNECTORS,
    "_module_to_env_connector": _CONNECTORS,
    "add_default_connectors_to_env_to_module_pipeline": _CONNECTORS,
    "add_default_connectors_to_module_to_env_pipeline": _CONNECTORS,
    "restart_failed_sub_environments": "an environment that fails ends training with its error.",
    "torch_compile_worker": "the engine generates. Leave it out.",
    "episodes_to_numpy": "learners read arrays. Leave it out.",
    "clip_rewards": "rewards are the task's. Use a wrapper, or our reward_transforms.",
    "observation_filter": _OLD_STACK,
    "compress_observations": _OLD_STACK,
    "exploration_config": _OLD_STACK + " Use rollout(temperature=...), or explore=False.",
    "output": "completions are recorded by `distrl train` (samples/) and `distrl eval`.",
}
_OUR_ALGORITHMS: Mapping[str, str] = {
    "_train_batch_size_per_learner": _BATCH,
    "train_batch_size": _BATCH,
    "rollout_fragment_length": _WHOLE,
    "batch_mode": _WHOLE,
    "num_envs_per_env_runner": "rollout(max_batch_size=...) says how many completions are "
    "generated at once.",
    "model": "the network is a language model: rl_module(model_config={'model': ...}).",
    "num_gpus": _OLD_STACK + " Use num_gpus_per_learner and num_gpus_per_env_runner.",
    "optimizer": _OLD_STACK + " Adam it is: lr, critic_lr, lr_schedule and grad_clip are read.",
    "torch_skip_nan_gradients": "steps that are not finite are refused always; see "
    "max_nonfinite_steps.",
    "input_": "training is online. For saved completions see critic_pretraining.",
    "num_aggregator_actors_per_learner": "the driver hands whole groups to the learners.",
    "count_steps_by": _OLD_STACK,
    "torch_compile_learner": "it compiles a method of the module that is not called here. Leave it "
    "out.",
    "algorithm_config_overrides_per_module": "there is one module. Use training(...).",
}


_AT_LEAST: Mapping[str, int] = {
    "num_learners": 0,
    "num_cpus_per_learner": 0,
    "num_gpus_per_learner": 0,
    "num_env_runners": 0,
    "num_cpus_per_env_runner": 0,
    "num_gpus_per_env_runner": 0,
    "evaluation_num_env_runners": 0,
    "evaluation_interval": 0,
    "evaluation_duration": 1,
    "metrics_num_episodes_for_smoothing": 1,
    "min_sample_timesteps_per_iteration": 0,
    "min_train_timesteps_per_iteration": 0,
}


_SEEDS = 2**32  # as many as NumPy's legacy generator takes


def check_contract(config: Any, ours: bool = False) -> None:
    """Refuses what a `CompletionEnvRunner` would pass over in silence.

    Args:
        config: any `AlgorithmConfig`.
        ours: whether the algorithm is one of ours, which read less of RLlib's settings.

    Raises:
        ValueError: for the first such setting, with what to use.
    """
    if not (config.enable_rl_module_and_learner and config.enable_env_runner_and_connector_v2):
        raise ValueError(
            "RLlib's old API stack is switched on with api_stack(...), and language models run on "
            "the new one only. Leave api_stack out."
        )
    if config.is_multi_agent:
        raise ValueError(
            f"multi_agent(policies=...) names {', '.join(map(str, config.policies))}, but one "
            "language model writes each completion. Leave multi_agent out."
        )
    if config.framework_str != "torch":
        raise ValueError(f"framework is {config.framework_str!r}; there is 'torch' only.")
    if not config.in_evaluation:  # RLlib sets some of these itself there.
        _check_unread(config, {**_ENV_SIDE, **(_OUR_ALGORITHMS if ours else {})})
    _check_counts(config)
    _check_env_id(config.env)


def _check_counts(config: Any) -> None:
    """Refuses numbers below what they count; RLlib (Ray 2.60) looks at few of them."""
    for name, least in _AT_LEAST.items():
        value = getattr(config, name)
        if isinstance(value, (int, float)) and not value >= least:
            raise ValueError(f"{name} is {value}; it must be >= {least}.")
    if config.seed is not None and not 0 <= config.seed < _SEEDS:
        raise ValueError(f"seed is {config.seed}; it must be in [0, {_SEEDS - 1}], or None.")
    for name in ("sample_timeout_s", "evaluation_sample_timeout_s"):
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name} is {value}; it must be above 0.")


def _check_unread(config: Any, unread: Mapping[str, str]) -> None:
    default = type(config)()
    for name, why in unread.items():
        if (got := getattr(config, name)) != getattr(default, name):
            shown = "" if name.endswith("_connector") else f" is {got!r:.80}, which"
            public = name.removeprefix("_").removesuffix("_")
            raise ValueError(f"{public}{shown} has no effect here: {why}")


def _check_env_id(env: Any) -> None:
    """Gymnasium's ids say what they make; for Tune's and for functions see `check_env`."""
    if not isinstance(env, str) or is_registered_env(env):
        return
    module, _, env_id = env.rpartition(":")
    try:
        if module:
            search_working_directory()
            import_module(module)
        creator = gymnasium.spec(env_id).entry_point
        if isinstance(creator, str):
            creator = load_env_creator(creator)
    except (gymnasium.error.Error, ImportError, AttributeError) as error:
        raise ValueError(f"The environment {env!r} cannot be made: {error} {_TOKEN_ENVS}") from None
    if isinstance(creator, type) and not issubclass(creator, (TokenEnv, gymnasium.Wrapper)):
        raise ValueError(
            f"The environment {env!r} is no token environment ({creator.__name__}). {_TOKEN_ENVS}"
        )


def check_env(env: Any) -> TokenEnv:
    """The `TokenEnv` within an environment's wrappers.

    Raises:
        ValueError: where there is another one.
    """
    inner = env.unwrapped
    if not isinstance(inner, TokenEnv):
        raise ValueError(
            f"The environment is no token environment ({type(inner).__name__}). {_TOKEN_ENVS}"
        )
    return inner


def check_whole(env: Any) -> None:
    """Refuses a time limit below the task's own, where whole completions are needed.

    Raises:
        ValueError: with both limits.
    """
    own = env.unwrapped.max_completion_tokens
    while isinstance(env, gymnasium.Wrapper):
        limit = getattr(env, "_max_episode_steps", None)
        if isinstance(env, gymnasium.wrappers.TimeLimit) and limit is not None and limit < own:
            raise TruncatedError(
                f"A wrapper TimeLimit truncates after {limit} tokens, max_completion_tokens is "
                f"{own}. {whole_completions(limit)}"
            )
        env = env.env


def whole_completions(tokens: int) -> str:
    """What to do about a completion that is truncated after so many tokens."""
    return (
        "Our algorithms learn from whole, graded completions only. Remove the wrapper and set "
        f"[rollout] max_completion_tokens={tokens}: completions of that length end there and are "
        "graded as they stand."
    )


class TruncatedError(ValueError):
    """An env has cut a completion where whole ones are needed."""
