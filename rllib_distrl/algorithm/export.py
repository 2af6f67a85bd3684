"""Writing what was learned as folders: the policy for Transformers, the critic for ours."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from ray.rllib.core import COMPONENT_LEARNER, COMPONENT_RL_MODULE, DEFAULT_MODULE_ID
from ray.rllib.utils.torch_utils import convert_to_torch_tensor

from rllib_distrl.algorithm.weight_sync import hugging_face_names, runner_weights
from rllib_distrl.model.builtin import PREFIX
from rllib_distrl.model.causal_lm import trunk_name
from rllib_distrl.model.causal_lm_module import POLICY_PREFIX
from rllib_distrl.model.critics import PARTS, TRUNK, save_critic
from rllib_distrl.model.loading import (
    GENERATION_CONFIG,
    load_config,
    load_generation_config,
    load_model,
    load_tokenizer,
)
from rllib_distrl.settings import CRITIC_TRUNKS


def policy_state(algo: Any) -> dict[str, Any]:
    """A copy of the policy's weights by Hugging Face name, as float tensors, from the learner.

    The learner is asked because ``algo.get_module()`` may lag behind it (Ray 2.60).
    """
    return {name: tensor.clone() for name, tensor in _lent_policy(algo).items()}


def _lent_policy(algo: Any) -> dict[str, Any]:
    """What `policy_state` copies; in one process the learner's own tensors."""
    update, _ = runner_weights(algo.learner_group)
    return hugging_face_names(update[COMPONENT_RL_MODULE])


def nonfinite_weights(algo: Any) -> list[str]:
    """Names of the learner's tensors, policy and critic, that hold a number that is not finite."""
    component = f"{COMPONENT_LEARNER}/{COMPONENT_RL_MODULE}"
    state = algo.learner_group.get_state(components=component)[COMPONENT_LEARNER]
    tensors: Any = convert_to_torch_tensor(state[COMPONENT_RL_MODULE][DEFAULT_MODULE_ID])
    return [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]


def export_policy(algo: Any, path: str | Path) -> None:
    """Writes the policy as a plain Hugging Face folder: model, tokenizer, generation config.

    The weights are float32, as they are learned, whatever type the model was loaded from.

    Args:
        algo: a built `Algorithm`, ours or stock, wired by `wire_language_model`.
        path: folder to write.
    """
    name = algo.config.model_config["model"]
    model = load_model(name)
    model.load_state_dict(_lent_policy(algo))  # copies
    with _generation_config_apart(model, Path(path)):
        model.save_pretrained(path)
    load_tokenizer(name).save_pretrained(path)


@contextmanager
def _generation_config_apart(model: Any, path: Path) -> Iterator[None]:
    """Within it a model is saved; its generation config follows as it came.

    Transformers (5.16) loads what it then refuses to save, such as a temperature without
    `do_sample`, which older chat models have.
    """
    from transformers import GenerationConfig

    own: GenerationConfig | None = getattr(model, "generation_config", None)
    if own is None:
        yield
        return
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
    own.to_json_file(path / GENERATION_CONFIG, keys_to_pop=["compile_config"])


def export_critic(algo: Any, path: str | Path) -> None:
    """Writes the critic alone, trunk and head; see `rllib_distrl.model.critics`.

    The trunk of a critic that shares the policy's states is the policy's.

    Args:
        algo: a built `Algorithm`, ours or stock, wired by `wire_language_model`.
        path: folder to write.

    Raises:
        ValueError: If the algorithm has no critic, or none with a trunk of its own weights.
    """
    if algo.config.model_config.get("lora"):
        raise ValueError(
            "With lora the critic is adapters on the policy's frozen weights, which no folder of "
            "its own can hold. Export the policy; continue the run to go on with its critic."
        )
    component = f"{COMPONENT_LEARNER}/{COMPONENT_RL_MODULE}"
    state = algo.learner_group.get_state(components=component)[COMPONENT_LEARNER]
    tensors: Any = convert_to_torch_tensor(state[COMPONENT_RL_MODULE][DEFAULT_MODULE_ID])
    critic = {name: t for name, t in tensors.items() if name.startswith(PARTS)}
    if not critic:
        raise ValueError(f"{type(algo).__name__} has no critic to export.")
    settings = algo.config.model_config
    if (kind := settings.get("critic", "separate")) not in CRITIC_TRUNKS:
        trunk = f"{POLICY_PREFIX}{trunk_name(load_model(settings['model']))}."
        critic |= {
            TRUNK + name.removeprefix(trunk): t
            for name, t in tensors.items()
            if name.startswith(trunk)
        }
    save_critic(
        path,
        critic,
        head=settings.get("head", "quantile"),
        n_quantiles=settings.get("n_quantiles", 1),
        head_center=settings.get("head_center", "mean"),
        trunk_config=load_config(settings["model"]).to_dict(),
        critic_observation=settings.get("critic_observation", "none"),
        critic=kind if kind in CRITIC_TRUNKS else "separate",
    )


@lru_cache(maxsize=8)
def check_export(model: str) -> None:
    """Tries what an export writes beside weights, so that no training ends in an error there.

    Args:
        model: folder, hub id or ``builtin:...``.

    Raises:
        ValueError: with the reason.
    """
    if model.startswith(PREFIX):  # written by this package
        return
    try:
        with TemporaryDirectory(prefix="distrl-") as folder:
            load_config(model).save_pretrained(folder)
            generation, file = load_generation_config(model), Path(folder, GENERATION_CONFIG)
            generation.to_json_file(file, keys_to_pop=["compile_config"])
            load_tokenizer(model).save_pretrained(folder)
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the temporary folder's
        raise ValueError(
            f"What is trained from {model!r} could not be exported: {error} Mend the model's "
            "folder, or name another model."
        ) from error
