"""Masked statistics over a batch and, through `all_reduce`, over all learners.

Convention of the whole package: `loss_mask` is bool, True where a token counts, and padding may
hold anything, NaN included, without moving a result or a gradient. `all_reduce` maps a tensor to
its sum over all learners; the default is one learner.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

AllReduce = Callable[[Tensor], Tensor]
# Beyond e^±10 the ratio of two policies at a token says nothing, and ends in infinities.
LOG_RATIO_BOUND = 10.0
# e to this power can still be squared and summed in double precision.
_LARGEST_EXPONENT = 300.0


def identity(tensor: Tensor) -> Tensor:
    """The `all_reduce` of a single learner: the tensor itself."""
    return tensor


def zero_padding(
    tensor: Shaped[Tensor, "B *rest"], loss_mask: Bool[Tensor, "B *mask"]
) -> Shaped[Tensor, "B *rest"]:
    """Replaces padding by 0, values and gradients alike, so that NaN there cannot spread.

    Args:
        tensor: A number per token, or N.
        loss_mask: True where a token counts.
    """
    mask = loss_mask if tensor.dim() == loss_mask.dim() else loss_mask.unsqueeze(-1)
    return torch.where(mask, tensor, torch.zeros((), dtype=tensor.dtype, device=tensor.device))


def bounded_log_ratio(
    logp: Float[Tensor, "*S"],
    action_logp: Float[Tensor, "*S"],
    loss_mask: Bool[Tensor, "*S"] | None,
) -> Float[Tensor, "*S"]:
    """ln(π/π_old) of each token, kept within ±`LOG_RATIO_BOUND`; no gradient beyond.

    Args:
        logp: With gradient.
        action_logp: Of the policy that sampled; without gradient.
        loss_mask: Padding gets 0. None: all count.
    """
    log_ratio = logp - action_logp.detach()
    if loss_mask is not None:
        log_ratio = zero_padding(log_ratio, loss_mask)
    return log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def row_mean(tensor: Float[Tensor, "B T"], loss_mask: Bool[Tensor, "B T"]) -> Float[Tensor, " B"]:
    """Mean over the valid tokens of each row; 0 in a row that has none.

    Args:
        tensor: What is averaged.
        loss_mask: True where a token counts.
    """
    return zero_padding(tensor, loss_mask).sum(1) / loss_mask.sum(1).clamp(min=1)


def masked_mean(
    tensor: Float[Tensor, "*S"], loss_mask: Bool[Tensor, "*S"], all_reduce: AllReduce = identity
) -> Float[Tensor, ""]:
    """Mean over the valid tokens of all learners; 0 where there are none.

    Args:
        tensor: What is averaged.
        loss_mask: True where a token counts.
        all_reduce: Sum over learners.
    """
    total = all_reduce(zero_padding(tensor, loss_mask).sum())
    return total / all_reduce(loss_mask.sum().to(total.dtype)).clamp(min=1.0)


def masked_mean_and_std(
    tensor: Float[Tensor, "*S"], loss_mask: Bool[Tensor, "*S"], all_reduce: AllReduce = identity
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Mean and population standard deviation (divided by n, as NumPy's `std`) in two passes.

    Args:
        tensor: What is averaged.
        loss_mask: True where a token counts.
        all_reduce: Sum over learners.
    """
    mean = masked_mean(tensor, loss_mask, all_reduce)
    variance = masked_mean((tensor - mean).square(), loss_mask, all_reduce)
    return mean, variance.sqrt()


def logp_mismatch(
    logp: Float[Tensor, "*S"],
    action_logp: Float[Tensor, "*S"],
    loss_mask: Bool[Tensor, "*S"],
    clip_param: float = 0.2,
    clip_param_high: float | None = None,
) -> dict[str, float]:
    """How far the learner's policy is from the one that sampled, before the first step.

    The ratio is exp(|logp − action_logp|), at least 1; the effective sample size is
    (Σw)² / (n Σw²) with w = exp(logp − action_logp), 1 when the two agree.

    Args:
        logp: The learner's log-probabilities of the sampled tokens.
        action_logp: Those reported by what sampled.
        loss_mask: True where a token counts.
        clip_param: ε of the clip band [1 − ε, 1 + ε_high].
        clip_param_high: ε_high; None: ε.

    Returns:
        `logp_mismatch_{p50, p95, max, outside_clip, ess}`.
    """
    difference = (logp - action_logp)[loss_mask].detach().double()
    if difference.numel() == 0:
        return {}
    difference = difference.clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT)
    spread = difference.abs().sort().values
    weights = difference.exp()
    count = spread.numel()
    high = clip_param if clip_param_high is None else clip_param_high
    outside = (weights < 1 - clip_param) | (weights > 1 + high)
    return {
        "logp_mismatch_p50": math.exp(spread[(count - 1) // 2]),
        "logp_mismatch_p95": math.exp(spread[math.ceil(0.95 * count) - 1]),
        "logp_mismatch_max": math.exp(spread[-1]),
        "logp_mismatch_outside_clip": float(outside.double().mean()),
        "logp_mismatch_ess": float(weights.sum() ** 2 / (count * weights.square().sum())),
    }


def importance_weights(
    logp: Float[Tensor, "B T"],
    action_logp: Float[Tensor, "B T"],
    loss_mask: Bool[Tensor, "B T"],
    *,
    cap: float = 2.0,
    mode: str = "truncate",
) -> Float[Tensor, "B T"]:
    """Corrects the policy loss where engine and learner differ; carries no gradient.

    w = exp(logp − action_logp) with `logp` the *learner's* log-probabilities before the first
    step. `truncate`: min(w, cap) (truncated importance sampling). `mask`: w where
    1/cap ≤ w ≤ cap, else 0, so that tokens with a wild ratio teach nothing.

    Args:
        logp: Of the learner.
        action_logp: Of what sampled.
        loss_mask: True where a token counts.
        cap: C > 1.
        mode: "truncate" or "mask".

    Returns:
        0 in the padding.

    Raises:
        ValueError: For a cap of at most 1 or an unknown mode.
    """
    if cap <= 1.0:
        raise ValueError(f"cap must be above 1, got {cap}: use 2.0, or leave the correction off")
    weights = zero_padding(logp - action_logp, loss_mask).detach().exp()
    if mode == "truncate":
        weights = weights.clamp(max=cap)
    elif mode == "mask":
        weights = torch.where((weights <= cap) & (weights >= 1 / cap), weights, 0.0)
    else:
        raise ValueError(f"mode must be 'truncate' or 'mask', got {mode!r}")
    return zero_padding(weights, loss_mask)
