"""Regularisers: (logp (B, T) with gradient, batch slice, settings) to per-token terms (B, T)."""

from torch import Tensor

from rllib_distrl.maths.kl import check_kl, kl_estimate
from rllib_distrl.stages.batch import SequenceBatch
from rllib_distrl.stages.registry import register


@register("regulariser", "kl", needs=("ref_logp",), check=check_kl)
def kl(logp: Tensor, batch: SequenceBatch, *, coeff: float = 1e-3, estimator: str = "k3") -> Tensor:
    """Coefficient times the estimated KL to the reference policy.

    Args:
        logp: (B, T).
        batch: With `ref_logp`.
        coeff: β ≥ 0.
        estimator: "k1", "k2" or "k3".

    Returns:
        (B, T).
    """
    return coeff * kl_estimate(logp, batch.column("ref_logp"), estimator, batch.loss_mask)
