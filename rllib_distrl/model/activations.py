"""What a forward pass keeps for the backward pass: its precision, and what is recomputed."""

import contextlib
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

PRECISIONS = ("fp32", "bf16")


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The context of a trunk's forward pass: weights stay float32, products are in bfloat16.

    Args:
        precision: One of `PRECISIONS`; with "fp32" nothing is cast.
        device: Where the trunk is.
    """
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def checkpoint_activations(model: nn.Module) -> None:
    """Lets each block keep its input alone; the backward pass runs it once more.

    Transformers' own switch acts in training mode only, where blocks may drop out. Names in
    state dicts stay as they are.

    Args:
        model: A Hugging Face model, changed in place.

    Raises:
        ValueError: If Transformers marks none of its blocks as fit for it.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    if not any(isinstance(part, GradientCheckpointingLayer) for part in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has no blocks that can be computed again. "
            "Leave activation_checkpointing out."
        )
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=lambda block: checkpoint_wrapper(
            block, CheckpointImpl.NO_REENTRANT, preserve_rng_state=False
        ),
        check_fn=lambda part: isinstance(part, GradientCheckpointingLayer),
    )
