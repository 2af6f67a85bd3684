"""From RLlib's episodes to rows of tokens, in one pass and without per-token objects."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from rllib_distrl.engine.protocol import SamplingParams
from rllib_distrl.model.sequences import (
    CRITIC_OBSERVATIONS,
    CRITIC_TEXT_IDS,
    CRITIC_TEXT_LENS,
    INPUT_IDS,
    PROMPT_LENS,
    REPLY_TOKENS,
)

GROUPS = "groups"
PROMPTS = "prompts"
DEMONSTRATION_IDS = "demonstration_ids"
SHOWN = "demonstration_"
"""What the names of the demonstrations' columns begin with."""
FIRST_ROW = "first_row"


class SequencesFromEpisodes(ConnectorV2):
    """Learner connector: finished episodes to a sequence batch.

    Puts under ``batch[DEFAULT_MODULE_ID]``, for B episodes of at most T sampled tokens:
    ``input_ids`` (B, S) prompt, sampled tokens with the environment's replies among them, right
    padding; ``prompt_lens`` (B,); ``actions``, ``action_logp``, ``rewards`` (B, T) of sampled
    tokens alone; ``loss_mask`` (B, T) bool; ``reply_tokens`` (B, T), see `Sequences`; ``groups``
    (B,), equal for completions of one served prompt; ``prompts`` (B,), its row in the task. Where
    the environment tells a critic more, ``critic_observations`` (B, T, n), or ``critic_text_ids``
    (B, L) and ``critic_text_lens`` (B,). Where it shows solutions, ``demonstration_…``: the
    sequence columns of one row per group, in the order of their numbers, and ``first_row``, the
    group's first episode. The order of episodes is kept.
    """

    def __call__(
        self,
        *,
        rl_module: Any,
        batch: dict[str, Any],
        episodes: list[SingleAgentEpisode],
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Builds the batch.

        Raises:
            ValueError: without episodes, or when one is unfinished or has lost its prompt.
        """
        if not episodes:
            raise ValueError("No episodes to learn from: the learner got an empty list.")
        for episode in episodes:
            if not episode.is_done or "prompt_ids" not in episode.infos[0]:
                raise ValueError(
                    f"Episode {episode.id_} is cut or has no prompt. Whole episodes are needed: "
                    "sample with CompletionEnvRunner and shard by episode."
                )
        batch[DEFAULT_MODULE_ID] = {
            name: torch.from_numpy(column) for name, column in _columns(episodes).items()
        }
        return batch


def check_behaviour(
    episodes: Sequence[SingleAgentEpisode], temperature: float, corrected: bool
) -> None:
    """Refuses episodes of another distribution than the learner's, unless that is corrected for.

    Args:
        episodes: Of `CompletionEnvRunner`.
        temperature: The learner's.
        corrected: Whether importance weights make up for another distribution.

    Raises:
        ValueError: for greedy completions, or without a correction for another temperature than
            the learner's, top-p or top-k.
    """
    own = SamplingParams(1, temperature).distribution()
    for episode in episodes:
        sampling = episode.infos[0]["sampling"]
        if sampling["greedy"] or not (sampling == own or corrected):
            raise ValueError(
                f"Episode {episode.id_} was sampled with {sampling}; the learner's distribution "
                f"has temperature {temperature:g} and keeps all tokens. Sample from it, or set "
                "importance_correction to 'truncated' or 'masked' (greedy completions cannot be "
                "corrected for)."
            )


def _columns(episodes: list[Any]) -> dict[str, np.ndarray]:
    prompts = [episode.infos[0]["prompt_ids"] for episode in episodes]
    replies = [episode.infos[0].get("replies", ()) for episode in episodes]
    prompt_lens = np.array([len(prompt) for prompt in prompts])
    lens = np.array([len(episode) for episode in episodes])
    replied = np.array([sum(len(ids) for _, ids in some) for some in replies])
    rows, steps = len(episodes), int(lens.max())
    input_ids = np.zeros((rows, int((prompt_lens + lens + replied).max())), dtype=np.int64)
    actions = np.zeros((rows, steps), dtype=np.int64)
    logp = np.zeros((rows, steps), dtype=np.float32)
    rewards = np.zeros((rows, steps), dtype=np.float32)
    reply_tokens = np.zeros((rows, steps), dtype=np.int64)
    for row, (episode, prompt) in enumerate(zip(episodes, prompts, strict=True)):
        start, length = len(prompt), len(episode)
        tokens = episode.actions.data
        input_ids[row, :start] = prompt
        done = 0
        for at, ids in replies[row]:
            input_ids[row, start : start + at - done] = tokens[done:at]
            start, done = start + at - done, at
            input_ids[row, start : start + len(ids)] = ids
            start += len(ids)
            reply_tokens[row, at:] += len(ids)
        input_ids[row, start : start + length - done] = tokens[done:]
        actions[row, :length] = tokens
        logp[row, :length] = episode.extra_model_outputs[Columns.ACTION_LOGP].data
        rewards[row, :length] = episode.rewards.data
    return {
        INPUT_IDS: input_ids,
        PROMPT_LENS: prompt_lens,
        REPLY_TOKENS: reply_tokens,
        Columns.ACTIONS: actions,
        Columns.ACTION_LOGP: logp,
        Columns.REWARDS: rewards,
        Columns.LOSS_MASK: np.arange(steps) < lens[:, None],
        GROUPS: (groups := _groups(episodes)),
        PROMPTS: np.array([episode.infos[0]["row"] for episode in episodes]),
        **_of_critic(episodes, steps),
        **_demonstrations(episodes, groups),
    }


def _of_critic(episodes: list[Any], steps: int) -> dict[str, np.ndarray]:
    """What only the critic sees, if every episode has it."""
    found: dict[str, np.ndarray] = {}
    if all(CRITIC_OBSERVATIONS in episode.extra_model_outputs for episode in episodes):
        told = [episode.extra_model_outputs[CRITIC_OBSERVATIONS].data for episode in episodes]
        observations = np.zeros((len(told), steps, told[0].shape[1]), dtype=np.float32)
        for row, numbers in enumerate(told):
            observations[row, : len(numbers)] = numbers
        found[CRITIC_OBSERVATIONS] = observations
    if all(CRITIC_TEXT_IDS in episode.infos[0] for episode in episodes):
        texts = [episode.infos[0][CRITIC_TEXT_IDS] for episode in episodes]
        lens = np.array([len(text) for text in texts])
        ids = np.zeros((len(texts), int(lens.max())), dtype=np.int64)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = text
        found |= {CRITIC_TEXT_IDS: ids, CRITIC_TEXT_LENS: lens}
    return found


def _demonstrations(episodes: list[Any], groups: np.ndarray) -> dict[str, np.ndarray]:
    """A right completion of each group's prompt, if every episode has one."""
    if not all(DEMONSTRATION_IDS in episode.infos[0] for episode in episodes):
        return {}
    first = np.unique(groups, return_index=True)[1]
    infos = [episodes[row].infos[0] for row in first]
    prompt_lens = np.array([len(info["prompt_ids"]) for info in infos])
    lens = np.array([len(info[DEMONSTRATION_IDS]) for info in infos])
    actions = np.zeros((len(infos), int(lens.max())), dtype=np.int64)
    input_ids = np.zeros((len(infos), int((prompt_lens + lens).max())), dtype=np.int64)
    for row, info in enumerate(infos):
        whole = np.concatenate((info["prompt_ids"], info[DEMONSTRATION_IDS]))
        input_ids[row, : len(whole)] = whole
        actions[row, : lens[row]] = info[DEMONSTRATION_IDS]
    columns = {
        INPUT_IDS: input_ids,
        PROMPT_LENS: prompt_lens,
        Columns.ACTIONS: actions,
        Columns.LOSS_MASK: np.arange(actions.shape[1]) < lens[:, None],
        FIRST_ROW: first,
    }
    return {f"{SHOWN}{name}": column for name, column in columns.items()}


def shown_columns(columns: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The demonstrations' columns by the names of sequence columns; none where none are shown."""
    names = [name for name in columns if name.startswith(SHOWN)]
    return {name.removeprefix(SHOWN): columns[name] for name in names}


def _groups(episodes: list[Any]) -> np.ndarray:
    numbers: dict[tuple[int, int], int] = {}
    keys = ((episode.infos[0]["row"], episode.infos[0]["visit"]) for episode in episodes)
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys])
