"""The DLTV exploration bonus and the optimistic advantage.

After Mavrin et al. 2019 ("Distributional RL for Efficient Exploration") as DistRL uses it: the
spread of the upper half of the return's law at s_{t+1} is added to the advantage of the token
that led there. It never enters the critic's targets.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rllib_distrl.maths.advantages import leads_to_state, next_state
from rllib_distrl.maths.statistics import AllReduce, identity, masked_mean_and_std, zero_padding

BONUS_STATS = ("ltv_sqrt", "ltv", "std")
BONUS_PLACES = ("next", "difference", "current")
BONUS_SCHEDULES = ("dltv", "linear", "constant")
# What the metric shows where the advantages do not vary at all.
_MAX_RATIO = 1e6


def bonus_statistic(
    quantiles: Float[Tensor, "... N"], bonus_stat: str = "ltv_sqrt"
) -> Float[Tensor, "..."]:
    """b(s), the uncertainty of a state's return.

    `ltv`: σ₊² = 1/(2N) Σ_{i ≥ N//2} (θ_i − θ_{N//2})², i from 0 (left truncated variance).
    `ltv_sqrt`: σ₊. `std`: population standard deviation of θ.
    For a Bernoulli(p) return σ₊ = √(p/2) where p < ½ and 0 above.

    Args:
        quantiles: θ, ordered.
        bonus_stat: "ltv_sqrt", "ltv" or "std".

    Returns:
        In units of the return (`ltv`: squared).

    Raises:
        ValueError: For an unknown statistic or fewer than two quantiles.
    """
    n = quantiles.shape[-1]
    if n < 2:
        raise ValueError(f"a bonus needs n_quantiles >= 2, got {n}: set bonus_coeff = 0")
    if bonus_stat == "std":
        return quantiles.std(-1, correction=0)
    if bonus_stat not in BONUS_STATS:
        raise ValueError(f"bonus_stat must be one of {BONUS_STATS}, got {bonus_stat!r}")
    upper = quantiles[..., n // 2 :]
    variance = (upper - upper[..., :1]).square().sum(-1) / (2 * n)
    return variance.sqrt() if bonus_stat == "ltv_sqrt" else variance


def scheduled_coeff(
    bonus_coeff: float, k: int, bonus_schedule: str = "dltv", horizon: int | None = None
) -> float:
    """c_k, the bonus coefficient of training iteration k = 1, 2, ….

    `dltv`: c √(ln(k+1)/(k+1)). `linear`: c max(0, 1 − (k−1)/horizon) (our choice).
    `constant`: c.

    Args:
        bonus_coeff: c ≥ 0.
        k: Training iteration, from 1.
        bonus_schedule: "dltv", "linear" or "constant".
        horizon: Iterations until `linear` reaches 0.

    Returns:
        c_k.

    Raises:
        ValueError: For k < 1, an unknown schedule, or `linear` without a horizon.
    """
    if k < 1:
        raise ValueError(f"training iterations count from 1, got k={k}")
    if bonus_schedule == "dltv":
        return bonus_coeff * math.sqrt(math.log(k + 1) / (k + 1))
    if bonus_schedule == "constant":
        return bonus_coeff
    if bonus_schedule != "linear":
        raise ValueError(f"bonus_schedule must be one of {BONUS_SCHEDULES}, got {bonus_schedule!r}")
    if not horizon or horizon < 1:
        raise ValueError(f"the linear schedule needs bonus_horizon >= 1 iterations, got {horizon}")
    return bonus_coeff * max(0.0, 1.0 - (k - 1) / horizon)


def placed_bonus(
    statistic: Float[Tensor, "B T"],
    loss_mask: Bool[Tensor, "B T"],
    bonus_at: str = "next",
    bonus_center: bool = True,
    all_reduce: AllReduce = identity,
    width: int | None = None,
) -> Float[Tensor, "B T"]:
    """B_t, what a token is credited with.

    `next`: b(s_{t+1}). `difference`: b(s_{t+1}) − b(s_t). `current`: b(s_t). With `bonus_center`
    minus the mean over the batch's tokens at that t. For the first two, tokens whose s_{t+1} is
    terminal get B = 0 and stay out of the mean, so that ending is neither punished nor rewarded
    (our choice; without it b(terminal) = 0 minus a positive mean would reward rambling).
    `current` does not depend on the action taken, so that ends need no exception there.

    Args:
        statistic: b(s_t) ≥ 0.
        loss_mask: A prefix of each row.
        bonus_at: "next", "difference" or "current".
        bonus_center: Whether to subtract the mean at each t.
        all_reduce: Sum over learners.
        width: A number of columns ≥ T that all learners agree on; needed with several learners,
            because the means are per column. None: T.

    Returns:
        0 in the padding.

    Raises:
        ValueError: For an unknown place or a width below T.
    """
    credited = leads_to_state(loss_mask)
    if bonus_at == "next":
        bonus = next_state(statistic, loss_mask)
    elif bonus_at == "difference":
        bonus = next_state(statistic, loss_mask) - statistic
    elif bonus_at == "current":
        bonus, credited = statistic, loss_mask
    else:
        raise ValueError(f"bonus_at must be one of {BONUS_PLACES}, got {bonus_at!r}")
    bonus = zero_padding(bonus, credited)
    if bonus_center:
        bonus = bonus - _column_means(bonus, credited, all_reduce, width)
    return zero_padding(bonus, credited)


def _column_means(
    bonus: Tensor, credited: Tensor, all_reduce: AllReduce, width: int | None
) -> Tensor:
    """(T,), the mean of each column over the credited tokens of all learners."""
    t_max = bonus.shape[1]
    width = t_max if width is None else width
    if width < t_max:
        raise ValueError(f"width must be at least the batch's {t_max} columns, got {width}")
    sums = bonus.new_zeros((2, width))
    sums[0, :t_max] = bonus.sum(0)
    sums[1, :t_max] = credited.sum(0).to(bonus.dtype)
    total, count = all_reduce(sums)[:, :t_max]
    return total / count.clamp(min=1.0)


def optimistic_advantages(
    advantages: Float[Tensor, "B T"],
    statistic: Float[Tensor, "B T"],
    loss_mask: Bool[Tensor, "B T"],
    *,
    k: int,
    bonus_coeff: float = 3.0,
    bonus_at: str = "next",
    bonus_center: bool = True,
    bonus_schedule: str = "dltv",
    bonus_horizon: int | None = None,
    bonus_max_ratio: float | None = 0.5,
    all_reduce: AllReduce = identity,
    width: int | None = None,
) -> tuple[Float[Tensor, "B T"], dict[str, float]]:
    """A_t^opt = A_t + c_k B_t, before whitening.

    The bonus is scaled down where std(c_k B)/std(A) exceeds `bonus_max_ratio` (our choice).

    Args:
        advantages: A_t.
        statistic: b(s_t): `bonus_statistic` of the quantiles, or any other uncertainty.
        loss_mask: A prefix of each row.
        k: Training iteration, from 1.
        bonus_coeff: c ≥ 0.
        bonus_at: See `placed_bonus`.
        bonus_center: See `placed_bonus`.
        bonus_schedule: See `scheduled_coeff`.
        bonus_horizon: See `scheduled_coeff`.
        bonus_max_ratio: Largest std(c_k B)/std(A); None: no cap.
        all_reduce: Sum over learners.
        width: See `placed_bonus`.

    Returns:
        A_t^opt, 0 in the padding, and the metrics `optimism_…`.
    """
    coeff = scheduled_coeff(bonus_coeff, k, bonus_schedule, bonus_horizon)
    statistic = statistic.detach()
    bonus = placed_bonus(statistic, loss_mask, bonus_at, bonus_center, all_reduce, width)
    mean_b, std_b = masked_mean_and_std(statistic, loss_mask, all_reduce)
    _, std_bonus = masked_mean_and_std(bonus, loss_mask, all_reduce)
    _, std_adv = masked_mean_and_std(advantages, loss_mask, all_reduce)
    added, tiny = coeff * std_bonus, torch.finfo(std_adv.dtype).tiny
    scale = torch.ones_like(added)
    if bonus_max_ratio is not None:
        scale = (bonus_max_ratio * std_adv / added.clamp(min=tiny)).clamp(max=1.0)
    optimistic = zero_padding(advantages + coeff * scale * bonus, loss_mask)
    flipped = (optimistic * zero_padding(advantages, loss_mask) < 0).to(optimistic.dtype)
    share, _ = masked_mean_and_std(flipped, loss_mask, all_reduce)
    return optimistic, {
        "optimism_coeff": coeff,
        "optimism_stat_mean": float(mean_b),
        "optimism_stat_std": float(std_b),
        "optimism_ratio": float((added / std_adv.clamp(min=tiny)).clamp(max=_MAX_RATIO)),
        "optimism_scale": float(scale),
        "optimism_sign_flips": float(share),
    }


def second_moment(features: Float[Tensor, "K D"]) -> Float[Tensor, "D D"]:
    """Σ φ φᵀ over K vectors.

    Args:
        features: φ.

    Returns:
        In float64.
    """
    features = features.double()
    return features.t() @ features


def elliptical_distance(
    features: Float[Tensor, "... D"],
    moment: Float[Tensor, "D D"],
    count: float,
    ridge: float = 1e-3,
) -> Float[Tensor, "..."]:
    """√(φᵀ (M/n + ridge I)⁻¹ φ / D): its mean square over the vectors that made M is at most 1.

    The elliptical bonus of linear bandits (Abbasi-Yadkori et al. 2011) with the mean in place of
    the sum (our choice): it says how rare a direction is, and does not shrink as data comes in;
    that is left to the bonus's schedule.

    Args:
        features: φ.
        moment: M = Σ φ φᵀ of what has been seen.
        count: n > 0, how many vectors (or their weights) are in M.
        ridge: > 0.

    Returns:
        In float32, without unit.

    Raises:
        ValueError: For a ridge that is not positive, or nothing seen.
    """
    if ridge <= 0.0 or count <= 0.0:
        raise ValueError(f"need ridge > 0 and count > 0, got ridge={ridge}, count={count}")
    width = features.shape[-1]
    eye = torch.eye(width, dtype=torch.float64, device=features.device)
    factor = torch.linalg.cholesky(moment / count + ridge * eye)
    flat = features.reshape(-1, width).double().t()
    squares = torch.linalg.solve_triangular(factor, flat, upper=False).square().sum(0)
    return (squares / width).sqrt().view(features.shape[:-1]).float()
