"""Regularisers: (logp (B, T) with gradient, batch slice, settings) to per-token terms (B, T)."""

from torch import Tensor

from rllib_distrl.maths.kl import check_kl, kl_estimate
from rllib_distrl.method.batch import SequenceBatch
from rllib_distrl.method.registry import register


def _check(*, coeff: float, estimator: str) -> None:
    check_kl(coeff, estimator)
    if estimator == "k1":
        raise ValueError(
            "regulariser 'kl' has estimator 'k1', whose gradient as a loss is zero on average: "
            "nothing would be held back. Use 'k2', or reward transform 'kl_penalty' with 'k1'."
        )


@register("regulariser", "kl", needs=("ref_logp",), check=_check)
def kl(logp: Tensor, batch: SequenceBatch, *, coeff: float = 1e-3, estimator: str = "k2") -> Tensor:
    """Coefficient times the estimated KL to the reference policy.

    With "k2" the gradient is that of KL(π ‖ π_ref), with "k3" that of KL(π_ref ‖ π).

    Args:
        logp: (B, T).
        batch: With `ref_logp`.
        coeff: β ≥ 0.
        estimator: "k2" or "k3"; see `maths.kl`.

    Returns:
        (B, T).
    """
    return coeff * kl_estimate(logp, batch.column("ref_logp"), estimator, batch.loss_mask)
