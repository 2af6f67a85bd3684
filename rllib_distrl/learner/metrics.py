"""What a learner reports about an update, under RLlib's keys."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from ray.rllib.core import ALL_MODULES, DEFAULT_MODULE_ID
from ray.rllib.utils.metrics import (
    NUM_ENV_STEPS_TRAINED,
    NUM_ENV_STEPS_TRAINED_LIFETIME,
    NUM_MODULE_STEPS_TRAINED,
    NUM_MODULE_STEPS_TRAINED_LIFETIME,
)
from torch import Tensor

from rllib_distrl.learner.step import Step
from rllib_distrl.maths.advantages import returns_to_go
from rllib_distrl.maths.calibration import calibration_metrics
from rllib_distrl.maths.losses import kl_estimate
from rllib_distrl.maths.statistics import logp_mismatch, masked_mean, masked_mean_and_std
from rllib_distrl.method.batch import SequenceBatch
from rllib_distrl.settings import TrainingSettings

VF_EXPLAINED_VAR = "vf_explained_var"
# Equally likely points of the distribution of all tokens' quantiles: enough for a histogram.
ATOM_POINTS = 21
_MOST_ATOMS = 200_000


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


def sampler_mismatch(
    steps: Sequence[Step], settings: TrainingSettings, gather: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """The ``logp_mismatch_...`` metrics: sampler against learner before the first step.

    Args:
        steps: of which the first have noted logps.
        settings: with the clip band.
        gather: the rows of all learners.
    """
    pairs = [torch.stack(pair, -1) for step in steps for pair in step.logps]
    logp, sampler_logp = gather(torch.cat(pairs)).unbind(-1)
    everything = torch.ones_like(logp, dtype=torch.bool)
    bounds = settings.clip_param, settings.clip_param_high
    return logp_mismatch(logp, sampler_logp, everything, *bounds)


def critic_metrics(rollouts: SequenceBatch, gamma: float) -> dict[str, float]:
    """The ``quantile_...`` metrics and RLlib's ``vf_explained_var``; none without a critic.

    Both are about laws that have not yet seen these returns.

    Args:
        rollouts: with ``quantiles`` and the rewards that the critic learns from.
        gamma: discount.
    """
    if rollouts.quantiles is None:
        return {}
    returns = returns_to_go(rollouts.rewards, rollouts.loss_mask, gamma)
    metrics = calibration_metrics(rollouts.law, returns, rollouts.loss_mask)
    if "quantile_explained_variance" in metrics:
        metrics[VF_EXPLAINED_VAR] = metrics["quantile_explained_variance"]
    metrics.update(_pooled_quantiles(rollouts.quantiles[rollouts.loss_mask]))
    return metrics


def _pooled_quantiles(quantiles: torch.Tensor) -> dict[str, float]:
    """``quantile_atoms_0`` (the lowest) to ``quantile_atoms_20``, of (M, N) quantiles."""
    atoms = quantiles.detach().flatten().float()
    if not len(atoms):
        return {}
    atoms = atoms[:: -(-len(atoms) // _MOST_ATOMS)]
    levels = torch.linspace(0, 1, ATOM_POINTS, device=atoms.device)
    points = torch.quantile(atoms, levels).tolist()
    return {f"quantile_atoms_{number}": point for number, point in enumerate(points)}
