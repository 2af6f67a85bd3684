"""Losses per token, KL to a reference, and the weights with which they add up to one loss.

Log-probabilities are of the sampled tokens; `action_logp` and `advantages` carry no gradient.
`loss_mask` None means that every token counts; otherwise padding gets loss 0 and gradient 0.
Log-ratios are bounded to ±10, beyond which a token has no gradient: one token that the sampler and
the learner see quite differently must not make a whole step useless (the bound of torchtitan).

A loss is Σ weights · token_loss over the whole minibatch and all learners. The normaliser is in
the weights, which are fixed before micro-batches are cut, so that micro-batches' losses and
gradients just add up. With several learners the gradients are to be SUMMED: DDP averages them, so
multiply the loss by the number of learners there.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import huber_loss, softplus

from rllib_distrl.maths.statistics import (
    LOG_RATIO_BOUND,
    AllReduce,
    bounded_log_ratio,
    identity,
    zero_padding,
)

LAD_DIVERGENCES = ("js", "hellinger", "tv", "kl", "reverse_kl", "jeffreys")
RATIO_LEVELS = ("token", "sequence")


def _masked(loss_mask: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    if loss_mask is None:
        return tensors
    return tuple(zero_padding(tensor, loss_mask) for tensor in tensors)


def _sequence_mean(per_token: Tensor, loss_mask: Tensor | None) -> Tensor:
    """(B, 1), mean over each row's valid tokens of a tensor that is 0 in the padding."""
    if loss_mask is None:
        return per_token.mean(1, keepdim=True)
    return per_token.sum(1, keepdim=True) / loss_mask.sum(1, keepdim=True).clamp(min=1)


def clipped_surrogate(
    logp: Float[Tensor, "B T"],
    action_logp: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    *,
    clip_param: float = 0.2,
    clip_param_high: float | None = None,
    dual_clip: float | None = None,
    ratio_level: str = "token",
    loss_mask: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T"]:
    """PPO's clipped surrogate, −min(ρ A, clip(ρ, 1 − ε, 1 + ε_high) A).

    ρ = exp(logp − action_logp) is `logp_ratio`, per token, or for a whole sequence the geometric
    mean of its tokens' ratios (GSPO). Schulman et al. 2017, eq. 7; the upper bound of its own is
    DAPO's; dual clip (Ye et al. 2020, eq. 5) bounds the loss of A < 0 by −c A.

    Args:
        logp: With gradient.
        action_logp: Of the policy that sampled.
        advantages: A.
        clip_param: ε, in units of the ratio.
        clip_param_high: ε_high; None: ε.
        dual_clip: c > 1; None: off.
        ratio_level: "token" or "sequence".
        loss_mask: True where a token counts.

    Returns:
        The loss per token, to be minimised.

    Raises:
        ValueError: For a dual clip of at most 1 or an unknown ratio level.
    """
    if dual_clip is not None and dual_clip <= 1.0:
        raise ValueError(f"dual_clip must be above 1, got {dual_clip}: 3.0 is usual, None is off")
    log_ratio = bounded_log_ratio(logp, action_logp, loss_mask)
    (advantages,) = _masked(loss_mask, advantages.detach())
    if ratio_level == "sequence":
        log_ratio = _sequence_mean(log_ratio, loss_mask).expand_as(log_ratio)
    elif ratio_level != "token":
        raise ValueError(f"ratio_level must be one of {RATIO_LEVELS}, got {ratio_level!r}")
    ratio = log_ratio.exp()
    high = clip_param if clip_param_high is None else clip_param_high
    surrogate = torch.min(
        advantages * ratio, advantages * ratio.clamp(1.0 - clip_param, 1.0 + high)
    )
    if dual_clip is not None:
        bounded = torch.max(surrogate, dual_clip * advantages)
        surrogate = torch.where(advantages < 0, bounded, surrogate)
    return _masked(loss_mask, -surrogate)[0]


def gspo(
    logp: Float[Tensor, "B T"],
    action_logp: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    *,
    clip_param: float = 3e-4,
    clip_param_high: float | None = 4e-4,
    loss_mask: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T"]:
    """GSPO: the clipped surrogate on the sequence ratio exp(mean_t(logp − action_logp)).

    Zheng et al. 2025; defaults as TRL documents them. Meant for the `sequence_mean` aggregation.

    Args:
        logp: With gradient.
        action_logp: Of the policy that sampled.
        advantages: Usually constant along a row.
        clip_param: ε of the sequence ratio.
        clip_param_high: ε_high; None: ε.
        loss_mask: True where a token counts.

    Returns:
        The row's loss at each of its tokens.
    """
    return clipped_surrogate(
        logp,
        action_logp,
        advantages,
        clip_param=clip_param,
        clip_param_high=clip_param_high,
        ratio_level="sequence",
        loss_mask=loss_mask,
    )


def squared_value_loss(
    values: Float[Tensor, "B T"],
    value_targets: Float[Tensor, "B T"],
    vf_clip_param: float = math.inf,
    loss_mask: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T"]:
    """The scalar critic's loss as in RLlib's PPO: min((V − target)², vf_clip_param), no ½.

    Args:
        values: With gradient.
        value_targets: Without gradient.
        vf_clip_param: Largest loss of a token, in squared units of the return.
        loss_mask: True where a token counts.
    """
    (error,) = _masked(loss_mask, values - value_targets.detach())
    return error.square().clamp(0.0, vf_clip_param)


def lad(
    logp: Float[Tensor, "B T"],
    action_logp: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    *,
    divergence: str = "js",
    inverse_eta: float = 4.0,
    ratio_level: str = "sequence",
    loss_mask: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T"]:
    """LAD: match the policy to the advantage distribution, e^u f(x) with x = ρ/e^u, u = A/η.

    f(x): `js` ½[x ln x − (x+1) ln((x+1)/2)] · `hellinger` ½(√x − 1)² · `tv` |x − 1| · `kl`
    x ln x · `reverse_kl` −ln x · `jeffreys` (x − 1) ln x. ρ is the ratio of a token or the
    product of a sequence's ratios. Over normalised policies the optimum is π_old e^{A/η}/Z.
    "Learning Advantage Distribution" (arXiv 2602.20132), from notes and a port; computed from
    ln ρ and u, each clamped to ±10. To the gradients of `kl` and `reverse_kl` that of ±ρ is added,
    which is zero on average: at A = 0 and ρ = 1 every divergence then pulls nowhere (our choice).

    The product of a sequence's ratios leaves the range in which it means something after one
    optimiser step, and the gradient grows with it: it is for one step per batch.

    Args:
        logp: With gradient.
        action_logp: Of the policy that sampled.
        advantages: A; at the sequence level a row's mean is used.
        divergence: Name of f.
        inverse_eta: 1/η > 0.
        ratio_level: "token" or "sequence".
        loss_mask: True where a token counts.

    Returns:
        At the sequence level the row's loss at each of its tokens, for the
        `sequence_mean` aggregation.

    Raises:
        ValueError: For an unknown divergence or ratio level.
    """
    log_ratio = bounded_log_ratio(logp, action_logp, loss_mask)
    (u,) = _masked(loss_mask, advantages.detach().to(logp.dtype) * inverse_eta)
    if ratio_level == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True)
        u = _sequence_mean(u, loss_mask)
    elif ratio_level != "token":
        raise ValueError(f"ratio_level must be one of {RATIO_LEVELS}, got {ratio_level!r}")
    loss = _lad_divergence(
        log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND),
        u.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND),
        divergence,
    )
    return _masked(loss_mask, loss.expand_as(logp))[0]


def _lad_divergence(log_ratio: Tensor, u: Tensor, divergence: str) -> Tensor:
    """e^u f(ρ/e^u) from ln ρ and u."""
    ratio, scale, log_x = log_ratio.exp(), u.exp(), log_ratio - u
    if divergence == "js":
        return 0.5 * (ratio * log_x - (ratio + scale) * (softplus(log_x) - math.log(2.0)))
    if divergence == "hellinger":
        return 0.5 * ((0.5 * log_ratio).exp() - (0.5 * u).exp()).square()
    if divergence == "tv":
        return (ratio - scale).abs()
    if divergence == "kl":
        return ratio * log_x + (ratio.detach() - ratio)
    if divergence == "reverse_kl":
        return -scale * log_x + (ratio - ratio.detach())
    if divergence == "jeffreys":
        return (ratio - scale) * log_x
    raise ValueError(f"divergence must be one of {LAD_DIVERGENCES}, got {divergence!r}")


AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum", "constant")


def token_weights(
    loss_mask: Bool[Tensor, "B T"],
    aggregation: str = "token_mean",
    *,
    divisor: float | None = None,
    all_reduce: AllReduce = identity,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "B T"]:
    """The weight of each token of a minibatch.

    `token_mean`: mean over all tokens. `sequence_mean`: mean over sequences of their token means.
    `sequence_sum`: mean over sequences of their token sums. `constant`: the latter divided by
    `divisor` (Dr. GRPO; the divisor is the length limit). Rows without a token do not count.

    Args:
        loss_mask: Of the whole minibatch.
        aggregation: One of the names above.
        divisor: Tokens by which `constant` divides each sequence's sum.
        all_reduce: Sum over learners.
        dtype: Of the result.

    Returns:
        0 in the padding; the mean modes sum to 1 over all learners.

    Raises:
        ValueError: For an unknown aggregation or `constant` without a positive divisor.
    """
    mask = loss_mask.to(dtype)
    if aggregation == "token_mean":
        return mask / all_reduce(mask.sum()).clamp(min=1.0)
    lengths = mask.sum(1, keepdim=True)
    sequences = all_reduce((lengths > 0).to(dtype).sum()).clamp(min=1.0)
    if aggregation == "sequence_mean":
        return mask / lengths.clamp(min=1.0) / sequences
    if aggregation == "sequence_sum":
        return mask / sequences
    if aggregation != "constant":
        raise ValueError(f"aggregation must be one of {AGGREGATIONS}, got {aggregation!r}")
    if divisor is None or divisor <= 0:
        raise ValueError(f"constant aggregation needs a divisor > 0 in tokens, got {divisor}")
    return mask / (divisor * sequences)


def budget_weights(
    loss_mask: Bool[Tensor, "B T"],
    tokens: int,
    *,
    all_reduce: AllReduce = identity,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "B T"]:
    """1/Φ at each token of the minibatch's first sequences, up to the one that reaches Φ tokens.

    Every update then learns from about as many tokens, however long completions become, and a
    token weighs the same in all of them (C3PO of Ring-lite, arXiv 2506.14731). Sequences are drawn
    by the order of the minibatch, which is shuffled; that one is taken whole when it passes the
    budget is our choice. Short minibatches use less than Φ, and still divide by it.

    Args:
        loss_mask: Of the whole minibatch.
        tokens: Φ ≥ 1, over all learners, which take an equal part each.
        all_reduce: Sum over learners.
        dtype: Of the result.

    Returns:
        0 in the padding and in sequences beyond the budget.
    """
    lengths = loss_mask.sum(1)
    learners = float(all_reduce(torch.ones((), device=loss_mask.device)))
    before = lengths.cumsum(0) - lengths
    taken = (before < tokens / learners).unsqueeze(1)
    return (loss_mask & taken).to(dtype) / tokens


def weighted_sum(
    token_loss: Float[Tensor, "B T"], weights: Float[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """Σ weights · token_loss; a token of weight 0 adds nothing, even if its loss is NaN.

    Args:
        token_loss: Of each token.
        weights: See `token_weights`.
    """
    return torch.where(weights != 0, weights * token_loss, 0.0).sum()


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
