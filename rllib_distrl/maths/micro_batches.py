"""Cutting rows of unequal length into micro-batches of bounded size."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

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
