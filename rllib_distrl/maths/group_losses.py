"""Losses on whole groups: what one completion of a prompt costs depends on the others.

All take logps (B, T) and give one number per row (B,); the loss is their mean over rows.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import softplus

from rllib_distrl.maths.group_advantages import (
    from_first,
    group_index,
    group_mean,
    leave_one_out,
)
from rllib_distrl.maths.statistics import LOG_RATIO_BOUND, bounded_log_ratio, zero_padding


def copg(
    logp: Float[Tensor, "B T"],
    ref_logp: Float[Tensor, "B T"],
    returns: Float[Tensor, " B"],
    group: Int[Tensor, " B"],
    *,
    beta: float = 0.05,
    loss_mask: Bool[Tensor, "B T"],
) -> Float[Tensor, " B"]:
    """CoPG: −mean_{j≠i} [(R_i − R_j) D_ij − (β/2) D_ij²], D_ij = x_i − x_j, x = ln(π/π_ref).

    x is a completion's whole log-ratio. The optimum over pairs is D_ij = (R_i − R_j)/β, that of
    KL-regularised RL, whatever policy sampled: no ratio to it is needed. Flet-Berliac et al. 2024
    (arXiv 2406.19185), whose pairs are drawn at random; all pairs of a group are our choice, and
    so are β and the bound of ±10 on a token's log-ratio.

    Args:
        logp: Of the sampled tokens, with gradient.
        ref_logp: Under the reference policy.
        returns: R.
        group: Ids of the rows' prompts.
        beta: β ≥ 0, weight of the KL to the reference.
        loss_mask: The completion's tokens.

    Returns:
        0 in a group of one.
    """
    x = bounded_log_ratio(logp, ref_logp, loss_mask).sum(1)
    index, sizes = group_index(group)
    # Σ_j (a_i − a_j)(b_i − b_j) = G (a_i b_i + mean_j a_j b_j) where both have mean 0.
    x = x - group_mean(x, group)
    returns = from_first(returns, group)
    returns = (returns - group_mean(returns, group)).to(x.dtype)
    gain = returns * x - beta / 2 * x.square()
    size = sizes[index].to(x.dtype)
    return -(gain + group_mean(gain, group)) * size / (size - 1).clamp(min=1)


DPG_DIVERGENCES = ("reverse_kl", "kl", "js", "tv", "chi_squared", "reverse_chi_squared")


def divergence_slope(log_t: Tensor, divergence: str) -> Tensor:
    """f'(t) at t = π/p, of D_f = Σ p f(t): what π is to be pushed down by, up to a constant.

    `reverse_kl` ln t + 1, `kl` −1/t, `js` ln 2 − ln(1 + 1/t), `tv` ½ sign(ln t), `chi_squared`
    1 − t⁻², `reverse_chi_squared` 2 (t − 1).

    Args:
        log_t: ln(π/p).
        divergence: Name of D; `kl` is KL(p ‖ π), `reverse_kl` KL(π ‖ p).

    Raises:
        ValueError: For an unknown divergence.
    """
    if divergence == "reverse_kl":
        return log_t + 1.0
    if divergence == "kl":
        return -(-log_t).exp()
    if divergence == "js":
        return math.log(2.0) - softplus(-log_t)
    if divergence == "tv":
        return 0.5 * log_t.sign()
    if divergence == "chi_squared":
        return 1.0 - (-2.0 * log_t).exp()
    if divergence == "reverse_chi_squared":
        return 2.0 * (log_t.exp() - 1.0)
    raise ValueError(f"divergence must be one of {DPG_DIVERGENCES}, got {divergence!r}")


def fdpg(
    logp: Float[Tensor, "B T"],
    ref_logp: Float[Tensor, "B T"],
    returns: Float[Tensor, " B"],
    group: Int[Tensor, " B"],
    *,
    divergence: str = "js",
    beta: float = 0.1,
    loss_mask: Bool[Tensor, "B T"],
) -> Float[Tensor, " B"]:
    """f-DPG: −sg(A) ln π with A = mean_{j≠i} f'(t_j) − f'(t_i), t = π/p, p = π_ref e^{R/β}/Z.

    Its expected gradient is that of D_f between the policy and the law p, which KL-regularised
    training with coefficient β aims at (f-DPG, Go et al. 2023; the slopes as in naver/disco). Z is
    that of the prompt, the group's mean of (π_ref/π) e^{R/β}, and the baseline leaves one out (our
    choices). ln t is bounded to ±10. For one step per batch: the samples are taken for π's own.

    Args:
        logp: Of the sampled tokens, with gradient.
        ref_logp: Under the reference policy, without gradient.
        returns: R.
        group: Ids of the rows' prompts.
        divergence: See `divergence_slope`.
        beta: β > 0, in units of the return.
        loss_mask: True where a token counts.

    Returns:
        0 in a group of one.
    """
    total = zero_padding(logp, loss_mask).sum(1)
    with torch.no_grad():
        index, sizes = group_index(group)
        log_weight = zero_padding(ref_logp, loss_mask).sum(1) - total + returns / beta
        top = log_weight.new_full((len(sizes),), float("-inf"))
        top = top.scatter_reduce(0, index, log_weight, "amax")[index]
        log_z = group_mean((log_weight - top).exp(), group).log() + top
        log_t = (log_z - log_weight).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
        advantage = leave_one_out(-divergence_slope(log_t, divergence), group)
    return -advantage * total
