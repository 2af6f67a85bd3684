"""Rows of tokens without padding: packed, cut into micro-batches, and attended to.

Many rows stand as one, in which a prompt that several of them share stands once. Micro-batches hold
rows of unequal length in a bounded number of places. Attention of packed rows is computed on a CPU
by PyTorch's kernels; what rows share is neither computed nor kept twice.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

# Attention kernels of CPUs are up to a third faster at such lengths (measured).
_ALIGNMENT = 16


@dataclass(frozen=True)
class Packing:
    """N tokens that a trunk computes for B rows of G distinct prompts.

    First come the prompts, then the completions, without padding. Attention alone needs
    rectangles: G prompts of P places, and B completions of C places, with padding on the right.

    Attributes:
        input_ids: Tokens.
        owners: A row of each; of a prompt the first that has it.
        positions: Place of each in its row.
        places: Place of each in the rectangles: G P places, then B C.
        prompts: (G, P), the first rectangle's shape.
        completions: (B, C), the second one's.
        prompt: Which prompt each row has.
        prompt_lens: Tokens of each prompt.
        rows: Which of the N tokens stands at each place of each row; any in the
            padding, which is on the right.
    """

    input_ids: Int[Tensor, " N"]
    owners: Int[Tensor, " N"]
    positions: Int[Tensor, " N"]
    places: Int[Tensor, " N"]
    prompts: tuple[int, int]
    completions: tuple[int, int]
    prompt: Int[Tensor, " B"]
    prompt_lens: Int[Tensor, " B"]
    rows: Int[Tensor, "B S"]


def pack(
    input_ids: Int[Tensor, "B width"], prompt_lens: Int[Tensor, " B"], lengths: Int[Tensor, " B"]
) -> Packing:
    """Packs rows that begin with prompts, equal ones once.

    Args:
        input_ids: Prompts and completions, right padding.
        prompt_lens: Tokens of each prompt.
        lengths: Tokens of each row that are wanted, prompt included.
    """
    first = first_of_prompt(input_ids, prompt_lens)
    rows = torch.arange(len(first), device=first.device)
    alone = (first == rows).nonzero().squeeze(-1)
    prompt = torch.zeros_like(first).index_copy(0, alone, rows[: len(alone)])[first]
    place = torch.arange(int(lengths.max()), device=first.device)
    of_prompt = place < prompt_lens[alone, None]
    following = (place >= prompt_lens[:, None]) & (place < lengths[:, None])
    number = torch.cat([of_prompt, following]).flatten().cumsum(0).view(-1, len(place)) - 1
    in_prompts, in_rows = of_prompt.nonzero(), following.nonzero()
    width = _aligned(prompt_lens.max())
    steps = _aligned((lengths - prompt_lens).max())
    completion_place = in_rows[:, 1] - prompt_lens[in_rows[:, 0]]
    owners = torch.cat([alone[in_prompts[:, 0]], in_rows[:, 0]])
    positions = torch.cat([in_prompts[:, 1], in_rows[:, 1]])
    return Packing(
        input_ids=input_ids[owners, positions],
        owners=owners,
        positions=positions,
        places=torch.cat(
            [
                in_prompts[:, 0] * width + in_prompts[:, 1],
                len(alone) * width + in_rows[:, 0] * steps + completion_place,
            ]
        ),
        prompts=(len(alone), width),
        completions=(len(first), steps),
        prompt=prompt,
        prompt_lens=prompt_lens,
        rows=torch.where(
            place < prompt_lens[:, None], number[prompt], number[len(alone) :].clamp(min=0)
        ),
    )


def first_of_prompt(
    input_ids: Int[Tensor, "B S"], prompt_lens: Int[Tensor, " B"]
) -> Int[Tensor, " B"]:
    """The first row with the same prompt as each row."""
    ids, lens = input_ids.cpu().numpy(), prompt_lens.tolist()
    seen: dict[bytes, int] = {}
    first = [seen.setdefault(ids[row, :n].tobytes(), row) for row, n in enumerate(lens)]
    return torch.tensor(first, device=input_ids.device)


def _aligned(length: Tensor) -> int:
    return max(1, -(-int(length) // _ALIGNMENT)) * _ALIGNMENT


# What a micro-batch costs by itself, as a share of the budget (our choice): small enough that
# padding stays below 10 % where a minibatch fills the budget, large enough that a minibatch far
# below it is not cut to pieces.
_FIXED_COST = 1 / 64


def split_by_token_budget(lengths: Int[Tensor, " B"], budget: int) -> list[Tensor]:
    """Groups rows of similar length so that rows x longest row <= budget, with least padding.

    Rows are sorted; where to cut is the exact minimum, by dynamic programming, of all
    micro-batches' tokens, padding included, plus a fixed cost for each (our choice).

    Args:
        lengths: Tokens of each row, prompt included.
        budget: Most tokens of one micro-batch, padding included.

    Returns:
        Index tensors, shortest rows first, that together hold every row once, on the device of
        ``lengths``.

    Raises:
        ValueError: if one row alone exceeds the budget.
    """
    _check_longest(lengths, budget)
    order = torch.argsort(lengths, stable=True)
    cuts = _cuts(lengths[order].cpu().numpy(), budget)
    return [order[start:end] for start, end in pairwise(cuts)]


@dataclass
class _Rectangles:
    """What attention computes of packed rows, padding included: see `split_packed`."""

    whole_rows: bool
    prompts: int = 0
    rows: int = 0
    prompt: int = 0
    completion: int = 0
    row: int = 0

    def with_row(self, prompt: int, row: int, *, new_prompt: bool) -> "_Rectangles":
        return _Rectangles(
            self.whole_rows,
            self.prompts + new_prompt,
            self.rows + 1,
            max(self.prompt, prompt),
            max(self.completion, row - prompt),
            max(self.row, row),
        )

    @property
    def places(self) -> int:
        if self.whole_rows:
            return self.rows * self.row
        return self.prompts * self.prompt + self.rows * self.completion


def split_packed(
    prompt: Int[Tensor, " B"],
    prompt_lens: Int[Tensor, " B"],
    lengths: Int[Tensor, " B"],
    budget: int,
    *,
    whole_rows: bool = False,
) -> list[Tensor]:
    """Groups rows so that what packed rows compute is at most ``budget`` places.

    Attention needs rectangles, which pad: prompts x longest prompt and rows x longest completion;
    or, where it cannot share prompts, rows x longest row (``whole_rows``). Everything else is
    computed without padding, so the rectangles are the most that there is of anything. That CPUs'
    attention rounds their sides up to 16 is not counted.

    Rows with the same prompt stay together, so that it is computed once; only a group that fills
    the budget is cut. Groups come in the order of their longest rows, so that little is padded.

    Args:
        prompt: Equal for rows with the same prompt.
        prompt_lens: Tokens of each prompt.
        lengths: Tokens of each row, prompt included.
        budget: Most places of one micro-batch.
        whole_rows: Whether attention computes each row with its own copy of the prompt.

    Returns:
        Index tensors that together hold every row once, on the device of ``lengths``.

    Raises:
        ValueError: if one row alone exceeds the budget.
    """
    _check_longest(lengths, budget)
    longest = torch.zeros_like(lengths).scatter_reduce(0, prompt, lengths, "amax")[prompt]
    order = np.lexsort([x.cpu().numpy() for x in (lengths, prompt, longest)])
    prompts, of_prompt, whole = (x.tolist() for x in (prompt, prompt_lens, lengths))
    parts: list[list[int]] = []
    empty = _Rectangles(whole_rows)
    filled, seen = empty, -1
    for row in order.tolist():
        new_prompt = prompts[row] != seen
        more = filled.with_row(of_prompt[row], whole[row], new_prompt=new_prompt)
        if not parts or more.places > budget:
            parts.append([])
            more = empty.with_row(of_prompt[row], whole[row], new_prompt=True)
        parts[-1].append(row)
        filled, seen = more, prompts[row]
    return [torch.tensor(part, device=lengths.device) for part in parts]


def _check_longest(lengths: Tensor, budget: int) -> None:
    longest = int(lengths.max())
    if longest > budget:
        raise ValueError(
            f"A sequence of {longest} tokens exceeds micro_batch_tokens={budget}. "
            f"Set micro_batch_tokens to at least {longest}."
        )


def _cuts(lengths: np.ndarray, budget: int) -> list[int]:
    """Where the micro-batches of rows of ascending length begin, and the end."""
    rows = np.arange(len(lengths))
    cost = np.zeros(len(lengths) + 1)
    begin = np.zeros(len(lengths) + 1, dtype=np.int64)
    for end in range(1, len(lengths) + 1):
        longest = int(lengths[end - 1])
        first = max(0, end - budget // max(longest, 1))
        costs = cost[first:end] + longest * (end - rows[first:end])
        best = int(costs.argmin())
        cost[end] = costs[best] + budget * _FIXED_COST
        begin[end] = first + best
    cuts = [len(lengths)]
    while cuts[-1]:
        cuts.append(int(begin[cuts[-1]]))
    return cuts[::-1]


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
    They are given float32 where inputs are half as wide: forward they take as long then, and
    backward a fifth to a half (measured on AVX512-BF16).

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
            attn_mask=_prompt_mask(packing, q), scale=scale,
        )  # fmt: skip
        lse = torch.logaddexp(lse_own, lse_seen)
        own_share, seen_share = (lse_own - lse).exp_(), (lse_seen - lse).exp_()
        both = (own * own_share.unsqueeze(-1)).addcmul_(seen, seen_share.unsqueeze(-1))
        out = _packed(first, both, packing).to(query.dtype)
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
            attn_mask=_prompt_mask(packing, q), scale=scale,
        )  # fmt: skip
        for whole, part in zip(in_prompt[1:], seen[1:], strict=True):
            whole.index_add_(0, packing.prompt, part)
        grad_query = _packed(in_prompt[0], own[0].add_(seen[0]), packing)
        grad_key, grad_value = (
            _packed(of_prompt, of_rows, packing).unflatten(1, (-1, repeats)).sum(2)
            for of_prompt, of_rows in zip(in_prompt[1:], own[1:], strict=True)
        )
        given = (grad.to(query.dtype) for grad in (grad_query, grad_key, grad_value))
        return (*given, None, None)


def _rectangles(x: Tensor, packing: Packing, repeats: int = 1) -> tuple[Tensor, Tensor]:
    """(G, heads, P, D) and (B, heads, C, D) of packed (N, heads, D), zeros in the padding.

    In float32 at least.
    """
    (n, width), (rows, steps) = packing.prompts, packing.completions
    x = x.to(torch.promote_types(x.dtype, torch.float32))
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
