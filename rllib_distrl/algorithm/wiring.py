"""Wiring a language model into any `AlgorithmConfig`, ours or RLlib's own."""

import inspect
import os
from typing import Any

import gymnasium
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core.rl_module.rl_module import RLModuleSpec

from rllib_distrl.algorithm.cluster import check_runner_gpus, cluster_checked
from rllib_distrl.algorithm.export import check_export
from rllib_distrl.model.builtin import PREFIX, find_spec
from rllib_distrl.model.causal_lm import PRECISIONS
from rllib_distrl.model.causal_lm_module import CausalLMModule
from rllib_distrl.model.loading import (
    eos_token_ids,
    load_config,
    load_generation_config,
    load_tokenizer,
    resolve,
    window_of,
)
from rllib_distrl.model.lora import check_lora
from rllib_distrl.recipe_schema import check_environment, nearest, take_builder_values
from rllib_distrl.rllib_traps import given_model_config, is_registered_env
from rllib_distrl.rollout.completion_env_runner import CompletionEnvRunner
from rllib_distrl.rollout.contract import check_contract
from rllib_distrl.settings import NUMBERS_FOR_CRITICS, TWIN, RolloutSettings

_STOCK_CRITICS = ("separate", "shared", "detached", "none")
# What `CausalLMModule` reads, whatever the algorithm.
_MODEL_KEYS = frozenset(
    {
        "activation_checkpointing", "critic", "critic_checkpoint", "critic_observation",
        "critic_freeze", "lora",
        "max_seq_len", "micro_batch_tokens", "model", "precision", "rollout", "seed", "temperature",
    }
)  # fmt: skip


def env_settings(model: str, rollout: RolloutSettings, obs_mode: str) -> dict[str, Any]:
    """What `TokenEnv` must know of model and rollout.

    Built-in models speak their task's own small vocabulary, which is the env's default; with
    any other the env also needs the size of the model's vocabulary and what ends a completion.
    """
    settings = {"max_completion_tokens": rollout.max_completion_tokens, "obs_mode": obs_mode}
    if model.startswith(PREFIX):
        return {**settings, "window": find_spec(model).window}
    config = load_config(model).get_text_config()
    return {
        **settings,
        "tokenizer": resolve(model),
        "vocab_size": config.vocab_size,
        "window": getattr(config, "max_position_embeddings", None),
        "eos_token_ids": eos_token_ids(load_generation_config(model), load_tokenizer(model)),
    }


def wire_language_model(
    config: Any, model: str | os.PathLike[str], rollout: RolloutSettings
) -> AlgorithmConfig:
    """Sets env runner class, module, tokenizer and rollout settings of ``config``.

    Args:
        config: any `AlgorithmConfig` with a discrete stochastic policy, ours or RLlib's own.
        model: folder, hub id or ``builtin:...``.
        rollout: how to sample.

    Returns:
        ``config``.

    Raises:
        ValueError: when a setting is out of range.
    """
    rollout.check_machine()
    model = os.fspath(model)
    if hasattr(config, "rollout_settings"):
        config.rl_module(model_config={**given_model_config(config), "model": model})
        return config.rollout(**rollout.to_dict())
    _check_algorithm(config)
    take_builder_values(config)
    check_contract(config)
    check_model_config(config)
    _check_critic_of_stock(config)
    told = _told_to_critic(config)
    set_env_settings(config, {**env_settings(model, rollout, obs_mode="incremental"), **told})
    _check_minibatches(config, rollout)
    check_runner_gpus(config)
    check_export(model)
    resolve(model)  # RLlib gives its runners no time to build a built-in model; ours does it later
    check_rate("lr", config.lr)
    filtered = rollout.top_p < 1 or rollout.top_k > 0
    if filtered and not getattr(config, "vtrace", False):
        raise ValueError(
            f"[rollout] top_p={rollout.top_p}, top_k={rollout.top_k} sample from another "
            "distribution than the one that learns, and this algorithm does not correct for it. "
            "Use top_p=1 and top_k=0, or an algorithm with V-trace (APPO, IMPALA)."
        )
    if rollout.max_staleness:
        raise ValueError(
            "[rollout] max_staleness is for our algorithms. RLlib's APPO and IMPALA sample while "
            "they learn by themselves; its PPO does not. Remove max_staleness."
        )
    if rollout.segment_tokens:
        raise ValueError(
            "[rollout] segment_tokens is for our algorithms, which keep what is not over for the "
            "next iteration. RLlib's learn from what one call of sample() returns. Remove it."
        )
    given = given_model_config(config)
    precision = given.get("precision", PRECISIONS[0])
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; it must be one of {', '.join(PRECISIONS)}.")
    if lora := given.get("lora"):
        check_lora(lora, load_config(model))
    # Only the sampled token's logp is kept, so there is no KL over the whole vocabulary.
    if hasattr(config, "use_kl_loss"):
        config.use_kl_loss = False
    config.env_runners(env_runner_cls=CompletionEnvRunner)
    config.algo_class = cluster_checked(config.algo_class)
    return config.rl_module(
        rl_module_spec=RLModuleSpec(module_class=CausalLMModule),
        model_config={
            "model": model,
            "temperature": rollout.temperature,
            "seed": config.seed,
            "rollout": rollout.to_dict(),
            # One step more than the longest episode, for the step that RLlib's GAE appends.
            "max_seq_len": rollout.max_completion_tokens + 1,
            **given,
        },
    )


def _check_critic_of_stock(config: Any) -> None:
    """Refuses a critic whose loss RLlib's own algorithms do not have."""
    critic = given_model_config(config).get("critic", "separate")
    if critic not in _STOCK_CRITICS:
        raise ValueError(
            f"rl_module(model_config=...) has critic = {critic!r}; with RLlib's own algorithms it "
            f"must be one of {', '.join(_STOCK_CRITICS)}"
            + (": they would teach one of two critics alone." if critic == TWIN else ".")
        )


def _told_to_critic(config: Any) -> dict[str, Any]:
    """What the environment must know of ``critic_observation`` in a stock algorithm's module.

    RLlib's learner connectors carry what stands in the columns of an episode; a text stands in its
    infos, of which they make nothing.
    """
    wanted = given_model_config(config).get("critic_observation", "none")
    if wanted not in ("none", *NUMBERS_FOR_CRITICS):
        raise ValueError(
            f"rl_module(model_config=...) has critic_observation = {wanted!r}; with RLlib's own "
            "algorithms it must be 'none', 'state' or 'stock': their learner connectors do not "
            "carry a text. Use 'state', or one of ours, which take 'text' in training()."
        )
    if wanted != "none" and given_model_config(config).get("critic") == "none":
        raise ValueError(
            f"rl_module(model_config=...) has critic_observation = {wanted!r}, but critic is "
            "'none'. Leave critic_observation out, or choose a critic."
        )
    asked = wanted != "none" or "critic_observation" in config.env_config
    return {"critic_observation": wanted} if asked else {}


def check_model_config(config: Any) -> None:
    """Refuses keys of ``rl_module(model_config=...)`` that no module of ours reads.

    Args:
        config: any `AlgorithmConfig`; with a module spec of the user's own anything passes.

    Raises:
        ValueError: with the nearest key.
    """
    if config._rl_module_spec is not None:
        return
    for name in (
        given_model_config(config).keys() - _MODEL_KEYS - set(config._model_config_auto_includes)
    ):
        raise ValueError(
            f"rl_module(model_config=...) has {name!r}, which nothing reads. The nearest one is "
            f"{nearest(name, _MODEL_KEYS)!r}."
        )


def check_rate(name: str, rate: Any) -> None:
    """Refuses a learning rate, or one of a schedule, with which every weight diverges.

    Adam moves a weight by about the learning rate in a step, whatever the gradient.

    Args:
        name: of the setting.
        rate: a number, or RLlib's schedule [[env step, rate], ...].

    Raises:
        ValueError: with what is allowed.
    """
    if rate is None or isinstance(rate, (int, float)):
        if rate is None or not 0 < rate <= 1:
            raise ValueError(f"{name} is {rate}; it must be above 0 and at most 1.")
        return
    for point in rate if isinstance(rate, (list, tuple)) else ():
        value = point[-1] if isinstance(point, (list, tuple)) and point else point
        if isinstance(value, (int, float)) and not 0 <= value <= 1:
            raise ValueError(f"{name} is {rate}; each rate of a schedule must lie in [0, 1].")


def set_env_settings(config: Any, settings: dict[str, Any]) -> None:
    """Puts what follows from model and rollout into ``config.env_config``.

    Args:
        config: any `AlgorithmConfig`.
        settings: of `env_settings`.

    Raises:
        ValueError: for an unknown environment or key, and where ``env_config`` says something else
            than ``settings``.
    """
    given, before = config.env_config, getattr(config, "_env_settings", {})
    for name, value in settings.items():
        got = given.get(name, value)
        if got != value and got != before.get(name, value):
            remedy = "Remove it from env_config: it follows from the model."
            if name == "max_completion_tokens":
                remedy = f"Say it once: rollout({name}={got!r}), [rollout] {name} in a recipe."
            if name == "critic_observation":
                raise ValueError(
                    f"env_config has {name}={got!r:.80}, and the critic's setting is {value!r}. "
                    f"Say it once: training({name}={got!r}), [training] {name} in a recipe, or "
                    f"rl_module(model_config={{{name!r}: {got!r}}}) with RLlib's own algorithms."
                )
            raise ValueError(
                f"env_config has {name}={got!r:.80}, but the rollout has {value!r:.80}. {remedy}"
            )
    if config.env is None or _gymnasium_makes(config.env):
        of_make = inspect.signature(gymnasium.make).parameters.keys()
        own = {name: value for name, value in given.items() if name not in of_make}
        check_environment({"env": config.env, "env_config": own})
    config._env_settings = settings
    config.env_config = {**given, **settings}


def _gymnasium_makes(env: Any) -> bool:
    return isinstance(env, str) and not is_registered_env(env)


def _check_algorithm(config: Any) -> None:
    """Refuses RLlib's algorithms that do not sample from a stochastic policy of tokens."""
    from ray.rllib.algorithms.impala import IMPALAConfig
    from ray.rllib.algorithms.ppo import PPOConfig

    if not isinstance(config, PPOConfig | IMPALAConfig):
        name = getattr(config.algo_class, "__name__", type(config).__name__)
        raise ValueError(
            f"{name} cannot train a language model here: it must learn from whole episodes of a "
            "stochastic policy over tokens. Use one of ours, or RLlib's PPO, APPO or IMPALA."
        )


def _check_minibatches(config: Any, rollout: RolloutSettings) -> None:
    """RLlib's PPO counts timesteps, and rows of whole episodes: below one there is no minibatch."""
    size, longest = getattr(config, "minibatch_size", None), rollout.max_completion_tokens + 1
    if size is not None and not getattr(config, "vtrace", False) and size < longest:
        raise ValueError(
            f"minibatch_size is {size}, but RLlib counts timesteps here, and one row of a batch "
            f"has {longest} (max_completion_tokens + 1). Set minibatch_size >= {longest}."
        )


def check_window(model: str, max_completion_tokens: int) -> None:
    """Refuses completions that cannot fit into the model's window.

    Raises:
        ValueError: with both lengths.
    """
    window = window_of(model)
    if window is not None and max_completion_tokens >= window:
        raise ValueError(
            f"[rollout] max_completion_tokens is {max_completion_tokens}, but the window of "
            f"{model} is {window} tokens, prompt included. Choose a smaller limit."
        )
