"""Token rows (prompt, completion, right padding), and the distribution of their sampled tokens."""

from dataclasses import dataclass
from functools import cached_property
from operator import index
from typing import Any

import gymnasium as gym
import torch
from ray.rllib.core.columns import Columns
from ray.rllib.core.distribution.distribution import Distribution

from rllib_distrl.maths.packing import Packing, pack

INPUT_IDS = "input_ids"
PROMPT_LENS = "prompt_lens"
REPLY_TOKENS = "reply_tokens"
CRITIC_OBSERVATIONS = "critic_observations"
CRITIC_TEXT_IDS = "critic_text_ids"
CRITIC_TEXT_LENS = "critic_text_lens"
N_INPUTS = 2
"""Of `SampledTokenDistribution`: logp and entropy."""


@dataclass(frozen=True)
class Sequences:
    """Token rows of a batch and where their sampled tokens lie.

    Rows are padded on the right, so causal attention needs no mask. A row is a prompt, sampled
    tokens, and between these what an environment replied. Columns per token, (B, T), are of sampled
    tokens only: token t is predicted from the place before it, ``prompt_lens - 1 + t +
    reply_tokens[t]``, whose state is s_t. What is said of a state before a token (values, targets,
    advantages) so passes over replies.

    Attributes:
        input_ids: (B, S) int64 prompt, sampled tokens and replies.
        prompt_lens: (B,) int64.
        actions: (B, T) int64 sampled tokens, right padded.
        mask: (B, T) bool, True where ``actions`` holds a token.
        reply_tokens: (B, T) int64, tokens of replies between the prompt and each sampled token;
            in the padding as at the row's last token.
        observations: (B, T, n) float32, what the critic alone is told of each state; or None.
        text_ids: (B, L) int64 right-padded tokens before the row, for the critic alone; or None.
        text_lens: (B,) int64, of ``text_ids``.
    """

    input_ids: torch.Tensor
    prompt_lens: torch.Tensor
    actions: torch.Tensor
    mask: torch.Tensor
    reply_tokens: torch.Tensor
    observations: torch.Tensor | None = None
    text_ids: torch.Tensor | None = None
    text_lens: torch.Tensor | None = None

    @property
    def lengths(self) -> torch.Tensor:
        """(B,) tokens per row, prompt and replies included."""
        return self.prompt_lens + self.mask.sum(-1) + self.reply_tokens[:, -1]

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
        places = self.prompt_lens[:, None] - 1 + steps + self.reply_tokens
        return places.clamp(max=width - 1)

    def rows(self, index: torch.Tensor) -> "Sequences":
        """The chosen rows, cut to the longest completion and the longest row among them."""
        mask = self.mask[index]
        steps = max(int(mask.sum(-1).max()), 1)
        width = max(int(self.lengths[index].max()), 1)
        return Sequences(
            self.input_ids[index, :width],
            self.prompt_lens[index],
            self.actions[index, :steps],
            mask[:, :steps],
            self.reply_tokens[index, :steps],
            None if self.observations is None else self.observations[index, :steps],
            None if self.text_ids is None else self.text_ids[index],
            None if self.text_lens is None else self.text_lens[index],
        )

    @cached_property
    def behind_text(self) -> "Sequences":
        """The rows as the critic reads them: with its text as the beginning of their prompts."""
        if self.text_ids is None or self.text_lens is None:
            return self
        lengths = self.text_lens + self.lengths
        place = torch.arange(int(lengths.max()), device=lengths.device) - self.text_lens[:, None]
        in_text = (place + self.text_lens[:, None]).clamp(max=max(self.text_ids.shape[1] - 1, 0))
        in_row = place.clamp(min=0, max=self.input_ids.shape[1] - 1)
        ids = self.input_ids.gather(1, in_row)
        if self.text_ids.shape[1]:
            ids = torch.where(place < 0, self.text_ids.gather(1, in_text), ids)
        prompt_lens = self.prompt_lens + self.text_lens
        return Sequences(ids, prompt_lens, self.actions, self.mask, self.reply_tokens)


def from_columns(batch: dict[str, Any]) -> Sequences:
    """Reads the sequences that `SequencesFromEpisodes` put into ``batch``.

    Without ``reply_tokens`` nothing was replied.
    """
    actions = batch[Columns.ACTIONS]
    replied = batch.get(REPLY_TOKENS)
    return Sequences(
        batch[INPUT_IDS],
        batch[PROMPT_LENS],
        actions,
        batch[Columns.LOSS_MASK],
        torch.zeros_like(actions) if replied is None else replied,
        batch.get(CRITIC_OBSERVATIONS),
        batch.get(CRITIC_TEXT_IDS),
        batch.get(CRITIC_TEXT_LENS),
    )


def from_incremental_obs(batch: dict[str, Any]) -> Sequences:
    """Rebuilds the sequences from RLlib's own (B, T, ...) columns.

    The observation at t = 0 holds the prompt as (count, ids ...); every later one holds the action
    before it and what the environment replied to that. Steps that RLlib's GAE connector adds behind
    an episode are kept: their state is the one after the last token.

    Args:
        batch: ``obs`` (B, T, 1 + max_prompt_tokens) and ``actions`` (B, T).

    Returns:
        Sequences whose mask is True at every step, with ``critic_observations`` if they are there.

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
    counts = batch[Columns.OBS][:, 1:, 0].long()
    replied = (counts - 1).clamp(min=0).cumsum(1)
    reply_tokens = torch.cat((torch.zeros_like(prompt_lens)[:, None], replied), dim=1)
    places = prompt_lens[:, None] + torch.arange(steps, device=first.device) + reply_tokens
    input_ids = first.new_zeros(rows, int(places.max()) + 1)
    width = torch.arange(input_ids.shape[1], device=first.device)
    in_prompt = width < prompt_lens[:, None]
    prompts = first[:, 1 : input_ids.shape[1] + 1]
    input_ids[in_prompt] = prompts[in_prompt[:, : prompts.shape[1]]]
    input_ids.scatter_(1, places, actions)
    for row, before in (counts > 1).nonzero().tolist():
        count, end = int(counts[row, before]), int(places[row, before + 1])
        reply = batch[Columns.OBS][row, before + 1, 2 : count + 1].long()
        input_ids[row, end - count + 1 : end] = reply
    mask = torch.ones_like(actions, dtype=torch.bool)
    told = batch.get(CRITIC_OBSERVATIONS)
    return Sequences(input_ids, prompt_lens, actions, mask, reply_tokens, told)


def from_prompts(batch: dict[str, Any], policy: Any) -> Sequences:
    """Reads prompts whose next tokens are asked for.

    Args:
        batch: ``obs``, B lists of token ids of any lengths; or right-padded (B, S) integers with
            ``seq_lens`` (B,), RLlib's column for that.
        policy: the causal LM that is asked; the sequences will be on its device.

    Returns:
        Sequences with completions of one step, of which none is there.

    Raises:
        ValueError: for anything else, among them the observations of an env, whose first number
            is a count; and for tokens that the model does not know, or more than its window.
    """
    prompts = _token_rows(batch.get(Columns.OBS), batch.get(Columns.SEQ_LENS))
    size = policy.get_input_embeddings().weight.shape[0]
    window = getattr(policy.config.get_text_config(), "max_position_embeddings", None)
    for number, prompt in enumerate(prompts):
        if not prompt or not all(0 <= token < size for token in prompt):
            raise ValueError(
                f"Prompt {number} is empty, or holds tokens outside of the model's 0..{size - 1}: "
                f"{prompt[:8]}. Encode it with the model's own tokenizer."
            )
        if window is not None and len(prompt) > window:
            raise ValueError(
                f"Prompt {number} has {len(prompt)} tokens, and the model's window is {window}. "
                "Shorten it, or what was written after it."
            )
    prompt_lens = torch.tensor([len(prompt) for prompt in prompts])
    input_ids = torch.zeros(len(prompts), int(prompt_lens.max()), dtype=torch.long)
    for row, prompt in zip(input_ids, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    steps = torch.zeros(len(prompts), 1, dtype=torch.long)
    parts = (input_ids, prompt_lens, steps, steps.bool(), steps)
    return Sequences(*(part.to(policy.device) for part in parts))


def _token_rows(rows: Any, lens: Any) -> list[list[int]]:
    try:
        if lens is not None:
            ends = torch.as_tensor(lens).tolist()
            rows = torch.as_tensor(rows).tolist()
            rows = [
                row[:end] if 0 <= end <= len(row) else None
                for row, end in zip(rows, ends, strict=True)
            ]
        if not rows or not all(isinstance(row, list | tuple) for row in (rows, *rows)):
            raise TypeError
        return [[index(token) for token in row] for row in rows]
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            "Without actions, forward_inference and forward_exploration take the token ids of "
            "prompts: {'obs': [[4, 8, 15], [16, 23]]}, or integers (B, S), padded on the right, "
            "with their lengths (B,) as 'seq_lens'. Of an episode of an environment these are the "
            "prompt_ids in the info of reset, and the actions since."
        ) from None


class SampledTokenDistribution(Distribution):
    """The policy over the vocabulary, reduced to the sampled token.

    Its inputs are (logp of the sampled token, entropy of the distribution), so that no
    (tokens x vocabulary) tensor leaves the model. Our choice; RLlib's PPO (with
    ``use_kl_loss=False``), APPO and IMPALA need nothing more.
    """

    def __init__(self, inputs: torch.Tensor):
        """Wraps ``inputs``.

        Args:
            inputs: (..., 2), the sampled token's logp and the entropy, both in nats.
        """
        self._logp, self._entropy = inputs.unbind(-1)

    def logp(self, value: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Logp of the sampled tokens, shape (...); ``value`` must be those very tokens."""
        return self._logp

    def entropy(self) -> torch.Tensor:
        """Entropy over the vocabulary in nats, shape (...)."""
        return self._entropy

    def kl(self, other: Distribution, **kwargs: Any) -> torch.Tensor:
        """Refuses: two numbers per token do not determine a KL divergence.

        Raises:
            ValueError: always, with the setting to change.
        """
        raise ValueError(
            "The KL divergence over the whole vocabulary is not kept. "
            "Set `use_kl_loss=False` in `[training]`."
        )

    def sample(self, **kwargs: Any) -> torch.Tensor:
        """Refuses: the rollout engine samples, not the module.

        Raises:
            ValueError: always, with the runner class to use.
        """
        raise ValueError(
            "Tokens are sampled by the rollout engine: use "
            "`config.env_runners(env_runner_cls=CompletionEnvRunner)`."
        )

    def rsample(self, **kwargs: Any) -> torch.Tensor:
        """Refuses, as `sample` does."""
        return self.sample()

    @classmethod
    def from_logits(cls, logits: torch.Tensor, **kwargs: Any) -> "SampledTokenDistribution":
        """RLlib's constructor name; ``logits`` are the (..., 2) inputs."""
        return cls(logits)

    @staticmethod
    def required_input_dim(space: gym.Space, **kwargs: Any) -> int:
        """Two inputs, whatever the size of the vocabulary."""
        return N_INPUTS
