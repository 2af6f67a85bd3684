"""What a learner reports about an update, under RLlib's keys."""

from typing import Any

from ray.rllib.core import ALL_MODULES, DEFAULT_MODULE_ID
from ray.rllib.utils.metrics import (
    NUM_ENV_STEPS_TRAINED,
    NUM_ENV_STEPS_TRAINED_LIFETIME,
    NUM_MODULE_STEPS_TRAINED,
    NUM_MODULE_STEPS_TRAINED_LIFETIME,
)

from rllib_distrl.learner.read_critic import critic_metrics
from rllib_distrl.maths.kl import kl_estimate
from rllib_distrl.maths.statistics import masked_mean, masked_mean_and_std
from rllib_distrl.method.batch import SequenceBatch


def log_update(
    metrics: Any, rollouts: SequenceBatch, values: dict[str, float], gamma: float
) -> None:
    """Logs ``values``, what is known of the batch, and how many tokens were learned from.

    Args:
        metrics: RLlib's `MetricsLogger`.
        rollouts: the batch after the stages.
        values: of the optimiser steps.
        gamma: discount.
    """
    _, advantages_std = masked_mean_and_std(
        rollouts.column("advantages"), rollouts.loss_mask, rollouts.all_reduce
    )
    values = {
        **values,
        **rollouts.metrics,
        **reference_metrics(rollouts),
        **critic_metrics(rollouts, gamma),
        "advantages_std": float(advantages_std),
    }
    metrics.log_dict(values, key=DEFAULT_MODULE_ID, window=1)
    tokens = int(rollouts.loss_mask.sum())
    for key, how in (
        ((DEFAULT_MODULE_ID, NUM_MODULE_STEPS_TRAINED), "sum"),
        ((ALL_MODULES, NUM_ENV_STEPS_TRAINED), "sum"),
        ((ALL_MODULES, NUM_MODULE_STEPS_TRAINED_LIFETIME), "lifetime_sum"),
        ((ALL_MODULES, NUM_ENV_STEPS_TRAINED_LIFETIME), "lifetime_sum"),
    ):
        metrics.log_value(key, tokens, reduce=how)


def reference_metrics(rollouts: SequenceBatch) -> dict[str, float]:
    """``ref_kl``: the k3 estimate in nats per token, of what sampled; nothing without reference."""
    if rollouts.ref_logp is None:
        return {}
    kl = kl_estimate(rollouts.action_logp, rollouts.ref_logp, "k3", rollouts.loss_mask)
    return {"ref_kl": float(masked_mean(kl, rollouts.loss_mask, rollouts.all_reduce))}
