"""vLLM's fused tensors, addressed under their Hugging Face names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from rllib_distrl.model.causal_lm import without_weights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def hugging_face_shapes(config: PreTrainedConfig) -> dict[str, torch.Size]:
    """Names and shapes of a causal LM's parameters; tied ones once, under their first name."""
    named = without_weights(config).named_parameters()
    return {name: parameter.shape for name, parameter in named}


def hugging_face_views(model: Any, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
    """Views of a vLLM model's own tensors.

    vLLM fuses projections (`packed_modules_mapping` lists them in order) and pads vocabularies.

    Args:
        model: vLLM's module, on one device, not quantised.
        shapes: Hugging Face names and shapes.

    Returns:
        Hugging Face name to a view of that shape.

    Raises:
        ValueError: Where vLLM keeps a tensor under another name or in another layout.
    """
    own = {name: parameter.data for name, parameter in model.named_parameters()}
    fused = getattr(model, "packed_modules_mapping", {})
    views = {}
    for name, shape in shapes.items():
        if name in own:
            view = own[name][: shape[0]] if own[name].shape[1:] == shape[1:] else own[name]
        else:
            view = _part(name, shapes, own, fused)
        if view is None or view.shape != shape:
            raise ValueError(
                f"vLLM's {type(model).__name__} keeps {name} {tuple(shape)} under another name or "
                "in another layout, so its weights cannot be verified. Use engine = 'torch'."
            )
        views[name] = view
    return views


def _part(
    name: str,
    shapes: Mapping[str, torch.Size],
    own: Mapping[str, torch.Tensor],
    fused: Mapping[str, list[str]],
) -> torch.Tensor | None:
    """The rows of a fused tensor that belong to a Hugging Face name."""
    prefix, _, rest = name.rpartition(".")
    prefix, _, projection = prefix.rpartition(".")
    for whole, parts in fused.items():
        storage = own.get(f"{prefix}.{whole}.{rest}")
        if storage is None or projection not in parts:
            continue
        sizes = [shapes[f"{prefix}.{part}.{rest}"][0] for part in parts]
        place = parts.index(projection)
        return storage[sum(sizes[:place]) :][: sizes[place]]
    return None
