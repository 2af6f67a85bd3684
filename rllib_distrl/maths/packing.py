"""Many rows of tokens as one, in which a prompt that several rows share stands once."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

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
