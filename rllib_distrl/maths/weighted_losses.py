"""Policy losses in which the ratio weighs or gates a token's gradient, instead of PPO's clip.

All take `logp` with gradient, `action_logp` and `advantages` without, (B, T), and give the loss of
each token, to be minimised. ρ = exp(logp − action_logp), its logarithm bounded to ±10, is computed
from the policy that sampled. Where the loss is a weight times −log π, only its gradient means
something. `loss_mask` None means that every token counts; padding gets loss 0 and gradient 0.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rllib_distrl.maths.statistics import bounded_log_ratio, zero_padding

DIVERGENCES = ("tv", "kl")
RPG_REGULARISERS = (
    "forward_kl", "reverse_kl", "unnormalised_forward_kl", "unnormalised_reverse_kl",
)  # fmt: skip
# Keeps ln(1 − π) finite where a token has all the probability.
_TINY = 1e-8

Tokens = Float[Tensor, "B T"]
Mask = Bool[Tensor, "B T"]


def _score_loss(weight: Tensor, logp: Tensor, loss_mask: Tensor | None) -> Tensor:
    """−sg(weight) log π, whose gradient is −weight ∇log π; 0 in the padding."""
    if loss_mask is not None:  # Before the product: a NaN in the padding has a gradient, too.
        weight, logp = zero_padding(weight, loss_mask), zero_padding(logp, loss_mask)
    return -weight.detach() * logp


def cispo(
    logp: Tokens,
    action_logp: Tokens,
    advantages: Tokens,
    *,
    clip_param: float = 1.0,
    clip_param_high: float | None = 0.2,
    loss_mask: Mask | None = None,
) -> Tokens:
    """CISPO: −sg(clip(ρ, 1 − ε, 1 + ε_high)) A log π. Every token keeps a gradient.

    MiniMax-M1 (arXiv 2506.13585, eq. 4–5), which bounds the weight above only: ε = 1 does that.

    Args:
        logp: Of the sampled tokens.
        action_logp: Of the policy that sampled.
        advantages: A.
        clip_param: ε in [0, 1].
        clip_param_high: ε_high; None: ε. 0.2 is verl's.
        loss_mask: True where a token counts.
    """
    high = clip_param if clip_param_high is None else clip_param_high
    ratio = bounded_log_ratio(logp, action_logp, loss_mask).exp()
    return _score_loss(ratio.clamp(1.0 - clip_param, 1.0 + high) * advantages, logp, loss_mask)


def truncated_importance(
    logp: Tokens,
    action_logp: Tokens,
    advantages: Tokens,
    *,
    cap: float = 2.0,
    loss_mask: Mask | None = None,
) -> Tokens:
    """−sg(min(ρ, C)) A log π: truncated importance sampling of REINFORCE.

    RAPID (arXiv 2510.03515), for several steps on one large batch. C = 2 is our choice. It is
    `cispo` with ε_high = C − 1.

    Args:
        logp: Of the sampled tokens.
        action_logp: Of the policy that sampled.
        advantages: A.
        cap: C ≥ 1.
        loss_mask: True where a token counts.

    Raises:
        ValueError: For a cap below 1.
    """
    if cap < 1.0:
        raise ValueError(f"cap must be at least 1, got {cap}: 2.0 is usual")
    return cispo(
        logp, action_logp, advantages, clip_param=1.0, clip_param_high=cap - 1, loss_mask=loss_mask
    )


def double_sided(
    logp: Tokens,
    action_logp: Tokens,
    advantages: Tokens,
    *,
    clip_param: float = 0.3,
    clip_param_high: float | None = 5.0,
    loss_mask: Mask | None = None,
) -> Tokens:
    """−sg(ρ 1[1 − ε < ρ < 1 + ε_high]) A log π: tokens whose ratio is far off count for nothing.

    The mask does not look at the advantage's sign, and ρ is to the policy that sampled, however old
    that is, so that no policy of the update's start is needed. SAO (arXiv 2607.07508, after notes
    on it): ε = .3, ε_high = 5 for mathematics, .8 and 3 for programs.

    Args:
        logp: Of the sampled tokens.
        action_logp: Of the policy that sampled.
        advantages: A.
        clip_param: ε in [0, 1].
        clip_param_high: ε_high; None: ε.
        loss_mask: True where a token counts.
    """
    high = clip_param if clip_param_high is None else clip_param_high
    ratio = bounded_log_ratio(logp, action_logp, loss_mask).exp()
    near = (ratio > 1.0 - clip_param) & (ratio < 1.0 + high)
    return _score_loss(near * ratio * advantages, logp, loss_mask)


def sapo(
    logp: Tokens,
    action_logp: Tokens,
    advantages: Tokens,
    *,
    gate_temperature: float = 1.0,
    gate_temperature_negative: float = 1.05,
    loss_mask: Mask | None = None,
) -> Tokens:
    """SAPO: −A (4/τ) σ(τ(ρ − 1)), a soft gate whose slope is 1 at ρ = 1 and fades on both sides.

    arXiv 2511.20347, as verl computes it; meant for the `sequence_mean` aggregation.

    Args:
        logp: Of the sampled tokens.
        action_logp: Of the policy that sampled.
        advantages: A.
        gate_temperature: τ > 0 of tokens with A > 0.
        gate_temperature_negative: τ > 0 of the others.
        loss_mask: True where a token counts.

    Raises:
        ValueError: For a τ that is not positive.
    """
    if min(gate_temperature, gate_temperature_negative) <= 0.0:
        raise ValueError(
            f"gate temperatures must be above 0, got {gate_temperature} and "
            f"{gate_temperature_negative}: 1.0 and 1.05 are usual"
        )
    ratio = bounded_log_ratio(logp, action_logp, loss_mask).exp()
    tau = torch.where(advantages > 0, gate_temperature, gate_temperature_negative).to(ratio.dtype)
    loss = -advantages.detach() * torch.sigmoid(tau * (ratio - 1.0)) * 4.0 / tau
    return loss if loss_mask is None else zero_padding(loss, loss_mask)


def gmpo(
    logp: Tokens,
    action_logp: Tokens,
    advantages: Tokens,
    *,
    log_clip: float = 0.4,
    loss_mask: Mask | None = None,
) -> Tokens:
    """GMPO: −A exp(mean_t l_t), the geometric mean of a sequence's clipped ratios.

    l_t = s min(s ln ρ_t, s clip(ln ρ_t, −ε, ε)) with s the sign of the sequence's A: PPO's clip in
    logarithms (arXiv 2507.20673, eq. 4). A is the mean of the row's advantages, as in verl.

    Args:
        logp: Of the sampled tokens.
        action_logp: Of the policy that sampled.
        advantages: A, usually constant along a row.
        log_clip: ε > 0, in nats.
        loss_mask: True where a token counts.

    Returns:
        The row's loss at each of its tokens, for the `sequence_mean` aggregation.

    Raises:
        ValueError: For an ε that is not positive.
    """
    if log_clip <= 0.0:
        raise ValueError(f"log_clip must be above 0, got {log_clip}: 0.4 is usual")
    mask = torch.ones_like(logp, dtype=torch.bool) if loss_mask is None else loss_mask
    count = mask.sum(1, keepdim=True).clamp(min=1)
    advantage = zero_padding(advantages.detach(), mask).sum(1, keepdim=True) / count
    log_ratio, sign = bounded_log_ratio(logp, action_logp, mask), advantage.sign()
    clipped = sign * torch.min(sign * log_ratio, sign * log_ratio.clamp(-log_clip, log_clip))
    ratio = (zero_padding(clipped, mask).sum(1, keepdim=True) / count).exp()
    return zero_padding((-advantage * ratio).expand_as(logp), mask)


def dppo(
    logp: Tokens,
    action_logp: Tokens,
    advantages: Tokens,
    *,
    divergence: str = "tv",
    threshold: float = 0.2,
    cap: float = 20.0,
    loss_mask: Mask | None = None,
) -> Tokens:
    """DPPO: −sg(min(ρ, C) m) A log π, where m drops tokens that have moved too far already.

    Of the two-point law (this token or another): `tv` |π − π_old|, `kl` KL(π_old ‖ π). A token is
    dropped where its divergence exceeds the threshold and A would push it on in that direction.
    arXiv 2602.04879, the binary forms, as verl computes them. The threshold is our choice.

    Args:
        logp: Of the sampled tokens.
        action_logp: Of the policy that sampled.
        advantages: A.
        divergence: "tv" or "kl".
        threshold: In probability or in nats.
        cap: C, largest weight.
        loss_mask: True where a token counts.

    Raises:
        ValueError: For an unknown divergence.
    """
    log_ratio = bounded_log_ratio(logp, action_logp, loss_mask).detach()
    old = action_logp.exp()
    new = (action_logp + log_ratio).exp().clamp(max=1.0)
    if divergence == "tv":
        distance = (new - old).abs()
    elif divergence == "kl":
        distance = torch.log((1 - old + _TINY) / (1 - new + _TINY)) * (1 - old) - old * log_ratio
    else:
        raise ValueError(f"divergence must be one of {DIVERGENCES}, got {divergence!r}")
    onwards = torch.where(advantages > 0, new > old, new < old)
    weight = torch.where(onwards & (distance > threshold), 0.0, log_ratio.exp().clamp(max=cap))
    return _score_loss(weight * advantages, logp, loss_mask)


def rpg(
    logp: Tokens,
    action_logp: Tokens,
    advantages: Tokens,
    *,
    regulariser: str = "unnormalised_reverse_kl",
    beta: float = 1e-4,
    clip_param: float = 0.2,
    clip_param_high: float | None = 0.28,
    loss_mask: Mask | None = None,
) -> Tokens:
    """RPG: −sg(A w + k(w)) log π, the policy gradient of A less β times a KL to the sampler.

    w = clip(ρ, 1 − ε, 1 + ε_high). k: `forward_kl` β; `reverse_kl` −β w (ln w + 1);
    `unnormalised_forward_kl` β (1 − w); `unnormalised_reverse_kl` −β w ln w. The REINFORCE form of
    arXiv 2505.17508, as its authors' code computes it.

    Args:
        logp: Of the sampled tokens.
        action_logp: Of the policy that sampled.
        advantages: A.
        regulariser: Name of k.
        beta: β ≥ 0.
        clip_param: ε.
        clip_param_high: ε_high; None: ε.
        loss_mask: True where a token counts.

    Raises:
        ValueError: For an unknown regulariser.
    """
    high = clip_param if clip_param_high is None else clip_param_high
    ratio = bounded_log_ratio(logp, action_logp, loss_mask).exp()
    w = ratio.clamp(1.0 - clip_param, 1.0 + high)
    if regulariser == "forward_kl":
        pull = torch.full_like(w, beta)
    elif regulariser == "reverse_kl":
        pull = -beta * w * (w.log() + 1.0)
    elif regulariser == "unnormalised_forward_kl":
        pull = beta * (1.0 - w)
    elif regulariser == "unnormalised_reverse_kl":
        pull = -beta * w * w.log()
    else:
        raise ValueError(f"regulariser must be one of {RPG_REGULARISERS}, got {regulariser!r}")
    return _score_loss(advantages * w + pull, logp, loss_mask)


def differentiable_kl(
    logp: Tokens,
    ref_logp: Tokens,
    *,
    kl: str = "unnormalised_reverse_kl",
    coeff: float = 1e-4,
    loss_mask: Mask | None = None,
) -> Tokens:
    """β f(w) with w = π/π_ref, whose gradient goes through w: RPG's differentiable KLs.

    `forward_kl` −ln w, `reverse_kl` w ln w, `unnormalised_forward_kl` w − ln w − 1,
    `unnormalised_reverse_kl` w (ln w − 1) + 1 (arXiv 2505.17508, table 2); ln w is bounded to ±10.

    Args:
        logp: Of the sampled tokens.
        ref_logp: Under the reference policy, without gradient.
        kl: Name of f.
        coeff: β ≥ 0.
        loss_mask: True where a token counts.

    Raises:
        ValueError: For an unknown KL.
    """
    log_w = bounded_log_ratio(logp, ref_logp, loss_mask)
    w = log_w.exp()
    found = {
        "forward_kl": -log_w,
        "reverse_kl": w * log_w,
        "unnormalised_forward_kl": w - log_w - 1.0,
        "unnormalised_reverse_kl": w * (log_w - 1.0) + 1.0,
    }
    if kl not in found:
        raise ValueError(f"kl must be one of {RPG_REGULARISERS}, got {kl!r}")
    loss = coeff * found[kl]
    return loss if loss_mask is None else zero_padding(loss, loss_mask)
