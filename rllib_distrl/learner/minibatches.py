"""Cutting a batch into minibatches of sequences, and these into micro-batches."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from ray.rllib.core.columns import Columns

from rllib_distrl.maths.aggregation import token_weights
from rllib_distrl.method.batch import SequenceBatch
from rllib_distrl.model.sequences import INPUT_IDS, PROMPT_LENS, Sequences, from_columns

if TYPE_CHECKING:
    from rllib_distrl.algorithm.distrl_config import DistRLConfig

ROLLOUTS = "rollouts"
WEIGHTS = "weights"
CRITIC_WEIGHTS = "critic_weights"


def minibatches(
    columns: dict[str, torch.Tensor],
    rollouts: SequenceBatch,
    orders: Sequence[torch.Tensor],
    size: int | None,
    config: "DistRLConfig",
) -> Iterator[dict[str, Any]]:
    """The minibatches of all epochs, see `minibatch`.

    Args:
        columns: what `SequencesFromEpisodes` made.
        rollouts: the same rows after the stages.
        orders: of the rows, one of each epoch.
        size: sequences of a minibatch; None: all.
        config: names the aggregation.
    """
    for order in orders:
        for rows in order.split(size or len(rollouts)):
            yield minibatch(columns, rollouts, rows, config)


def minibatch(
    columns: dict[str, torch.Tensor],
    rollouts: SequenceBatch,
    rows: torch.Tensor,
    config: "DistRLConfig",
) -> dict[str, Any]:
    """The chosen rows, with the weight that each token has in the minibatch's loss.

    Args:
        columns: what `SequencesFromEpisodes` made.
        rollouts: the same rows after the stages.
        rows: (b,) int64.
        config: names the aggregation.

    Returns:
        Sequence columns, ``rollouts``, and (b, T) ``weights`` (the policy's terms) and
        ``critic_weights`` (a mean over tokens), normalised over all learners.
    """
    chosen = rollouts[rows]
    divisor = float(config.rollout_settings.max_completion_tokens)
    return {
        **model_inputs(from_columns(columns).rows(rows)),
        ROLLOUTS: chosen,
        WEIGHTS: token_weights(
            chosen.loss_mask,
            config.aggregation,
            divisor=divisor,
            all_reduce=rollouts.all_reduce,
        ),
        CRITIC_WEIGHTS: token_weights(
            chosen.loss_mask, "token_mean", all_reduce=rollouts.all_reduce
        ),
    }


def micro_batch(whole: dict[str, Any], rows: torch.Tensor) -> dict[str, Any]:
    """The chosen rows of a minibatch, cut to the longest; weights stay the minibatch's."""
    sequences = from_columns(whole).rows(rows)
    steps = sequences.actions.shape[1]
    return {
        **model_inputs(sequences),
        ROLLOUTS: whole[ROLLOUTS][rows].cut(steps),
        WEIGHTS: whole[WEIGHTS][rows, :steps],
        CRITIC_WEIGHTS: whole[CRITIC_WEIGHTS][rows, :steps],
    }


def model_inputs(sequences: Sequences) -> dict[str, torch.Tensor]:
    """What `CausalLMModule` reads of a batch."""
    return {
        INPUT_IDS: sequences.input_ids,
        PROMPT_LENS: sequences.prompt_lens,
        Columns.ACTIONS: sequences.actions,
        Columns.LOSS_MASK: sequences.mask,
    }
