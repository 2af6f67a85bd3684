"""How a model computes: attention over packed rows, precision, and what is computed again."""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

from rllib_distrl.maths.packing import Packing, packed_attention

ATTENTION = "packed_rows"
_FULL = "full_attention"


def let_pack_rows(model: Any) -> str | None:
    """Gives a model the attention that knows packed rows, if its blocks allow it.

    The one rule for all models: they say that their attention can be exchanged, and every block
    sees all that precedes a token. A sliding window or a recurrence is bound to the order of the
    row that it runs over; such models compute padded rows, each with its own prompt. Whether what
    a model says of itself is true, `self_check` tries.

    Args:
        model: A Hugging Face causal LM, changed in place.

    Returns:
        The attention that it had, for `unpack_rows`; None where it still has it.
    """
    from transformers import AttentionInterface

    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None) if kinds is None else None
    if (
        model._supports_attention_backend
        and model._can_set_attn_implementation()
        and not model._is_stateful
        and window is None
        and set(kinds or [_FULL]) == {_FULL}
    ):
        AttentionInterface.register(ATTENTION, _attention)
        before = model.config._attn_implementation
        model.set_attn_implementation(ATTENTION)
        return before
    return None


def packs_rows(model: Any) -> bool:
    """Whether `let_pack_rows` has changed this model, or the one of this trunk."""
    return model.config._attn_implementation == ATTENTION


def unpack_rows(model: Any, attention: str) -> None:
    """Gives a model back the attention that it had: it computes padded rows again."""
    model.set_attn_implementation(attention)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Packing | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention (1, N, heads, D) of queries, keys and values (1, heads, N, D)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    # Under autocast rotated queries and keys are float32, and values are not.
    queries, keys, values = (
        x.squeeze(0).transpose(0, 1).to(value.dtype) for x in (query, key, value)
    )
    if query.device.type == "cpu":
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        return packed_attention(queries, keys, values, packing, scale).unsqueeze(0), None
    return attention_of_rows(module, queries, keys, values, packing, **kwargs).unsqueeze(0), None


def attention_of_rows(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, packing: Packing, **kwargs: Any
) -> Tensor:
    """PyTorch's own attention (N, heads, D) on any device, prompts attended once per row."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    q, k, v = (x[packing.rows].transpose(1, 2) for x in (query, key, value))
    seen, _ = sdpa_attention_forward(module, q, k, v, None, **kwargs)
    return seen[packing.owners, packing.positions]


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


def freeze_attention(model: nn.Module) -> None:
    """Takes the attention of each block, its projections and norms, out of what is trained.

    Args:
        model: A Hugging Face model, changed in place.

    Raises:
        ValueError: If none of its modules is called `self_attn`, as in Transformers' decoders.
    """
    blocks = [part for name, part in model.named_modules() if name.endswith("self_attn")]
    if not blocks:
        raise ValueError(
            f"critic_freeze is 'attention', but {type(model).__name__} has no module `self_attn`. "
            "Leave critic_freeze out."
        )
    for block in blocks:
        block.requires_grad_(False)


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
