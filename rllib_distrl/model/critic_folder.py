"""A critic on its own: a folder with `config.json` and `critic.safetensors`.

The folder holds the trunk that reads the tokens and the head on top of it, so it says as much
as the critic did, whatever policy it is put beside. Our format.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

FORMAT = "distrl-critic-1"
CONFIG, WEIGHTS = "config.json", "critic.safetensors"
TRUNK, HEAD = "critic.", "value_head."
"""Prefixes of the names in the file, which are those in `CausalLMModule`."""


def save_critic(
    path: str | Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    head_center: str,
    trunk_config: Mapping[str, Any],
) -> None:
    """Writes a critic.

    Args:
        path: The folder; made if it is missing.
        tensors: Trunk and head, by the names of `CausalLMModule`.
        head_center: What the centre of the head is: `mean` or `median`.
        trunk_config: Of the trunk, as Transformers writes it.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, folder / WEIGHTS
    )
    config = {
        "format": FORMAT,
        "n_quantiles": len(tensors[f"{HEAD}bias"]),
        "head_center": head_center,
        "trunk": dict(trunk_config),
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_critic_config(path: str | Path) -> dict[str, Any]:
    """The `config.json` of a critic.

    Raises:
        ValueError: If the folder holds no critic.
    """
    try:
        config = json.loads((Path(path) / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(
            f"{str(path)!r} holds no critic: its {CONFIG} is missing or of another format than "
            f"{FORMAT!r}. Make one with `distrl export RUN OUT --critic`."
        )
    return config


def check_critic(path: str | Path, *, n_quantiles: int, head_center: str) -> None:
    """Checks that a critic predicts what a module with these settings does.

    Raises:
        ValueError: If the folder holds no critic, or one with another head.
    """
    config = read_critic_config(path)
    wanted = {"n_quantiles": n_quantiles, "head_center": head_center}
    for name, value in wanted.items():
        if config[name] != value:
            raise ValueError(
                f"The critic in {str(path)!r} has {name}={config[name]!r}, the settings say "
                f"{value!r}. Set {name} = {json.dumps(config[name])}, or choose another critic."
            )


def load_critic(module: nn.Module, path: str | Path) -> None:
    """Puts a saved critic into a module with a trunk and a head of the same shapes.

    Args:
        module: A `CausalLMModule` with `critic="separate"`.
        path: The folder.

    Raises:
        ValueError: If a tensor is missing, left over or of another shape; the module then is as
            it was.
    """
    file = Path(path) / WEIGHTS
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"The critic in {file} cannot be read: {error}") from None
    own = {
        name: tensor
        for name, tensor in module.state_dict().items()
        if name.startswith((TRUNK, HEAD))
    }
    for name in sorted(own.keys() | tensors.keys()):
        shapes = [tuple(t[name].shape) if name in t else "missing" for t in (tensors, own)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"The critic in {str(path)!r} does not fit the model: {name} is {shapes[0]} in "
                f"the folder and {shapes[1]} in the model. Use the model that it was trained on."
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
