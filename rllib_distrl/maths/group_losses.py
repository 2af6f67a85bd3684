"""Losses on whole groups: what one completion of a prompt costs depends on the others.

All take logps (B, T) of whole groups and give one number per row (B,); the loss is their mean over
rows. The first two set a prompt's good completions against its bad ones, without advantages: there
a group whose completions are all good, or all bad, adds 0.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from rllib_distrl.maths.group_advantages import (
    from_first,
    group_index,
    group_mean,
    leave_one_out,
)
from rllib_distrl.maths.statistics import LOG_RATIO_BOUND, bounded_log_ratio, row_mean, zero_padding

SCORES = ("log_likelihood", "ratio")
Tokens = Float[Tensor, "B T"]


def disco(
    logp: Tokens,
    action_logp: Tokens,
    returns: Float[Tensor, " B"],
    group: Int[Tensor, " B"],
    *,
    score: str = "log_likelihood",
    temperature: float | None = 10.0,
    length_temperature: float | None = None,
    good_above: float = 0.5,
    kl_coeff: float = 1e3,
    kl_limit: float = 1e-4,
    width: int | None = None,
    loss_mask: Bool[Tensor, "B T"],
) -> Float[Tensor, " B"]:
    """DisCO: −Σ₊ ω_i [s_i − τ ln mean₋ e^{s_j/τ}], and a KL to the sampler beyond a limit.

    s is the mean over tokens of log π, or of ρ (`ratio`). ω_i = 1/n₊, or with a length temperature
    ∝ e^{(1 − L_i/L_max)/λ} among the good ones (DRPO, arXiv 2510.04474); λ → ∞ is DisCO. Without
    a temperature (None) the bad ones' scores are averaged (`disco_b`, τ → ∞). The KL's term is
    sg(max(β(KL − δ), 0)) KL with KL = mean(ρ − 1 − ln ρ) over the group's tokens (per group: our
    choice). arXiv 2505.12366, as its authors' code computes it.

    Args:
        logp: Of the sampled tokens, with gradient.
        action_logp: Of the policy that sampled.
        returns: R.
        group: Ids of the rows' prompts.
        score: "log_likelihood" or "ratio".
        temperature: τ > 0, or None.
        length_temperature: λ > 0, or None.
        good_above: Returns above are good.
        kl_coeff: β ≥ 0.
        kl_limit: δ ≥ 0, in nats.
        width: L_max, the length limit; None: the columns of the batch.
        loss_mask: True where a token counts.

    Raises:
        ValueError: For an unknown score or a temperature that is not positive.
    """
    for value in (temperature, length_temperature):
        if value is not None and value <= 0.0:
            raise ValueError(f"temperatures must be above 0 or None, got {value}")
    lengths = loss_mask.sum(1).clamp(min=1)
    log_ratio = bounded_log_ratio(logp, action_logp, loss_mask)
    if score == "log_likelihood":
        s = row_mean(logp, loss_mask)
    elif score == "ratio":
        s = row_mean(log_ratio.exp(), loss_mask)
    else:
        raise ValueError(f"score must be one of {SCORES}, got {score!r}")
    good = returns > good_above
    share = torch.zeros_like(s)
    if length_temperature is not None:
        share = (1.0 - lengths / (width or loss_mask.shape[1])).to(s.dtype) / length_temperature
    weight, others = _per_group(share, good, group), _per_group(torch.zeros_like(s), ~good, group)
    index, sizes = group_index(group)
    bad = _soft_maximum(s, others, index, len(sizes), temperature)
    both = (group_mean(good.to(s.dtype), group) % 1 > 0).to(s.dtype)
    size = sizes[index].to(s.dtype)
    divergence = zero_padding(log_ratio.exp() - 1.0 - log_ratio, loss_mask).sum(1)
    tokens = loss_mask.sum(1).to(s.dtype)
    kl = group_mean(divergence, group) / group_mean(tokens, group).clamp(min=1e-9)
    held = (kl_coeff * (kl - kl_limit)).clamp(min=0.0).detach() * kl
    return -both * size * weight * (s - bad[index]) + held


def _per_group(exponents: Tensor, chosen: Tensor, group: Tensor) -> Tensor:
    """Softmax of the exponents among the chosen rows of each group; 0 elsewhere."""
    index, sizes = group_index(group)
    masked = torch.where(chosen, exponents, float("-inf"))
    top = masked.new_full((len(sizes),), float("-inf")).scatter_reduce(0, index, masked, "amax")
    raised = torch.where(chosen, (exponents - top[index]).exp(), 0.0)
    sums = raised.new_zeros(len(sizes)).index_add_(0, index, raised)
    return raised / sums.clamp(min=1e-30)[index]


def _soft_maximum(
    s: Tensor, weights: Tensor, index: Tensor, groups: int, temperature: float | None
) -> Tensor:
    """(P,), τ ln Σ w e^{s/τ} over each group, or Σ w s; 0 where no row has a weight."""
    if temperature is None:
        return s.new_zeros(groups).index_add_(0, index, weights * s)
    some = weights > 0
    scaled = torch.where(some, s / temperature, float("-inf"))
    top = scaled.detach().new_full((groups,), float("-inf"))
    top = top.scatter_reduce(0, index, scaled.detach(), "amax")
    top = torch.where(top.isfinite(), top, 0.0)
    raised = torch.where(some, weights * (s / temperature - top[index]).exp(), 0.0)
    sums = s.new_zeros(groups).index_add_(0, index, raised)
    return torch.where(sums > 0, temperature * (sums.clamp(min=1e-30).log() + top), 0.0)


def pairwise_bt(
    logp: Tokens,
    returns: Float[Tensor, " B"],
    group: Int[Tensor, " B"],
    *,
    alpha: float = 0.05,
    loss_mask: Bool[Tensor, "B T"],
) -> Float[Tensor, " B"]:
    """−mean over pairs with R_i > R_j of ln σ(α (ln π_i − ln π_j)), π of whole completions.

    The Bradley-Terry loss of preference optimisation on the policy's own samples (PO, arXiv
    2505.08735); α is our choice.

    Args:
        logp: Of the sampled tokens, with gradient.
        returns: R.
        group: Ids of the rows' prompts.
        alpha: α > 0.
        loss_mask: True where a token counts.
    """
    x = zero_padding(logp, loss_mask).sum(1)
    index, sizes = group_index(group)
    better = (group[:, None] == group) & (returns[:, None] > returns)
    losses = torch.where(better, -logsigmoid(alpha * (x[:, None] - x)), 0.0).sum(1)
    pairs = x.new_zeros(len(sizes)).index_add_(0, index, better.sum(1).to(x.dtype))
    return losses * (sizes.to(x.dtype) / pairs.clamp(min=1.0))[index]


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


def divergence_slope(log_t: Float[Tensor, "..."], divergence: str) -> Float[Tensor, "..."]:
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
