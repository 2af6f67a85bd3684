"""Cutting a batch into minibatches of sequences, and these into micro-batches."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from ray.rllib.core.columns import Columns
from torch import Tensor

from rllib_distrl.learner.connector import shown_columns
from rllib_distrl.maths.group_advantages import group_index
from rllib_distrl.maths.losses import token_weights
from rllib_distrl.method.batch import SequenceBatch
from rllib_distrl.method.registry import Stage
from rllib_distrl.model.sequences import (
    CRITIC_OBSERVATIONS,
    CRITIC_TEXT_IDS,
    CRITIC_TEXT_LENS,
    INPUT_IDS,
    PROMPT_LENS,
    REPLY_TOKENS,
    Sequences,
    from_columns,
)

ROLLOUTS = "rollouts"
EPISODE = "episode"
"""Key of the batch's `extras` that holds each row's number among the learner's episodes."""
DEMONSTRATIONS = "demonstrations"
SHOWN_ROW = "shown_row"
"""Key of the demonstrations' `extras`: each one's row among their columns."""
WEIGHTS = "weights"
CRITIC_WEIGHTS = "critic_weights"
STEP = "step"
# What a minibatch holds with one row per sequence and one column per token.
_PER_TOKEN = (WEIGHTS, CRITIC_WEIGHTS)


def generator(seed: int, *numbers: int) -> torch.Generator:
    """Randomness that depends on seed and ``numbers`` alone, so that resuming is exact."""
    entropy = np.random.SeedSequence([seed, *numbers])
    return torch.Generator().manual_seed(int(entropy.generate_state(1)[0]))


def row_orders(
    rollouts: SequenceBatch, epochs: int, seed: int, *, shuffle: bool, whole_groups: bool
) -> list[Tensor]:
    """The order of the rows in each epoch.

    Args:
        rollouts: the batch.
        epochs: passes over it.
        seed: of the shuffling, with iteration and epoch.
        shuffle: whether rows are drawn at random.
        whole_groups: whether the rows of a group stay together.
    """
    device = rollouts.loss_mask.device
    unit = group_index(rollouts.group)[0] if whole_groups else torch.arange(len(rollouts))
    count, orders = int(unit.max()) + 1, []
    for epoch in range(epochs):
        order = torch.arange(count)
        if shuffle:
            order = torch.randperm(count, generator=generator(seed, rollouts.k, epoch))
        if whole_groups:  # From the order of groups to that of their rows.
            order = torch.argsort(torch.argsort(order)[unit.cpu()], stable=True)
        orders.append(order.to(device))
    return orders


def minibatches(
    columns: dict[str, Tensor],
    rollouts: SequenceBatch,
    orders: Sequence[Tensor],
    size: int | None,
    aggregation: Stage,
) -> Iterator[dict[str, Any]]:
    """The minibatches of all epochs, see `minibatch`.

    Args:
        columns: what `SequencesFromEpisodes` made.
        rollouts: the same rows after the stages.
        orders: of the rows, one of each epoch.
        size: sequences of a minibatch, at most: where it does not divide the batch, all are about
            equal; None: all.
        aggregation: of token losses.
    """
    for order in orders:
        for rows in order.tensor_split(math.ceil(len(order) / (size or len(order)))):
            yield minibatch(columns, rollouts, rows, aggregation)


def minibatch(
    columns: dict[str, Tensor], rollouts: SequenceBatch, rows: Tensor, aggregation: Stage
) -> dict[str, Any]:
    """The chosen rows, with the weight that each token has in the minibatch's loss.

    Args:
        columns: what `SequencesFromEpisodes` made.
        rollouts: the same rows after the stages.
        rows: (b,) int64.
        aggregation: of token losses.

    Returns:
        Sequence columns, ``rollouts``, and (b, T) ``weights`` (the policy's terms) and
        ``critic_weights`` (a mean over tokens), normalised over all learners; and the same of
        ``demonstrations``, see `_shown`.
    """
    chosen = rollouts[rows]
    return {
        **_shown(columns, rollouts, rows),
        **model_inputs(from_columns(columns).rows(rows)),
        ROLLOUTS: chosen,
        WEIGHTS: aggregation(chosen),
        CRITIC_WEIGHTS: token_weights(
            chosen.loss_mask, "token_mean", all_reduce=rollouts.all_reduce
        ),
    }


def _shown(
    columns: dict[str, Tensor], rollouts: SequenceBatch, rows: Tensor
) -> dict[str, dict[str, Any]]:
    """The demonstrations of the prompts whose first row is among the chosen ones.

    However groups are cut, an epoch so has each of them once. ``weights`` are a mean over their
    tokens.
    """
    if rollouts.demonstrations is None:
        return {}
    every = rollouts.demonstrations
    chosen = every[torch.isin(every.column(EPISODE), rows)]
    weights = token_weights(chosen.loss_mask, "token_mean", all_reduce=rollouts.all_reduce)
    if not len(chosen):
        return {}
    sequences = from_columns(shown_columns(columns)).rows(chosen.column(SHOWN_ROW))
    steps = sequences.actions.shape[1]
    part = {**model_inputs(sequences), ROLLOUTS: chosen.cut(steps), WEIGHTS: weights[:, :steps]}
    return {DEMONSTRATIONS: part}


def micro_batch(whole: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """The chosen rows of a minibatch, cut to the longest; weights stay the minibatch's."""
    sequences = from_columns(whole).rows(rows)
    steps = sequences.actions.shape[1]
    part = {
        **model_inputs(sequences),
        ROLLOUTS: whole[ROLLOUTS][rows].cut(steps),
        **{name: whole[name][rows, :steps] for name in _PER_TOKEN if name in whole},
    }
    return {**part, STEP: whole[STEP]} if STEP in whole else part


def micro_batches(
    whole: dict[str, Any], parts: Sequence[Tensor]
) -> Iterator[tuple[dict[str, Any], bool]]:
    """The micro-batches of a minibatch, and whether each of them counts.

    Args:
        whole: The minibatch.
        parts: Of `CausalLMModule.micro_batches`. Beyond the last row of the minibatch, they repeat
            rows because another learner has more micro-batches, and count nothing.
    """
    left = len(whole[ROLLOUTS])
    for rows in parts:
        left -= len(rows)
        yield micro_batch(whole, rows), left >= 0


def model_inputs(sequences: Sequences) -> dict[str, Tensor]:
    """What `CausalLMModule` reads of a batch."""
    of_critic = {
        CRITIC_OBSERVATIONS: sequences.observations,
        CRITIC_TEXT_IDS: sequences.text_ids,
        CRITIC_TEXT_LENS: sequences.text_lens,
    }
    return {
        INPUT_IDS: sequences.input_ids,
        PROMPT_LENS: sequences.prompt_lens,
        REPLY_TOKENS: sequences.reply_tokens,
        Columns.ACTIONS: sequences.actions,
        Columns.LOSS_MASK: sequences.mask,
        **{name: column for name, column in of_critic.items() if column is not None},
    }
