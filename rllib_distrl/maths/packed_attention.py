"""Causal attention of packed rows on a CPU: what rows share is neither computed nor kept twice."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from rllib_distrl.maths.packing import Packing

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def packed_attention(
    query: Float[Tensor, "N heads D"],
    key: Float[Tensor, "N kv_heads D"],
    value: Float[Tensor, "N kv_heads E"],
    packing: Packing,
    scale: float,
) -> Float[Tensor, "N heads E"]:
    """Softmax attention of each token to its prompt and to what precedes it in its row.

    A completion's token sees its own row (causal) and its prompt (whole): two attentions, whose
    outputs are averaged with their normalisers as weights, o = sum_i e^(l_i - l) o_i with
    l = ln sum_i e^(l_i). Given o and l, each part's gradient is that of the whole (Dao 2022, eq.
    of dS: dS = P (dP - rowsum(dO o)), P = e^(S - l)), so no matrix of scores is kept.

    The kernels want heads of one size: the narrower of queries and values get zeros behind them.

    Args:
        query: N tokens in a packing.
        key: Heads are a multiple of kv_heads.
        value: May be of another width.
        packing: of these N tokens.
        scale: of the scores.

    Returns:
        Differentiable once.
    """
    size = value.shape[-1]
    width = max(query.shape[-1], size)
    query, key, value = (
        x if x.shape[-1] == width else pad(x, (0, width - x.shape[-1])) for x in (query, key, value)
    )
    out: Tensor = _PackedAttention.apply(query, key, value, packing, scale)  # pyright: ignore[reportAssignmentType]
    return out if size == width else out[..., :size]


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float
    ) -> Tensor:
        repeats = query.shape[1] // key.shape[1]
        (q_first, q), (k_first, k), (v_first, v) = (
            _rectangles(query, packing),
            _rectangles(key, packing, repeats),
            _rectangles(value, packing, repeats),
        )
        first, lse_first = _forward(q_first, k_first, v_first, 0.0, True, scale=scale)
        own, lse_own = _forward(q, k, v, 0.0, True, scale=scale)
        seen, lse_seen = _forward(
            q, k_first[packing.prompt], v_first[packing.prompt], 0.0, False,
            attn_mask=_prompt_mask(packing, query), scale=scale,
        )  # fmt: skip
        lse = torch.logaddexp(lse_own, lse_seen)
        own_share, seen_share = (lse_own - lse).exp_(), (lse_seen - lse).exp_()
        both = (own * own_share.unsqueeze(-1)).addcmul_(seen, seen_share.unsqueeze(-1))
        out = _packed(first, both.to(query.dtype), packing)
        ctx.save_for_backward(query, key, value, out, lse_first, lse)
        ctx.packing, ctx.scale = packing, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse_first, lse = ctx.saved_tensors
        packing, scale = ctx.packing, ctx.scale
        repeats = query.shape[1] // key.shape[1]
        (q_first, q), (o_first, o), (g_first, g) = (
            _rectangles(tensor, packing) for tensor in (query, out, grads[0])
        )
        (k_first, k), (v_first, v) = (_rectangles(x, packing, repeats) for x in (key, value))
        in_prompt = _backward(
            g_first, q_first, k_first, v_first, o_first, lse_first, 0.0, True, scale=scale
        )
        own = _backward(g, q, k, v, o, lse, 0.0, True, scale=scale)
        seen = _backward(
            g, q, k_first[packing.prompt], v_first[packing.prompt], o, lse, 0.0, False,
            attn_mask=_prompt_mask(packing, query), scale=scale,
        )  # fmt: skip
        for whole, part in zip(in_prompt[1:], seen[1:], strict=True):
            whole.index_add_(0, packing.prompt, part)
        grad_query = _packed(in_prompt[0], own[0].add_(seen[0]), packing)
        grad_key, grad_value = (
            _packed(of_prompt, of_rows, packing).unflatten(1, (-1, repeats)).sum(2)
            for of_prompt, of_rows in zip(in_prompt[1:], own[1:], strict=True)
        )
        return grad_query, grad_key, grad_value, None, None


def _rectangles(x: Tensor, packing: Packing, repeats: int = 1) -> tuple[Tensor, Tensor]:
    """(G, heads, P, D) and (B, heads, C, D) of packed (N, heads, D), zeros in the padding."""
    (n, width), (rows, steps) = packing.prompts, packing.completions
    whole = x.new_zeros(n * width + rows * steps, *x.shape[1:])
    whole.index_copy_(0, packing.places, x)
    if repeats > 1:
        whole = whole.repeat_interleave(repeats, dim=1)
    first, rest = whole.split([n * width, rows * steps])
    return (
        first.unflatten(0, (n, width)).transpose(1, 2),
        rest.unflatten(0, (rows, steps)).transpose(1, 2),
    )


def _packed(first: Tensor, rest: Tensor, packing: Packing) -> Tensor:
    """The inverse of `_rectangles`."""
    parts = [part.transpose(1, 2).flatten(0, 1) for part in (first, rest)]
    return torch.cat(parts).index_select(0, packing.places)


def _prompt_mask(packing: Packing, like: Tensor) -> Tensor | None:
    """(B, 1, 1, P), added to the scores: minus infinity behind each prompt; None for none."""
    place = torch.arange(packing.prompts[1], device=like.device)
    beyond = place >= packing.prompt_lens[:, None]
    if not bool(beyond.any()):
        return None
    mask = torch.zeros(beyond.shape, dtype=like.dtype, device=like.device)
    return mask.masked_fill_(beyond, float("-inf"))[:, None, None]
