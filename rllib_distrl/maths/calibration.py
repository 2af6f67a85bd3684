"""Does the critic's law fit the returns that came? Over the marked tokens of this learner."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rllib_distrl.maths.laws import Law

PIT_BINS = 10
# Of an outcome that a law holds for impossible.
_LEAST_MASS = 1e-6
# Places at which the PIT of a law with probabilities of its own is compared with the uniform one.
_PIT_LEVELS = 200
TIE_WIDTH = 0.05
"""Predicted atoms this close to the outcome count as equal to it (our choice): the loss is
quadratic within κ, so quantiles of 0/1 returns stop a little short of 0 and 1."""


def probability_interval(
    law: Law, returns: Float[Tensor, " K"], tie_width: float = 0.0
) -> tuple[Float[Tensor, " K"], Float[Tensor, " K"]]:
    """The probabilities between which an observed return lies under the predicted law.

    A return that ties with atoms covers their mass, [P(z < y), P(z ≤ y)]; one that falls between
    two, or beyond the ends, lies between the middles of their masses (0 and 1 at the ends), which
    for quantiles are their levels τ.

    Args:
        law: Of K states.
        returns: y.
        tie_width: Atoms this close to y tie with it, in units of the return.

    Returns:
        In [0, 1], the first below the second.
    """
    y, edges = returns.unsqueeze(-1), law.edges
    below = (law.atoms < y - tie_width).sum(-1, keepdim=True)
    up_to = (law.atoms <= y + tie_width).sum(-1, keepdim=True)
    middles = (edges[..., 1:] + edges[..., :-1]) / 2
    middles = torch.cat([edges[..., :1], middles, edges[..., -1:]], dim=-1)
    tied = up_to > below
    low = torch.where(tied, edges.gather(-1, below), middles.gather(-1, below)).squeeze(-1)
    high = torch.where(tied, edges.gather(-1, up_to), middles.gather(-1, below + 1)).squeeze(-1)
    # What the law holds for impossible, or takes for no more than rounding, still has a place.
    narrow = high - low < _LEAST_MASS
    low = torch.where(narrow, (high - _LEAST_MASS).clamp(min=0.0), low)
    return low, torch.where(narrow, low + _LEAST_MASS, high)


def _mass_within(low: Tensor, high: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Share of the intervals [low, high] (K, 1) that lies in [start, end] (bins,): (bins,)."""
    overlap = (high.minimum(end) - low.maximum(start)).clamp(min=0.0)
    return (overlap / (high - low)).mean(0)


def pit_histogram(
    law: Law,
    returns: Float[Tensor, "B T"],
    loss_mask: Bool[Tensor, "B T"],
    bins: int = PIT_BINS,
    tie_width: float = 0.0,
) -> Float[Tensor, " bins"]:
    """Histogram of the probability integral transform F(y): flat for a calibrated critic.

    Non-randomised (Czado et al. 2009): a return that ties spreads over its probabilities.

    Args:
        law: Before each token.
        returns: Observed returns to go.
        loss_mask: True where a token counts.
        bins: Number of equal bins of [0, 1].
        tie_width: See `probability_interval`.

    Returns:
        Shares that sum to 1.
    """
    low, high = probability_interval(law[loss_mask], returns[loss_mask], tie_width)
    edges = torch.linspace(0, 1, bins + 1, dtype=low.dtype, device=low.device)
    return _mass_within(low[:, None], high[:, None], edges[:-1], edges[1:])


def pit_ks(
    law: Law,
    returns: Float[Tensor, "B T"],
    loss_mask: Bool[Tensor, "B T"],
    tie_width: float = 0.0,
) -> float:
    """Largest distance of the PIT's distribution function from that of the uniform law.

    The Kolmogorov-Smirnov statistic sup_u |mean_k P(U_k ≤ u) − u|, where U_k is uniform between
    F(y_k−) and F(y_k) (the randomised PIT, its randomness averaged out). Both ends of
    quantiles are multiples of 1/2N, between which the function is straight, so the supremum is over
    these; that of other laws over 201 levels.

    Args:
        law: Before each token.
        returns: Observed returns to go.
        loss_mask: True where a token counts.
        tie_width: See `probability_interval`.

    Returns:
        In [0, 1]; 0 if calibrated.
    """
    low, high = probability_interval(law[loss_mask], returns[loss_mask], tie_width)
    steps = 2 * law.atoms.shape[-1] if law.probs is None else _PIT_LEVELS
    levels = torch.linspace(0, 1, steps + 1, dtype=low.dtype, device=low.device)
    reached = ((levels - low[:, None]) / (high - low)[:, None]).clamp(0.0, 1.0).mean(0)
    return float((reached - levels).abs().max())


def central_coverage(
    law: Law,
    returns: Float[Tensor, "B T"],
    loss_mask: Bool[Tensor, "B T"],
    level: float,
    tie_width: float = 0.0,
) -> float:
    """Share of the randomised PIT in the central interval of [0, 1]; `level` if calibrated.

    The PIT is uniform between F(y−) and F(y). Counting returns inside the closed interval instead
    says nothing where they have atoms: it nearly always holds both outcomes of a 0/1 return.

    Args:
        law: Before each token.
        returns: Observed returns to go.
        loss_mask: True where a token counts.
        level: In (0, 1), such as 0.5 or 0.9.
        tie_width: See `probability_interval`.

    Returns:
        In [0, 1].
    """
    low, high = probability_interval(law[loss_mask], returns[loss_mask], tie_width)
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=low.dtype, device=low.device)
    return float(_mass_within(low[:, None], high[:, None], ends[:1], ends[1:]))


def crps(law: Law, returns: Float[Tensor, "B T"], loss_mask: Bool[Tensor, "B T"]) -> float:
    """Continuous ranked probability score, 2 Σ_i p_i (z_i − y)(1{y < z_i} − τ_i).

    τ_i is the middle of the atom's mass, (i − ½)/N for quantiles. Equals
    E|Z − y| − ½ E|Z − Z'|; for one atom the absolute error.

    Args:
        law: Before each token.
        returns: Observed returns to go.
        loss_mask: True where a token counts.

    Returns:
        ≥ 0, in units of the return.
    """
    of_tokens, y = law[loss_mask], returns[loss_mask].unsqueeze(-1)
    edges, atoms = of_tokens.edges, of_tokens.atoms
    taus = (edges[..., 1:] + edges[..., :-1]) / 2
    each = (atoms - y) * ((y < atoms).to(atoms.dtype) - taus)
    return float(2 * of_tokens.expectation(each).mean())


def explained_variance(
    values: Float[Tensor, "*B"], returns: Float[Tensor, "*B"], loss_mask: Bool[Tensor, "*B"]
) -> float:
    """1 − Var(y − V)/Var(y).

    Args:
        values: V, of tokens in rows or of single states.
        returns: y, observed returns to go.
        loss_mask: True where a token counts.

    Returns:
        At most 1; NaN where the returns do not vary.
    """
    y = returns[loss_mask]
    if y.numel() == 0 or float(y.var(correction=0)) == 0.0:
        return math.nan
    error = y - values[loss_mask]
    return float(1 - error.var(correction=0) / y.var(correction=0))


def crossing_rate(quantiles: Float[Tensor, "B T N"], loss_mask: Bool[Tensor, "B T"]) -> float:
    """Share of neighbouring quantiles out of order; 0 by construction for the center-delta head.

    Args:
        quantiles: θ.
        loss_mask: True where a token counts.

    Returns:
        In [0, 1]; 0 for N = 1.
    """
    steps = quantiles[loss_mask].diff(dim=-1)
    return float((steps < 0).double().mean()) if steps.numel() else 0.0


def explained_variance_by_position(
    values: Float[Tensor, "B T"], returns: Float[Tensor, "B T"], loss_mask: Bool[Tensor, "B T"]
) -> dict[str, float]:
    """Explained variance among the tokens at positions 0, 1, 2, 4, 8, … of the completion.

    Args:
        values: V.
        returns: Observed returns to go.
        loss_mask: True where a token counts.

    Returns:
        `quantile_explained_variance_at_…`; without positions where returns do not vary.
    """
    found = {}
    position = 0
    while position < loss_mask.shape[1]:
        at = slice(position, position + 1)
        share = explained_variance(values[:, at], returns[:, at], loss_mask[:, at])
        if not math.isnan(share):
            found[f"quantile_explained_variance_at_{position}"] = share
        position = max(1, 2 * position)
    return found


def calibration_metrics(
    law: Law,
    returns: Float[Tensor, "B T"],
    loss_mask: Bool[Tensor, "B T"],
    tie_width: float = TIE_WIDTH,
) -> dict[str, float]:
    """What is logged every iteration.

    Args:
        law: Before each token.
        returns: Observed returns to go.
        loss_mask: True where a token counts.
        tie_width: Of coverage and PIT, see `probability_interval`.

    Returns:
        Metrics `quantile_…`, finite ones only; empty for an empty batch.
    """
    if not bool(loss_mask.any()):
        return {}
    law = Law(law.atoms.detach(), None if law.probs is None else law.probs.detach())
    values = law.mean
    metrics = {
        "quantile_coverage_50": central_coverage(law, returns, loss_mask, 0.5, tie_width),
        "quantile_coverage_90": central_coverage(law, returns, loss_mask, 0.9, tie_width),
        "quantile_pit_ks": pit_ks(law, returns, loss_mask, tie_width),
        "quantile_crps": crps(law, returns, loss_mask),
        "quantile_explained_variance": explained_variance(values, returns, loss_mask),
        "quantile_crossing_rate": crossing_rate(law.atoms, loss_mask),
        "quantile_spread": float(law[loss_mask].std.mean()),
        "quantile_bias": float((values - returns)[loss_mask].mean()),
    }
    histogram = pit_histogram(law, returns, loss_mask, tie_width=tie_width)
    for number, share in enumerate(histogram.tolist()):
        metrics[f"quantile_pit_{number}"] = share
    metrics.update(explained_variance_by_position(values, returns, loss_mask))
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def state_metrics(
    values: Float[Tensor, " K"], mean_returns: Float[Tensor, " K"]
) -> dict[str, float]:
    """How good V is where the truth is known up to the noise of many continuations.

    Args:
        values: V.
        mean_returns: Mean return of the continuations from each state.

    Returns:
        `quantile_state_rmse`, the root mean square of V − mean return, and
        `quantile_state_explained_variance`, finite ones only.
    """
    every = torch.ones_like(values, dtype=torch.bool)
    found = {
        "quantile_state_rmse": float((values - mean_returns).square().mean().sqrt()),
        "quantile_state_explained_variance": explained_variance(values, mean_returns, every),
    }
    return {key: value for key, value in found.items() if math.isfinite(value)}
