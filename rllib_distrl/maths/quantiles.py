"""The quantile head, its loss, and what an actor reads from it.

θ_i (`quantiles`), i = 1…N, estimate the return's quantiles at the midpoints
τ_i (`taus`) = (i − ½)/N.

Read-outs: one value from the quantiles, by weights w_i = g(i/N) − g((i−1)/N).

g distorts the levels of the ordered quantiles: `mean` g(u) = u; `cvar` min(u/α, 1), the mean of
the worst α; `upper_cvar` max(0, (u − 1 + α)/α), the mean of the best α; `wang` Φ(Φ⁻¹(u) + η);
`cpw` u^c / (u^c + (1−u)^c)^{1/c}. `mean_dev` is mean + level · std, no weights. `pass_at_k` is
the value 1 − (1 − V)^k, and `best_of_k` its generalisation to graded returns.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus

from rllib_distrl.maths.statistics import zero_padding

HEAD_CENTERS = ("mean", "median")
PAIRINGS = ("pairwise", "matched")


def midpoints(
    n: int, *, dtype: torch.dtype = torch.float32, device: Any = None
) -> Float[Tensor, " N"]:
    """The levels τ_i = (i − ½)/N, i = 1…N, of N quantiles.

    Args:
        n: N, the number of quantiles.
        dtype: Of the result.
        device: Of the result.

    Returns:
        Ascending in (0, 1).

    Raises:
        ValueError: For n below 1.
    """
    if n < 1:
        raise ValueError(f"n_quantiles must be at least 1, got {n}: 1 is a scalar critic")
    return (torch.arange(n, dtype=dtype, device=device) + 0.5) / n


def center_delta(
    outputs: Float[Tensor, "... N"], head_center: str = "mean"
) -> Float[Tensor, "... N"]:
    """Turns N free numbers into N ordered quantiles: a centre and positive differences.

    c = o_1, d_j = softplus(o_{j+1}), q_1 = 0, q_i = Σ_{j<i} d_j, and θ_i = c + q_i − mean(q)
    (`mean`: V = mean θ ≡ c) or c + q_i − q_med with med = N // 2 counted from 0 (`median`).
    Non-crossing as in NC-QR-DQN; the name is DistRL's, the parametrisation our choice.

    Args:
        outputs: o, any float dtype.
        head_center: "mean" or "median".

    Returns:
        Non-decreasing along the last axis, in float32 (float64 stays float64).

    Raises:
        ValueError: For an unknown `head_center`.
    """
    outputs = outputs if outputs.dtype == torch.float64 else outputs.float()
    center, deltas = outputs[..., :1], softplus(outputs[..., 1:])
    offsets = torch.cat([torch.zeros_like(center), deltas.cumsum(-1)], dim=-1)
    if head_center == "mean":
        return center + (offsets - offsets.mean(-1, keepdim=True))
    if head_center == "median":
        middle = outputs.shape[-1] // 2
        return center + (offsets - offsets[..., middle : middle + 1])
    raise ValueError(f"head_center must be one of {HEAD_CENTERS}, got {head_center!r}")


def center_delta_bias(n: int, init_value: float, init_spread: float = 0.1) -> Float[Tensor, " N"]:
    """The head's initial bias: with zero weights θ starts evenly spread around `init_value`.

    b_1 = init_value, b_{j+1} = softplus⁻¹(init_spread / (N − 1)).

    Args:
        n: N, the number of quantiles.
        init_value: The mean return of the initial policy.
        init_spread: s_0 > 0, the initial θ_N − θ_1; unused for N = 1.

    Returns:
        Float32.

    Raises:
        ValueError: For n below 1 or a spread that is not positive.
    """
    if n < 1 or init_spread <= 0.0:
        raise ValueError(f"need n >= 1 and init_spread > 0, got n={n}, init_spread={init_spread}")
    bias = torch.full((n,), float(init_value))
    if n > 1:
        bias[1:] = math.log(math.expm1(init_spread / (n - 1)))
    return bias


def quantile_huber_loss(
    quantiles: Float[Tensor, "B T N"],
    target_quantiles: Float[Tensor, "B T M"],
    kappa: float = 0.1,
    pairing: str = "pairwise",
    loss_mask: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T"]:
    """Quantile Huber loss per token, divided by κ and averaged, not summed, over quantiles.

    u_ij = y_j − θ_i (target − prediction), L_κ(u) = u²/2 if |u| ≤ κ else κ(|u| − κ/2),
    ρ_ij = |τ_i − 1{u_ij < 0}| L_κ(u_ij) / κ. `pairwise`: mean over i and j. `matched`: mean over
    i with j = i. Dabney et al. 2018 (QR-DQN), eq. 9–10, whose sum over i is a mean here.
    No (B, T, N, M) tensor is made; y carries no gradient.

    Args:
        quantiles: θ.
        target_quantiles: y; `matched` needs M = N, or M = 1 for a sampled return.
        kappa: κ > 0, the width of the quadratic part, in units of the return.
        pairing: "pairwise" or "matched".
        loss_mask: Tokens outside get loss 0 and gradient 0. None: all count.

    Returns:
        The loss of each token.

    Raises:
        ValueError: For κ ≤ 0, an unknown pairing, or a `matched` M that fits no N.
    """
    if kappa <= 0.0:
        raise ValueError(f"quantile_huber_kappa must be positive, got {kappa}")
    n, m = quantiles.shape[-1], target_quantiles.shape[-1]
    if loss_mask is not None:
        quantiles = zero_padding(quantiles, loss_mask)
        target_quantiles = zero_padding(target_quantiles, loss_mask)
    target_quantiles = target_quantiles.detach().to(quantiles.dtype)
    if pairing == "matched":
        if m not in (n, 1):
            raise ValueError(f"matched pairing needs as many targets as quantiles: {m} != {n}")
        taus = midpoints(n, dtype=quantiles.dtype, device=quantiles.device)
        loss = _asymmetric_huber(target_quantiles - quantiles, taus, kappa).mean(-1)
    elif pairing == "pairwise":
        loss = _PairwiseLoss.apply(quantiles.flatten(0, -2), target_quantiles.flatten(0, -2), kappa)
        loss = loss.view(quantiles.shape[:-1])  # pyright: ignore[reportOptionalMemberAccess]
    else:
        raise ValueError(f"quantile_loss must be one of {PAIRINGS}, got {pairing!r}")
    return loss if loss_mask is None else zero_padding(loss, loss_mask)


def _asymmetric_huber(td_errors: Tensor, taus: Tensor, kappa: float) -> Tensor:
    """ρ(u) for errors whose last axis belongs to `taus`."""
    clipped = td_errors.clamp(-kappa, kappa)
    weight = (taus - (td_errors < 0).to(td_errors.dtype)).abs() / kappa
    # c(u − c/2) with c = clamp(u, ±κ) is L_κ(u) on both of its branches.
    return weight * clipped * (td_errors - 0.5 * clipped)


class _PairwiseLoss(torch.autograd.Function):
    """Mean over all pairs, one target at a time, the gradient formed with the value.

    Errors above and below 0 are summed apart and weighted by τ and 1 − τ at the end: nothing of
    size N × M is kept, and on a CPU it takes less than half the time of the plain formula.
    """

    @staticmethod
    def forward(ctx: Any, quantiles: Tensor, targets: Tensor, kappa: float) -> Tensor:
        n, m = quantiles.shape[-1], targets.shape[-1]
        taus = midpoints(n, dtype=quantiles.dtype, device=quantiles.device)
        slope, slope_above, huber, huber_above = (torch.zeros_like(quantiles) for _ in range(4))
        for y in targets.t().contiguous():
            td_errors = y.unsqueeze(-1) - quantiles
            clipped = td_errors.clamp(-kappa, kappa)
            above = clipped.clamp(min=0.0)
            distance = torch.sub(td_errors, clipped, alpha=0.5)
            slope += clipped
            slope_above += above
            huber.addcmul_(clipped, distance)
            huber_above.addcmul_(above, distance)
        rho = taus * huber_above + (1 - taus) * (huber - huber_above)
        gradient = taus * slope_above + (1 - taus) * (slope - slope_above)
        ctx.save_for_backward(gradient / (-kappa * n * m))
        return rho.mean(-1) / (kappa * m)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return grad_outputs[0].unsqueeze(-1) * gradient, None, None


DISTORTIONS = ("mean", "cvar", "upper_cvar", "wang", "cpw")
READ_OUTS = (*DISTORTIONS, "mean_dev", "pass_at_k", "best_of_k")
# Levels where none is given: Tversky and Kahneman's c; the upper or lower half; one deviation.
_DEFAULT_LEVELS = {
    "mean": 1.0, "cvar": 0.5, "upper_cvar": 0.5, "wang": 0.5, "cpw": 0.71,
    "mean_dev": 1.0, "pass_at_k": 4, "best_of_k": 4,
}  # fmt: skip


def check_read_out(spec: Mapping[str, Any]) -> tuple[str, float]:
    """Checks a read-out as a recipe gives it.

    Args:
        spec: `name`, one of `READ_OUTS`, and perhaps `level`: α or c in (0, 1]; any finite η or
            κ; a whole k ≥ 1. Without a level, or with None, the default.

    Returns:
        The name and the level to use.

    Raises:
        ValueError: For an unknown name or key, or a level outside its range.
    """
    if unknown := set(spec) - {"name", "level"}:
        raise ValueError(f"read_out takes name and level, not {', '.join(sorted(unknown))}")
    name, level = spec.get("name"), spec.get("level")
    if name not in READ_OUTS:
        raise ValueError(f"read_out must be one of {', '.join(READ_OUTS)}; got {name!r}")
    value = _DEFAULT_LEVELS[name] if level is None else level
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"the level of read_out {name} must be a finite number, got {level!r}")
    if name in ("cvar", "upper_cvar", "cpw") and not 0.0 < value <= 1.0:
        raise ValueError(f"the level of read_out {name} must be in (0, 1], got {level}")
    if name in ("pass_at_k", "best_of_k") and (value < 1 or value != int(value)):
        raise ValueError(f"the level of read_out {name} is k, a whole number >= 1, got {level}")
    return name, value


def distorted(levels: Float[Tensor, "*S"], name: str, level: float) -> Float[Tensor, "*S"]:
    """g(u), from 0 to 1.

    Args:
        levels: u, cumulative probabilities in [0, 1].
        name: One of `DISTORTIONS`.
        level: α, η or c.
    """
    u = levels
    if name == "cvar":
        return (u / level).clamp(max=1.0)
    if name == "upper_cvar":
        return ((u - 1.0 + level) / level).clamp(min=0.0)
    if name == "wang":
        return torch.special.ndtr(torch.special.ndtri(u) + level)
    if name == "cpw":
        return u**level / (u**level + (1.0 - u) ** level) ** (1.0 / level)
    return u


def distortion_weights(n: int, name: str, level: float, like: Tensor) -> Float[Tensor, " N"]:
    """w_i = g(i/N) − g((i−1)/N), which sum to 1.

    Args:
        n: N, the number of quantiles.
        name: One of `DISTORTIONS`.
        level: α, η or c.
        like: A tensor whose dtype and device are used.
    """
    u = torch.linspace(0.0, 1.0, n + 1, dtype=torch.float64)
    return distorted(u, name, level).diff().to(like)


def best_of_k(
    quantiles: Float[Tensor, "... N"], k: int, edges: Float[Tensor, "... n_edges"] | None = None
) -> Float[Tensor, "..."]:
    """ρ_k(s) = Σ_i θ_i (e_i^k − e_{i−1}^k), the expected best of k independent returns.

    1 − (1 − p)^k for Bernoulli(p) returns; 0 for k = 0. Our choice.

    Args:
        quantiles: θ, ordered.
        k: ≥ 0.
        edges: e, from 0 to 1 (see `group_advantages.shifted_edges`); None: i/N.
    """
    if edges is None:
        n = quantiles.shape[-1]
        edges = torch.linspace(0, 1, n + 1, dtype=quantiles.dtype, device=quantiles.device)
    return (quantiles * (edges**k).diff(dim=-1)).sum(-1)


def read_out(
    quantiles: Float[Tensor, "... N"], name: str = "mean", level: float | None = None
) -> Float[Tensor, "..."]:
    """The value of a state, as the actor uses it.

    Args:
        quantiles: θ, ordered.
        name: One of `READ_OUTS`.
        level: See `check_read_out`. `pass_at_k` clamps V to [0, 1] (our choice).

    Returns:
        In units of the return.

    Raises:
        ValueError: As `check_read_out`.
    """
    name, level = check_read_out({"name": name, "level": level})
    mean = quantiles.mean(-1)
    if name == "mean":
        return mean
    if name == "mean_dev":
        return mean + level * quantiles.std(-1, correction=0)
    if name == "pass_at_k":
        return 1.0 - (1.0 - mean.clamp(0.0, 1.0)) ** level
    if name == "best_of_k":
        return best_of_k(quantiles, int(level))
    return quantiles @ distortion_weights(quantiles.shape[-1], name, level, quantiles)
