"""Read-outs: one value from the quantiles, by weights w_i = g(i/N) − g((i−1)/N).

g distorts the levels of the ordered quantiles: `mean` g(u) = u; `cvar` min(u/α, 1), the mean of
the worst α; `upper_cvar` max(0, (u − 1 + α)/α), the mean of the best α; `wang` Φ(Φ⁻¹(u) + η);
`cpw` u^c / (u^c + (1−u)^c)^{1/c}. `mean_dev` is mean + level · std, no weights. `pass_at_k` is
the value 1 − (1 − V)^k, and `best_of_k` its generalisation to graded returns.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

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


def distortion_weights(n: int, name: str, level: float, like: Tensor) -> Float[Tensor, " N"]:
    """w_i = g(i/N) − g((i−1)/N), which sum to 1.

    Args:
        n: N, the number of quantiles.
        name: One of `DISTORTIONS`.
        level: α, η or c.
        like: A tensor whose dtype and device are used.
    """
    u = torch.linspace(0.0, 1.0, n + 1, dtype=torch.float64)
    if name == "cvar":
        g = (u / level).clamp(max=1.0)
    elif name == "upper_cvar":
        g = ((u - 1.0 + level) / level).clamp(min=0.0)
    elif name == "wang":
        g = torch.special.ndtr(torch.special.ndtri(u) + level)
    elif name == "cpw":
        g = u**level / (u**level + (1.0 - u) ** level) ** (1.0 / level)
    else:
        g = u
    return g.diff().to(like)


def best_of_k(
    quantiles: Float[Tensor, "... N"], k: int, edges: Float[Tensor, "... n_edges"] | None = None
) -> Float[Tensor, "..."]:
    """ρ_k(s) = Σ_i θ_i (e_i^k − e_{i−1}^k), the expected best of k independent returns.

    1 − (1 − p)^k for Bernoulli(p) returns; 0 for k = 0. Our choice.

    Args:
        quantiles: θ, ordered.
        k: ≥ 0.
        edges: e, from 0 to 1 (see `group_calibration`); None: i/N.
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
