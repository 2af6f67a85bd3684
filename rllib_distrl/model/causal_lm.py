"""A causal language model: its trunk and its head, and how it computes.

What it does around its head is found by running it: what stands before the head (a projection, a
norm) is run as the model runs it, and what follows the head (a factor, a soft cap) is measured;
nothing is read off names of settings. Then attention over packed rows, precision, and what is
computed again in the backward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

from rllib_distrl.maths.lm_head import LogitMap
from rllib_distrl.maths.packing import Packing, packed_attention

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# What the head is made to say while its map is measured: both signs, from near zero to saturation.
_SMALL, _LARGE = 2.0**-7, 2.0**20
_PROBES = [sign * x for x in (_SMALL, 0.5, 1.0, 4.0, 8.0, 32.0, 128.0, _LARGE) for sign in (1, -1)]
# Float32 rounding of a division, a tanh and a product stays far below it.
_TOLERANCE = 1e-5
_MEASURED_TOKENS = 4


class _HeadReached(Exception):
    """Ends a forward pass at the LM head."""


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Transformers shows no bars inside: for models that load at once they are only noise."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def without_weights(config: PreTrainedConfig) -> Any:
    """The causal LM of a configuration with its parameters' shapes, none of them allocated."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def is_causal_lm(model: Any) -> bool:
    """Whether this is a whole causal LM, not a trunk."""
    return model.get_output_embeddings() is not None


def trunk_name(model: Any) -> str:
    """The name of the part of a causal LM that turns tokens into hidden states.

    Raises:
        ValueError: If no part of the model does.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    named = dict(model.named_children())
    prefix = model.base_model_prefix
    candidates = {prefix: named[prefix]} if prefix in named else named
    for name, part in candidates.items():
        if part is not head and any(inner is embeddings for inner in part.modules()):
            return name
    raise ValueError(
        f"{type(model).__name__} has no part that turns tokens into hidden states, so there is "
        "nothing for a critic to start from and no state to learn on. Choose a decoder-only "
        "causal language model."
    )


def trunk_of(model: Any) -> Any:
    """The module that `trunk_name` names."""
    return getattr(model, trunk_name(model))


def last_states(model: Any, **inputs: Any) -> Tensor:
    """Hidden states (B, S, H): of a causal LM what its head reads, of a trunk what it returns.

    Args:
        model: A causal LM or a trunk.
        inputs: Of its forward pass.

    Raises:
        ValueError: If a causal LM never calls its head.
    """
    if not is_causal_lm(model):
        outputs = model(**inputs)
        states = getattr(outputs, "last_hidden_state", None)
        return outputs[0] if states is None else states
    reached: list[Tensor] = []

    def stop(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        reached.append(arguments[0])
        raise _HeadReached

    # Before all other hooks, so that a head which is sharded is not gathered.
    handle = model.get_output_embeddings().register_forward_pre_hook(stop, prepend=True)
    try:
        model(**inputs)
    except _HeadReached:
        return reached[0]
    finally:
        handle.remove()
    raise ValueError(f"{type(model).__name__} computes its logits without calling its LM head.")


def logit_map_of(model: Any) -> LogitMap:
    """Measures what a causal LM does to the output of its LM head.

    The head is made to give known numbers, and the model's logits say what became of them: where
    they saturate is the cap, their slope at zero the scale. Our choice.

    Args:
        model: A causal LM, left as it was.

    Raises:
        ValueError: If it is neither a factor nor a soft cap, the same for all tokens.
    """
    given: list[Tensor] = []

    def answer(head: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        values = torch.tensor(_PROBES, dtype=output.dtype, device=output.device)
        repeats = -(-output.numel() // len(values))
        given.append(values.repeat(repeats)[: output.numel()].view_as(output))
        return given[-1].clone()

    ids = torch.tensor([ordinary_tokens(model.config, _MEASURED_TOKENS)])
    handle = model.get_output_embeddings().register_forward_hook(answer)
    try:
        with torch.no_grad():
            logits = model(input_ids=ids.to(model.device), use_cache=False).logits
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} cannot be run on tokens alone ({gist(error)}), so it cannot "
            "be trained as a causal language model. Choose another model."
        ) from error
    finally:
        handle.remove()
    if len(given) != 1 or given[0].shape != logits.shape:
        raise _unknown(model)
    z, logits = given[0].double(), logits.double()
    if torch.equal(z, logits):
        return LogitMap()
    found = _fitted(z, logits, list(_numbers(model.config)))
    error = (found(z) - logits).abs() / found(z).abs().clamp(min=1e-3)
    if not bool((error < _TOLERANCE).all()):
        raise _unknown(model)
    return found


def _fitted(z: Tensor, logits: Tensor, settings: list[float]) -> LogitMap:
    small, large = z == _SMALL, z == _LARGE
    scale, top = float((logits[small] / z[small]).mean()), float(logits[large].mean())
    cap = None if abs(top) > 0.5 * abs(scale) * _LARGE else _nearest(abs(top), settings)
    return LogitMap(_nearest(scale, [1.0, *settings, *(1 / x for x in settings)]), cap)


def _nearest(value: float, settings: list[float]) -> float:
    """The setting that a measured number must be, or else the number itself."""
    close = [x for x in settings if abs(x - value) <= 1e-4 * abs(value)]
    return min(close, key=lambda x: abs(x - value), default=value)


def _numbers(config: PreTrainedConfig) -> Iterator[float]:
    for value in config.get_text_config().to_dict().values():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
            yield float(value)


def _unknown(model: Any) -> ValueError:
    return ValueError(
        f"{type(model).__name__} does more to the output of its LM head than multiply or softly "
        "cap it, so its probabilities cannot be learned on. Choose another model."
    )


@torch.no_grad()
def own_logits(model: Any, ids: Sequence[int]) -> Tensor:
    """A causal LM's own float32 logits (S, V) of one row of tokens: no cache, no padding."""
    row = torch.tensor([list(ids)], device=model.device)
    return model(input_ids=row, use_cache=False).logits[0].float()


def gist(error: Exception) -> str:
    """An error on one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]:.200}"


def ordinary_tokens(config: PreTrainedConfig, count: int, seed: int = 0) -> list[int]:
    """Random tokens of a model's vocabulary, none of which its configuration gives a meaning.

    Args:
        config: Of the model.
        count: How many; they may repeat.
        seed: Which.
    """
    special = set(_special_tokens(config.to_dict()))
    size = config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(size, (16 * count + 16 * len(special),), generator=generator).tolist()
    allowed = [token for token in drawn if token not in special] or drawn
    return (allowed * count)[:count]


def _special_tokens(settings: Any) -> Iterator[int]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _special_tokens(value)
        elif "token" in str(name):
            yield from (
                x for x in (value if isinstance(value, list) else [value]) if isinstance(x, int)
            )


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
