"""Cutting rows of unequal length into micro-batches of bounded size."""

from itertools import pairwise

import numpy as np
import torch

# What a micro-batch costs by itself, as a share of the budget (our choice): small enough that
# padding stays below 10 % where a minibatch fills the budget, large enough that a minibatch far
# below it is not cut to pieces.
_FIXED_COST = 1 / 64


def split_by_token_budget(lengths: torch.Tensor, budget: int) -> list[torch.Tensor]:
    """Groups rows of similar length so that rows x longest row <= budget, with least padding.

    Rows are sorted; where to cut is the exact minimum, by dynamic programming, of all
    micro-batches' tokens, padding included, plus a fixed cost for each (our choice).

    Args:
        lengths: (B,) int, tokens of each row, prompt included.
        budget: most tokens of one micro-batch, padding included.

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


def split_packed(
    prompt: torch.Tensor, prompt_lens: torch.Tensor, lengths: torch.Tensor, budget: int
) -> list[torch.Tensor]:
    """Groups rows so that what packed rows compute is at most ``budget`` tokens.

    Rows with the same prompt stay together, so that it is computed once; only a group that fills
    the budget is cut. Groups come in the order of their longest rows, because attention pads.

    Args:
        prompt: (B,) int64, equal for rows with the same prompt.
        prompt_lens: (B,) int64.
        lengths: (B,) int64, tokens of each row, prompt included.
        budget: most tokens of one micro-batch: each prompt once, and completions.

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
    tokens, seen = budget, -1
    for row in order.tolist():
        alone = whole[row]
        more = alone if prompts[row] != seen else alone - of_prompt[row]
        if tokens + more > budget:
            parts.append([])
            tokens, more = 0, alone
        parts[-1].append(row)
        tokens, seen = tokens + more, prompts[row]
    return [torch.tensor(part, device=lengths.device) for part in parts]


def _check_longest(lengths: torch.Tensor, budget: int) -> None:
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
