"""Around a policy loss: regularisers, aggregations, and importance corrections."""

import torch
from torch import Tensor

from rllib_distrl.maths.kl import check_kl, kl_estimate
from rllib_distrl.maths.losses import AGGREGATIONS, token_weights
from rllib_distrl.maths.statistics import importance_weights
from rllib_distrl.maths.weighted_losses import differentiable_kl
from rllib_distrl.method.batch import SequenceBatch
from rllib_distrl.method.formula import of_batch
from rllib_distrl.method.registry import register


def _check_kl(*, coeff: float, estimator: str) -> None:
    check_kl(coeff, estimator)
    if estimator == "k1":
        raise ValueError(
            "regulariser 'kl' has estimator 'k1', whose gradient as a loss is zero on average: "
            "nothing would be held back. Use 'k2', or reward transform 'kl_penalty' with 'k1'."
        )


@register("regulariser", "kl", needs=("ref_logp",), check=_check_kl)
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


register("regulariser", "rpg_kl")(of_batch(differentiable_kl, given=("logp",)))


def _aggregation(name: str) -> None:
    @register("aggregation", name)
    def weights(batch: SequenceBatch) -> Tensor:
        """`maths.losses.token_weights`; the divisor is the length limit."""
        return token_weights(
            batch.loss_mask, name, divisor=batch.width, all_reduce=batch.all_reduce
        )

    weights.__qualname__ = name


for _name in AGGREGATIONS:
    _aggregation(_name)


@register("importance_correction", "none")
def uncorrected(logp: Tensor, batch: SequenceBatch) -> Tensor:
    """Weights of 1: what samples is taken for what learns."""
    del logp
    return torch.ones_like(batch.action_logp)


@register("importance_correction", "truncated")
def truncated(logp: Tensor, batch: SequenceBatch, *, importance_bound: float = 2.0) -> Tensor:
    """min(w, C), w learner over sampler at each token; see `maths.statistics`."""
    return importance_weights(
        logp, batch.action_logp, batch.loss_mask, cap=importance_bound, mode="truncate"
    )


@register("importance_correction", "masked")
def masked(logp: Tensor, batch: SequenceBatch, *, importance_bound: float = 2.0) -> Tensor:
    """The weight w where 1/C <= w <= C, else 0: tokens with a wild ratio teach nothing."""
    return importance_weights(
        logp, batch.action_logp, batch.loss_mask, cap=importance_bound, mode="mask"
    )
