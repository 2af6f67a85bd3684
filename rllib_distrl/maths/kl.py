"""Estimators of KL(π ‖ π_ref) from the sampled tokens (Schulman, "Approximating KL", 2020)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import huber_loss

from rllib_distrl.maths.statistics import LOG_RATIO_BOUND, zero_padding

KL_ESTIMATORS = ("k1", "k2", "k3")


def kl_estimate(
    logp: Float[Tensor, "*S"],
    ref_logp: Float[Tensor, "*S"],
    estimator: str = "k3",
    loss_mask: Bool[Tensor, "*S"] | None = None,
) -> Float[Tensor, "*S"]:
    """KL to the reference at each token, from its log-ratio l = ref_logp − logp.

    `k1`: −l (unbiased, any sign). `k2`: l²/2. `k3`: e^l − 1 − l (unbiased, ≥ 0).
    In the reward `k1` is the KL's own. As a loss on tokens of π, what counts is the gradient, and
    it is not that of the value: of `k1` it is zero on average (nothing is held back), of `k2` that
    of KL(π ‖ π_ref), of `k3` that of KL(π_ref ‖ π). Beyond ±10 `k2` goes on as a line, and `k3`
    is cut above 10: a single token makes no infinite step.

    Args:
        logp: Of the sampled tokens under π.
        ref_logp: Of the same tokens under π_ref; carries no gradient.
        estimator: "k1", "k2" or "k3".
        loss_mask: Padding gets 0. None: all count.

    Returns:
        In nats.

    Raises:
        ValueError: For an unknown estimator.
    """
    log_ratio = ref_logp.detach() - logp
    if loss_mask is not None:
        log_ratio = zero_padding(log_ratio, loss_mask)
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return huber_loss(
            log_ratio, torch.zeros_like(log_ratio), reduction="none", delta=LOG_RATIO_BOUND
        )
    if estimator == "k3":
        log_ratio = log_ratio.clamp(max=LOG_RATIO_BOUND)
        return log_ratio.expm1() - log_ratio
    raise ValueError(f"kl_estimator must be one of {KL_ESTIMATORS}, got {estimator!r}")


def check_kl(coeff: float, estimator: str) -> None:
    """Refuses the settings of a KL term that are out of bounds.

    Args:
        coeff: Its coefficient β.
        estimator: One of `KL_ESTIMATORS`.

    Raises:
        ValueError: With what was got and what is allowed.
    """
    if coeff < 0.0:
        raise ValueError(f"the KL's coeff must be >= 0 (1e-3 is usual), got {coeff}")
    if estimator not in KL_ESTIMATORS:
        raise ValueError(f"the KL's estimator must be one of {KL_ESTIMATORS}, got {estimator!r}")
