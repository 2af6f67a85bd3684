"""What the critic believed before the update, as metrics."""

import torch

from rllib_distrl.maths.advantages import returns_to_go
from rllib_distrl.maths.calibration import calibration_metrics
from rllib_distrl.method.batch import SequenceBatch

VF_EXPLAINED_VAR = "vf_explained_var"
# Equally likely points of the distribution of all tokens' quantiles: enough for a histogram.
ATOM_POINTS = 21
_MOST_ATOMS = 200_000


def critic_metrics(rollouts: SequenceBatch, gamma: float) -> dict[str, float]:
    """The ``quantile_...`` metrics and RLlib's ``vf_explained_var``; none without a critic.

    Both are about quantiles that have not yet seen these returns.

    Args:
        rollouts: with ``quantiles`` and the rewards that the critic learns from.
        gamma: discount.
    """
    if rollouts.quantiles is None:
        return {}
    returns = returns_to_go(rollouts.rewards, rollouts.loss_mask, gamma)
    metrics = calibration_metrics(rollouts.quantiles, returns, rollouts.loss_mask)
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
