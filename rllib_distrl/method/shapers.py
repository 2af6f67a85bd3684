"""Advantage shapers: (batch, advantages, settings) to (B, T), on the whole batch."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rllib_distrl.maths import optimism
from rllib_distrl.maths.group_advantages import group_mean
from rllib_distrl.maths.statistics import zero_padding
from rllib_distrl.method.batch import SequenceBatch
from rllib_distrl.method.registry import register


def _unused_horizon(settings: Mapping[str, Any]) -> set[str]:
    return set() if settings["bonus_schedule"] == "linear" else {"bonus_horizon"}


@register("shaper", "dltv", needs=("quantiles",), ignores=_unused_horizon)
def dltv(
    batch: SequenceBatch,
    advantages: Tensor,
    *,
    bonus_coeff: float = 3.0,
    bonus_stat: str = "ltv_sqrt",
    bonus_at: str = "next",
    bonus_center: bool = True,
    bonus_schedule: str = "dltv",
    bonus_horizon: int | None = None,
    bonus_max_ratio: float | None = 0.5,
) -> Tensor:
    """The optimistic advantage A + c_k B; writes the metrics `optimism_…`.

    Args:
        batch: With `quantiles`, or with an uncertainty (B, T) in `extras[bonus_stat]`.
        advantages: (B, T), A.
        bonus_coeff: c.
        bonus_stat: A statistic of the quantiles, or a column of `extras`.
        bonus_at: "next", "difference" or "current".
        bonus_center: Whether the bonus has mean 0 at each t.
        bonus_schedule: "dltv", "linear" or "constant".
        bonus_horizon: Iterations of the linear schedule.
        bonus_max_ratio: Largest std(c_k B)/std(A).

    Returns:
        (B, T).
    """
    statistic = batch.extras.get(bonus_stat)
    if statistic is None:
        statistic = optimism.bonus_statistic(batch.column("quantiles"), bonus_stat)
    shaped, metrics = optimism.optimistic_advantages(
        advantages,
        statistic,
        batch.loss_mask,
        k=batch.k,
        bonus_coeff=bonus_coeff,
        bonus_at=bonus_at,
        bonus_center=bonus_center,
        bonus_schedule=bonus_schedule,
        bonus_horizon=bonus_horizon,
        bonus_max_ratio=bonus_max_ratio,
        all_reduce=batch.all_reduce,
        width=batch.width,
    )
    batch.metrics.update(metrics)
    return shaped


@register("shaper", "entropy_shaped", needs=("entropy",))
def entropy_shaped(
    batch: SequenceBatch, advantages: Tensor, *, alpha: float = 0.4, kappa: float = 2.0
) -> Tensor:
    """A + min(α H, |A|/κ), H the token's entropy (arXiv 2506.14758).

    Args:
        batch: With `entropy`.
        advantages: (B, T), A.
        alpha: α; 0.4 is usual for group advantages, 0.1 for GAE.
        kappa: κ > 1, so that no sign changes.

    Returns:
        (B, T).

    Raises:
        ValueError: For κ of at most 1.
    """
    if kappa <= 1.0:
        raise ValueError(f"entropy_shaped needs kappa > 1 (2.0 is usual), got {kappa}")
    entropy = batch.column("entropy").detach()
    shaped = advantages + (alpha * entropy).minimum(advantages.abs() / kappa)
    return zero_padding(shaped, batch.loss_mask)


@register("shaper", "length_power", needs=("groups",))
def length_power(batch: SequenceBatch, advantages: Tensor, *, alpha: float = 1.0) -> Tensor:
    """A_i L_i^{−α} / mean_j L_j^{−α}, the mean over the group; for the `constant` aggregation.

    ΔL normalisation; α = 0 changes nothing (Dr. GRPO).

    Args:
        batch: Any.
        advantages: (B, T), A.
        alpha: α ≥ 0; 1 or 0.75 are usual.

    Returns:
        (B, T).
    """
    power = batch.lengths.clamp(min=1).to(advantages.dtype) ** -alpha
    weight = power / group_mean(power, batch.group)
    return zero_padding(advantages * weight.unsqueeze(1), batch.loss_mask)
