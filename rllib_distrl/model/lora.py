"""LoRA: low-rank adapters on a frozen model, through the optional package `peft`.

Hu et al. 2021: y = W x + (alpha / r) B A x with B = 0 at the start. Only A and B learn.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import _CHECKPOINT_PREFIX

from rllib_distrl.model.causal_lm import is_causal_lm, trunk_of, without_weights
from rllib_distrl.model.sharding import whole
from rllib_distrl.recipe_schema import nearest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ALL_LINEAR = "all-linear"
DEFAULTS: Mapping[str, Any] = {"r": 16, "alpha": 32, "targets": ALL_LINEAR}
_ADAPTER = "default"  # peft's own name of the only adapter


def check_lora(lora: Mapping[str, Any], model_config: PreTrainedConfig) -> None:
    """Refuses settings that fit no adapter of this model, and a missing `peft`.

    Args:
        lora: ``r``, the rank; ``alpha``, the scale's numerator; ``targets``, a list of the
            linear layers that get an adapter, or ``"all-linear"``.
        model_config: Of the model.

    Raises:
        ValueError: With what was got, what is allowed and what to do.
    """
    if not isinstance(lora, Mapping):
        raise ValueError(f"lora is {lora!r:.80}; it must be a table, such as {dict(DEFAULTS)}.")
    for name in lora:
        if name not in DEFAULTS:
            near = nearest(name, DEFAULTS)
            raise ValueError(f"lora has no setting {name!r}. The nearest one is {near!r}.")
    if importlib.util.find_spec("peft") is None:
        raise ValueError(
            "lora needs the package peft. Install it with `pip install 'rllib-distrl[peft]'`."
        )
    settings = {**DEFAULTS, **lora}
    rank, alpha, targets = settings["r"], settings["alpha"], settings["targets"]
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"lora r is {rank!r}; it must be an integer >= 1.")
    if (
        not isinstance(alpha, (int, float))
        or isinstance(alpha, bool)
        or not 0 < alpha < float("inf")
    ):
        raise ValueError(f"lora alpha is {alpha!r}; it must be a finite number above 0.")
    listed = isinstance(targets, (list, tuple)) and all(isinstance(x, str) for x in targets)
    if targets != ALL_LINEAR and not listed:
        raise ValueError(f"lora targets is {targets!r}; it must be a list, or {ALL_LINEAR!r}.")
    model = without_weights(model_config)
    known = linear_layers(trunk_of(model))
    unknown = [] if targets == ALL_LINEAR else [name for name in targets if name not in known]
    if unknown or not targets:
        raise ValueError(
            f"lora targets is {targets!r}; {type(model).__name__} has the linear layers "
            f"{', '.join(known)}. Name some of them, or {ALL_LINEAR!r}."
        )


def linear_layers(trunk: nn.Module) -> list[str]:
    """The names, without their places, of the linear layers in a trunk's blocks."""
    from transformers.pytorch_utils import Conv1D

    return sorted(
        {
            name.rpartition(".")[2]
            for name, part in trunk.named_modules()
            if isinstance(part, (nn.Linear, Conv1D))
        }
    )


def count_adapter_parameters(lora: Mapping[str, Any], model_config: PreTrainedConfig) -> int:
    """Parameters of one trunk's adapters, without allocating the model."""
    settings = {**DEFAULTS, **lora}
    trunk = trunk_of(without_weights(model_config))
    targets = settings["targets"]
    if targets == ALL_LINEAR:
        targets = linear_layers(trunk)
    chosen = [part for name, part in trunk.named_modules() if name.rpartition(".")[2] in targets]
    return sum(settings["r"] * sum(part.weight.shape) for part in chosen)


def without_adapter(lora: Mapping[str, Any], model_config: PreTrainedConfig) -> str:
    """Says which large weights "all-linear" leaves frozen: experts, which are no linear layers.

    Transformers 5 keeps a layer's experts in one three-dimensional parameter.

    Returns:
        A sentence; "" where nothing is left out, or the layers are named one by one.
    """
    if {**DEFAULTS, **lora}["targets"] != ALL_LINEAR:
        return ""
    trunk = without_weights(model_config).base_model
    experts = [p for name, p in trunk.named_parameters() if p.dim() == 3 and "expert" in name]
    share = sum(p.numel() for p in experts) / sum(p.numel() for p in trunk.parameters())
    if not experts:
        return ""
    return (
        f"LoRA {ALL_LINEAR!r} gives the experts no adapter: {share:.0%} of the trunk's weights "
        "stay as they are."
    )


def trunk_beside(policy: Any) -> nn.Module:
    """A second trunk on the policy's own frozen weights, for adapters of its own."""
    trunk = trunk_of(policy)
    return copy.deepcopy(trunk, {id(weight): weight for weight in trunk.parameters()})


def add_adapters(model: nn.Module, lora: Mapping[str, Any], seed: int) -> None:
    """Freezes a model and gives its linear layers adapters, in place.

    Args:
        model: A causal LM, or a trunk.
        lora: See `check_lora`.
        seed: Decides A, whatever else has drawn random numbers.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    settings = {**DEFAULTS, **lora}
    targets = settings["targets"]
    if targets == ALL_LINEAR:
        targets = linear_layers(trunk_of(model) if is_causal_lm(model) else model)
    config = LoraConfig(
        r=settings["r"],
        lora_alpha=settings["alpha"],
        target_modules=list(targets),
        fan_in_fan_out=any(isinstance(part, Conv1D) for part in model.modules()),
    )
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    model.eval()  # peft's layers come in training mode


def merged_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of the model without adapters that computes what this one does.

    The frozen weights are read, never written: merging again gives the same bits.

    Returns:
        Tensors by the names that the model had before `add_adapters`.
    """
    state = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in model.state_dict().items()
        if ".lora_" not in name
    }
    with torch.no_grad():
        for name, layer in _adapted(model).items():
            delta = whole(layer.get_delta_weight(_ADAPTER))
            state[f"{name}.weight"] = state[f"{name}.weight"] + delta
    return state


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within it the model computes what it did before `add_adapters`."""
    layers = _adapted(model).values()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def _adapted(model: nn.Module) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {
        name.replace(_CHECKPOINT_PREFIX, ""): part
        for name, part in model.named_modules()
        if isinstance(part, LoraLayer)
    }
