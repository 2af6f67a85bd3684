"""Where the distribution that sampled is not the learner's: weights for it, or a refusal."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from rllib_distrl.maths.statistics import importance_weights, masked_mean
from rllib_distrl.method.batch import SequenceBatch

if TYPE_CHECKING:
    from rllib_distrl.algorithm.distrl_config import DistRLConfig

_MODES = {"truncated": "truncate", "masked": "mask"}
# Columns of the batch that this adds.
IMPORTANCE_WEIGHTS = "importance_weights"
SAMPLER_LOGP = "sampler_logp"


def check_behaviour(episodes: Sequence[Any], config: "DistRLConfig") -> None:
    """Refuses episodes of another distribution than the learner's, unless that is corrected for.

    Raises:
        ValueError: for greedy completions, or with ``importance_correction="none"`` for another
            temperature than the learner's, top-p or top-k.
    """
    own = config.rollout_settings.temperature
    for episode in episodes:
        sampling = episode.infos[0]["sampling"]
        exact = (sampling["temperature"], sampling["top_p"], sampling["top_k"]) == (own, 1.0, 0)
        if sampling["greedy"] or not (exact or config.importance_correction != "none"):
            raise ValueError(
                f"Episode {episode.id_} was sampled with {sampling}; the learner's distribution "
                f"has temperature {own:g} and keeps all tokens. Sample from it, or set "
                "importance_correction to 'truncated' or 'masked' (greedy completions cannot be "
                "corrected for)."
            )


def correct_importance(
    learner_logp: torch.Tensor, rollouts: SequenceBatch, correction: str, bound: float
) -> None:
    """Weighs each token by learner over sampler; ratios are then taken to the learner's own logps.

    The decoupled form of truncated importance sampling: the loss clips the policy against itself
    before the update, and what separates that from the sampler is a weight without gradient.
    Tokens that top-p or top-k removed are never seen, which no weight can make up for. Where a loss
    is that of a whole sequence at each of its tokens, the mean of their weights is the sequence's.

    Args:
        learner_logp: (B, T) before the first step.
        rollouts: changed in place: ``action_logp``, and the columns of this module.
        correction: ``truncated`` or ``masked``.
        bound: C > 1, see `importance_weights`.
    """
    mask, sampler_logp = rollouts.loss_mask, rollouts.action_logp
    weights = importance_weights(
        learner_logp, sampler_logp, mask, cap=bound, mode=_MODES[correction]
    )
    bounded = (weights >= bound) if correction == "truncated" else (weights == 0.0)
    rollouts.metrics["importance_weight_mean"] = float(
        masked_mean(weights, mask, rollouts.all_reduce)
    )
    rollouts.metrics["importance_bounded_share"] = float(
        masked_mean(bounded.float(), mask, rollouts.all_reduce)
    )
    rollouts.extras[IMPORTANCE_WEIGHTS] = weights
    rollouts.extras[SAMPLER_LOGP] = sampler_logp
    rollouts.action_logp = learner_logp
