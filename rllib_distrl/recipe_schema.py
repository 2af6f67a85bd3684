"""What a recipe may say: names and types, read from RLlib's own builder methods.

There is no second schema. The parameters of `AlgorithmConfig.training(...)` and of the other
builder methods are the keys of the recipe's tables, and their annotations are the types.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import os
import types
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel

BUILDER_TABLES = (
    "environment",
    "env_runners",
    "learners",
    "training",
    "rl_module",
    "evaluation",
    "fault_tolerance",
    "resources",
    "reporting",
    "debugging",
    "framework",
    "checkpointing",
    "python_environment",
    "experimental",
)
"""RLlib's builder methods that a recipe may call, in the order in which they are applied."""

WIDER_THAN_ANNOTATED: Mapping[str, tuple[type, ...]] = {
    # Ray 2.60 annotates these narrower than what it accepts (and documents).
    "num_cpus_per_env_runner": (float,),
    "num_cpus_for_main_process": (float,),
    "entropy_coeff": (list,),
    "kl_coeff": (float,),
}

ELSEWHERE: Mapping[str, frozenset[str]] = {
    ours: frozenset(others.split())
    for ours, others in {
        "lr": "learning_rate actor_lr policy_lr",
        "critic_lr": "critic_learning_rate value_lr vf_lr",
        "lr_schedule": "lr_scheduler lr_scheduler_type scheduler",
        "lr_warmup_iterations": "warmup_steps lr_warmup_steps num_warmup_steps warmup",
        "gamma": "discount discount_factor",
        "lambda_": "lambda lam gae_lambda",
        "clip_param": "clip_range cliprange clip_eps clip_ratio epsilon eps_clip",
        "clip_param_high": "epsilon_high clip_ratio_high clip_range_high",
        "grad_clip": "max_grad_norm clip_grad_norm gradient_clip",
        "entropy_coeff": "ent_coef entropy_coef entropy_weight",
        "vf_loss_coeff": "vf_coef value_loss_coef value_coef",
        "regularisers": "beta kl_coef kl_coeff kl_beta kl_loss_coef init_kl_coef",
        "num_epochs": "epochs ppo_epochs num_ppo_epochs num_train_epochs num_iterations_per_batch",
        "minibatch_size": "batch_size mini_batch_size ppo_mini_batch_size",
        "micro_batch_tokens": "micro_batch_size ppo_max_token_len_per_gpu max_tokens_per_batch",
        "activation_checkpointing": "gradient_checkpointing",
        "precision": "dtype bf16 fp16 mixed_precision",
        "aggregation": "loss_type loss_agg_mode",
        "n_quantiles": "num_quantiles quantiles n_atoms num_atoms",
        "num_generations": "n group_size num_return_sequences num_samples samples_per_prompt",
        "max_completion_tokens": "max_tokens max_new_tokens max_completion_length "
        "max_response_length",
        "prompts_per_iteration": "num_prompts prompts_per_step rollout_batch_size",
        "iterations": "steps max_steps num_iterations total_steps",
        "model": "model_name model_path model_name_or_path base_model",
    }.items()
}
"""Names that other trainers have for our settings."""

_FEW = 16  # so many keys are listed in a message
ALIKE = 0.6  # below it a hint misleads

_TOML_WORDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "a table",
}


def nearest(name: str, options: Iterable[str], likeness: float = 0.0) -> str:
    """Returns the option that means the same elsewhere, or reads most like `name`.

    Args:
        name: What was written.
        options: What there is.
        likeness: In [0, 1]: how alike the two must be at least.

    Returns:
        One of the options, or "".
    """
    options = list(options)
    ours = next((key for key, others in ELSEWHERE.items() if name in others), "")
    if ours in options:
        return ours
    matches = difflib.get_close_matches(name, options, n=1, cutoff=likeness)
    return matches[0] if matches else ""


def builder_parameters(config: Any, table: str) -> dict[str, Any]:
    """Returns {parameter: annotation} of one builder method of an `AlgorithmConfig`.

    Follows `**kwargs` to the method of the parent class and leaves out what RLlib has deprecated.
    """
    parameters: dict[str, Any] = {}
    for cls in type(config).__mro__:
        method = cls.__dict__.get(table)
        if method is None:
            continue
        passes_on = False
        for parameter in _signature(method).parameters.values():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                passes_on = True
            elif parameter.name != "self" and not _is_deprecated(parameter):
                parameters.setdefault(parameter.name, parameter.annotation)
        if not passes_on:
            break
    return parameters


def toml_types(annotation: Any) -> frozenset[type] | None:
    """Returns the TOML types that an annotation admits.

    Returns:
        None when the annotation says nothing; the empty set when it admits Python objects only.
    """
    if annotation in (Any, inspect.Parameter.empty, object) or isinstance(annotation, str):
        return None
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return toml_types(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        parts = [toml_types(part) for part in typing.get_args(annotation)]
        return None if None in parts else frozenset().union(*(p for p in parts if p is not None))
    if origin is typing.Literal:
        return frozenset(type(choice) for choice in typing.get_args(annotation))
    return _class_types(origin or annotation)


def as_python(value: Any, annotation: Any) -> Any:
    """A value as TOML holds it: no NumPy, no path, no tuple, no 1e6 where an integer is wanted.

    Args:
        value: What Python has been given.
        annotation: Of the setting, which says what is wanted.
    """
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    kinds = toml_types(annotation) or frozenset()
    if isinstance(value, float) and value.is_integer() and int in kinds and float not in kinds:
        return int(value)
    return _as_lists(value) if list in kinds else value


def _as_lists(value: Any) -> Any:
    """Lists in place of tuples, at any depth of them: RLlib takes schedules as both."""
    return list(map(_as_lists, value)) if isinstance(value, (list, tuple)) else value


def take_builder_values(config: Any, leave: Collection[str] = ()) -> None:
    """Checks what Python has given to RLlib's builder methods as a recipe is checked.

    Looks at what has been changed, and makes Python's values of NumPy's. Tables may hold what no
    recipe can.

    Args:
        config: Any `AlgorithmConfig`.
        leave: Settings that have been checked.

    Raises:
        ValueError: As `check_value`.
    """
    given, usual = vars(config), vars(type(config)())
    for table in BUILDER_TABLES:
        for name, annotation in builder_parameters(config, table).items():
            value, kinds = as_python(given.get(name), annotation), toml_types(annotation)
            before = usual.get(name)
            same = type(value) is type(before) and value == before
            if name in leave or not kinds or value is None or same:
                continue
            if dict not in kinds:
                check_value(f"{table}.{name}", value, annotation, before)
                setattr(config, name, value)
            elif kinds == {dict} and isinstance(value, (str, int, float, list)):
                raise ValueError(f"{table}.{name}: wanted a table, got {_shown(value)}.")


def check_value(where: str, value: Any, annotation: Any, default: Any = None) -> None:
    """Checks one TOML value against an annotation.

    Args:
        where: The key as the user writes it, for the message (`training.lr`).
        value: What the recipe says.
        annotation: The parameter's annotation.
        default: The setting's present value, whose type decides where the annotation is silent.

    Raises:
        ValueError: For a value of the wrong type, NaN, or a setting that TOML cannot express.
    """
    _check_plain(where, value)
    if is_none(value, annotation):
        return
    allowed = toml_types(annotation)
    if allowed is None and type(default) in _TOML_WORDS:
        allowed = frozenset({type(default)})
    if allowed is None:
        return
    if not allowed:
        raise ValueError(f"{where} takes a Python object, which a recipe cannot hold. Remove it.")
    allowed |= frozenset(WIDER_THAN_ANNOTATED.get(where.rpartition(".")[2], ()))
    if not _accepts(value, allowed):
        raise ValueError(f"{where}: wanted {in_words(allowed)}, got {_shown(value)}.")
    _check_choice(where, value, annotation)
    _check_items(where, value, annotation)


def is_none(value: Any, annotation: Any) -> bool:
    """Says whether a value is "none", the recipe's word for Python's None.

    TOML has no null. The word counts where the annotation admits None and no other string.
    """
    if value != "none" or typing.get_origin(annotation) not in (typing.Union, types.UnionType):
        return False
    return type(None) in typing.get_args(annotation) and str not in (toml_types(annotation) or ())


def check_names(where: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises ValueError naming the nearest known key for the first unknown one."""
    known = sorted(known)
    for name in given:
        if name not in known:
            near = nearest(name, known, ALIKE)
            hint = f" The nearest one is {near!r}." if near else ""
            listed = f" Known keys: {', '.join(known)}." if len(known) <= _FEW or not near else ""
            raise ValueError(f"Unknown key {name!r} in {where}.{hint}{listed}")


def check_environment(table: Mapping[str, Any]) -> None:
    """Checks that the environment is registered and knows the keys of `env_config`.

    Args:
        table: The recipe's `[environment]` table.

    Raises:
        ValueError: For a missing or unknown environment, or an unknown key of `env_config`.
    """
    import gymnasium

    from distrl_envs.user_code import search_working_directory

    env = table.get("env")
    if not isinstance(env, str) or not env:
        raise ValueError(
            "environment.env is missing. Name a Gymnasium id, for example "
            '[environment] env = "distrl_envs:distrl/Countdown-v0".'
        )
    module, _, env_id = env.rpartition(":")
    try:
        if module:
            search_working_directory()
            importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"environment.env: cannot import {module!r} of {env!r}: {error}."
        ) from None
    if env_id not in gymnasium.registry:
        name = nearest(env_id, gymnasium.registry)
        raise ValueError(f"environment.env: unknown id {env_id!r}. The nearest one is {name!r}.")
    _check_env_config(gymnasium.registry[env_id], table.get("env_config", {}))


def _check_env_config(spec: Any, env_config: Mapping[str, Any]) -> None:
    from gymnasium.envs.registration import load_env_creator

    creator = spec.entry_point
    if isinstance(creator, str):
        creator = load_env_creator(creator)
    parameters = inspect.signature(creator).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        check_names("[environment.env_config]", env_config, parameters)


def _signature(method: Any) -> inspect.Signature:
    """The signature with its string annotations resolved where that is possible."""
    try:
        return inspect.signature(method, eval_str=True)
    except (NameError, AttributeError, TypeError, SyntaxError):
        return inspect.signature(method)


def _is_deprecated(parameter: inspect.Parameter) -> bool:
    """Ray 2.60 leaves deprecated parameters in the signature, unannotated and with default -1."""
    return parameter.annotation is inspect.Parameter.empty and parameter.default == -1


def _class_types(cls: Any) -> frozenset[type]:
    if cls in (bool, int, float, str):
        return frozenset({cls})
    if isinstance(cls, type) and issubclass(cls, (Mapping, BaseModel)):
        return frozenset({dict})
    if isinstance(cls, type) and issubclass(cls, (Sequence, set, frozenset)):
        return frozenset({list})
    return frozenset()


def _accepts(value: Any, allowed: frozenset[type]) -> bool:
    if isinstance(value, bool):
        return bool in allowed
    if isinstance(value, int):
        return bool({int, float} & allowed)
    if isinstance(value, float) and value.is_integer():  # 1e6 is an integer.
        return bool({int, float} & allowed)
    return type(value) in allowed


def _check_plain(where: str, value: Any) -> None:
    """Refuses NaN and dates at any depth."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_plain(f"{where}.{key}", item)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_plain(f"{where}[{index}]", item)
    elif type(value) not in _TOML_WORDS:
        raise ValueError(f"{where}: wanted a number, a string, a list or a table, got {value!r}.")
    elif isinstance(value, float) and math.isnan(value):
        raise ValueError(f"{where}: wanted a number, got nan.")


def _check_choice(where: str, value: Any, annotation: Any) -> None:
    choices = literal_choices(annotation)
    if choices and isinstance(value, str) and value not in choices:
        raise ValueError(
            f"{where}: {value!r} is not one of {', '.join(map(repr, choices))}. "
            f"The nearest one is {nearest(value, choices)!r}."
        )


def literal_choices(annotation: Any) -> list[str]:
    """Returns the strings of a `Literal`, unless the annotation admits any other string."""
    parts = [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        parts = list(typing.get_args(annotation))
    if str in parts:
        return []
    literals = [part for part in parts if typing.get_origin(part) is typing.Literal]
    return [c for part in literals for c in typing.get_args(part) if isinstance(c, str)]


def _check_items(where: str, value: Any, annotation: Any) -> None:
    """Checks the items of a homogeneous list such as `tuple[int, ...]`."""
    if not isinstance(value, list) or typing.get_origin(annotation) not in (list, tuple):
        return
    item_types = [a for a in typing.get_args(annotation) if a is not Ellipsis]
    if len(item_types) == 1:
        for index, item in enumerate(value):
            check_value(f"{where}[{index}]", item, item_types[0])


def in_words(allowed: frozenset[type]) -> str:
    """Returns the TOML types as the end of "wanted ..."."""
    if float in allowed:
        allowed -= {int}
    return " or ".join(word for kind, word in _TOML_WORDS.items() if kind in allowed)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return f"{str(value).lower()} (true or false)"
    word = _TOML_WORDS.get(type(value), f"a {type(value).__name__}")
    hint = " Booleans are written true and false." if value in ("True", "False") else ""
    return f"{value!r} ({word}).{hint}".removesuffix(".")
