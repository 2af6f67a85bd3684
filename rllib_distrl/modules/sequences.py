"""The layout of sequences: row = prompt, completion, right padding."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from ray.rllib.core.columns import Columns

from rllib_distrl.maths.packing import Packing, pack

INPUT_IDS = "input_ids"
PROMPT_LENS = "prompt_lens"


@dataclass(frozen=True)
class Sequences:
    """Token rows of a batch and where their completions lie.

    Rows are padded on the right, so causal attention needs no mask. Completion token t is
    predicted from position ``prompt_lens - 1 + t``, which also is the state s_t.

    Attributes:
        input_ids: (B, S) int64 prompt and completion.
        prompt_lens: (B,) int64.
        actions: (B, T) int64 completion tokens, right padded.
        mask: (B, T) bool, True where ``actions`` holds a token.
    """

    input_ids: torch.Tensor
    prompt_lens: torch.Tensor
    actions: torch.Tensor
    mask: torch.Tensor

    @property
    def lengths(self) -> torch.Tensor:
        """(B,) tokens per row, prompt included."""
        return self.prompt_lens + self.mask.sum(-1)

    @cached_property
    def packing(self) -> Packing:
        """These rows packed, without each row's last token, whose state nothing reads."""
        lengths = torch.maximum(self.lengths - 1, self.prompt_lens)
        return pack(self.input_ids, self.prompt_lens, lengths)

    def states(self, hidden: torch.Tensor) -> torch.Tensor:
        """Picks s_0 ... s_{T-1} from ``hidden`` (B, S, H): shape (B, T, H)."""
        index = self._state_places(hidden.shape[1])
        return hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))

    @cached_property
    def packed_states(self) -> torch.Tensor:
        """(B, T) int64: which of the packed tokens' states s_0 ... s_{T-1} are."""
        rows = self.packing.rows
        return rows.gather(1, self._state_places(rows.shape[1]))

    def _state_places(self, width: int) -> torch.Tensor:
        steps = torch.arange(self.actions.shape[1], device=self.actions.device)
        return (self.prompt_lens[:, None] - 1 + steps).clamp(max=width - 1)

    def rows(self, index: torch.Tensor) -> "Sequences":
        """The chosen rows, cut to the longest completion and the longest row among them."""
        mask = self.mask[index]
        prompt_lens = self.prompt_lens[index]
        steps = max(int(mask.sum(-1).max()), 1)
        width = max(int((prompt_lens + mask.sum(-1)).max()), 1)
        return Sequences(
            self.input_ids[index, :width],
            prompt_lens,
            self.actions[index, :steps],
            mask[:, :steps],
        )


def from_columns(batch: dict[str, Any]) -> Sequences:
    """Reads the sequences that `SequencesFromEpisodes` put into ``batch``."""
    return Sequences(
        batch[INPUT_IDS], batch[PROMPT_LENS], batch[Columns.ACTIONS], batch[Columns.LOSS_MASK]
    )


def from_incremental_obs(batch: dict[str, Any]) -> Sequences:
    """Rebuilds the sequences from RLlib's own (B, T, ...) columns.

    The observation at t = 0 holds the prompt as (count, ids ...); every later one repeats the
    action before it, so the prompt and the actions say everything. Steps that RLlib's GAE
    connector adds behind an episode are kept: their state is the one after the last token.

    Args:
        batch: ``obs`` (B, T, 1 + max_prompt_tokens) and ``actions`` (B, T).

    Returns:
        Sequences whose mask is True at every step.

    Raises:
        ValueError: if a row does not begin with its prompt (a cut episode).
    """
    first = batch[Columns.OBS][:, 0].long()
    actions = batch[Columns.ACTIONS].long()
    prompt_lens = first[:, 0]
    if int(prompt_lens.min()) < 1:
        raise ValueError(
            "An episode reached the module without its prompt. Use obs_mode='incremental' and "
            "model_config['max_seq_len'] above the completion limit, so that no episode is cut."
        )
    rows, steps = actions.shape
    input_ids = first.new_zeros(rows, int(prompt_lens.max()) + steps)
    width = torch.arange(input_ids.shape[1], device=first.device)
    in_prompt = width < prompt_lens[:, None]
    in_completion = (width >= prompt_lens[:, None]) & (width < prompt_lens[:, None] + steps)
    prompts = first[:, 1 : input_ids.shape[1] + 1]
    input_ids[in_prompt] = prompts[in_prompt[:, : prompts.shape[1]]]
    input_ids[in_completion] = actions.flatten()
    return Sequences(input_ids, prompt_lens, actions, torch.ones_like(actions, dtype=torch.bool))
