"""Targets of the quantile critic: samples or quantiles of the return from s_t on.

All share one signature: `(quantiles (B, T, N), rewards (B, T), loss_mask (B, T), *, gamma,
lambda_, generator)` to (B, T, M), without gradient, 0 in the padding; λ is `critic_lambda`. The
state after a row's last marked token is terminal and worth 0. At λ = 1 `comonotone`, `mixture`
and `monte_carlo` all equal the observed return.
"""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rllib_distrl.maths.advantages import (
    discounted_sum,
    leads_to_state,
    next_state,
    returns_to_go,
    td_errors,
)
from rllib_distrl.maths.quantiles import midpoints
from rllib_distrl.maths.statistics import zero_padding


def comonotone(
    quantiles: Float[Tensor, "B T N"],
    rewards: Float[Tensor, "B T"],
    loss_mask: Bool[Tensor, "B T"],
    *,
    gamma: float = 1.0,
    lambda_: float = 0.95,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "B T N"]:
    """D-GAE: generalised advantage estimation of each quantile with its own index.

    δ_t^i = r_t + γ θ_i(s_{t+1}) − θ_i(s_t), A_t^i = δ_t^i + γλ A_{t+1}^i, y_t^i = θ_i + A_t^i.
    After DistRL (index-matched errors; its equations could not be read). Ordered when θ is;
    biased for λ < 1 under a stochastic policy, because matching i to i nests quantiles.

    Args:
        quantiles: Θ_i(s_t).
        rewards: r_t.
        loss_mask: True where a token counts.
        gamma: γ.
        lambda_: λ.
        generator: Unused.
    """
    del generator
    quantiles = zero_padding(quantiles.detach(), loss_mask)
    delta = td_errors(quantiles, rewards, loss_mask, gamma)
    return zero_padding(quantiles + discounted_sum(delta, gamma * lambda_), loss_mask)


def mixture(
    quantiles: Float[Tensor, "B T N"],
    rewards: Float[Tensor, "B T"],
    loss_mask: Bool[Tensor, "B T"],
    *,
    gamma: float = 1.0,
    lambda_: float = 0.95,
    generator: torch.Generator | None = None,
    projection: str = "midpoint",
) -> Float[Tensor, "B T N"]:
    """The λ-return as a mixture of laws, projected to N quantiles at every step.

    Z_t = r_t + γ [λ Z_{t+1} ⊕ (1 − λ) θ(s_{t+1})], the bracket a mixture of 2N weighted atoms.
    Fits the description of DisPPO's λ-return operator; the projections are our choice.
    `midpoint`: the atom at which the cumulated weight first reaches τ_i. It drops mass below
    1/(2N), so that a constant Z_{t+1} stays as it is for λ > 1 − 1/(2N), and is biased.
    `bin_mean`: the mean of the law between its levels (i−1)/N and i/N, which keeps the mean.

    Args:
        quantiles: Θ_i(s_t).
        rewards: r_t.
        loss_mask: True where a token counts.
        gamma: γ.
        lambda_: λ.
        generator: Unused.
        projection: "midpoint" or "bin_mean".
    """
    del generator
    project = {"midpoint": _midpoint_projection, "bin_mean": _bin_mean_projection}[projection]
    n = quantiles.shape[-1]
    following = next_state(quantiles.detach(), loss_mask)
    rewards = zero_padding(rewards, loss_mask).to(quantiles.dtype)
    going_on = leads_to_state(loss_mask)
    weights = torch.full((2 * n,), lambda_ / n, dtype=quantiles.dtype, device=quantiles.device)
    weights[n:] = (1 - lambda_) / n
    law, laws = torch.zeros_like(following[:, 0]), []
    for t in reversed(range(quantiles.shape[1])):
        atoms, order = torch.cat([law, following[:, t]], dim=-1).sort(dim=-1)
        law = torch.where(going_on[:, t, None], project(atoms, weights[order], n), 0.0)
        law = rewards[:, t, None] + gamma * law
        laws.append(law)
    return zero_padding(torch.stack(laws[::-1], dim=1), loss_mask)


def _midpoint_projection(atoms: Tensor, weights: Tensor, n: int) -> Tensor:
    """Quantiles at the midpoints, (B, N), of ordered atoms (B, K) and their weights (B, K)."""
    taus = midpoints(n, dtype=atoms.dtype, device=atoms.device)
    index = torch.searchsorted(weights.cumsum(-1), taus.expand(len(atoms), -1).contiguous())
    return atoms.gather(-1, index.clamp(max=atoms.shape[-1] - 1))


def _bin_mean_projection(atoms: Tensor, weights: Tensor, n: int) -> Tensor:
    """Means between the levels (i−1)/N and i/N, (B, N), by differences of ∫ F⁻¹."""
    cumulated, area = weights.cumsum(-1), (weights * atoms).cumsum(-1)
    edges = (midpoints(n, dtype=atoms.dtype, device=atoms.device) + 0.5 / n).expand(len(atoms), -1)
    index = torch.searchsorted(cumulated, edges.contiguous()).clamp(max=atoms.shape[-1] - 1)
    beyond = (cumulated.gather(-1, index) - edges) * atoms.gather(-1, index)
    return n * torch.diff(area.gather(-1, index) - beyond, prepend=torch.zeros_like(atoms[:, :1]))


def sample_replacement(
    quantiles: Float[Tensor, "B T N"],
    rewards: Float[Tensor, "B T"],
    loss_mask: Bool[Tensor, "B T"],
    *,
    gamma: float = 1.0,
    lambda_: float = 0.95,
    generator: torch.Generator | None = None,
    particles: int = 8,
    uniforms: Float[Tensor, "2 B T M"] | None = None,
) -> Float[Tensor, "B T M"]:
    """M particles that go backwards and are now and then replaced by the critic's own samples.

    From z = 0 at the end: with probability 1 − λ, z ← θ_j(s_{t+1}) for a random j; then
    z ← r_t + γ z. After DistRLVR, as read from its code (M = 8, λ = 0.9 there). Nothing is
    replaced at the last token, whose next state is terminal.

    Args:
        quantiles: Θ_i(s_t).
        rewards: r_t.
        loss_mask: True where a token counts.
        gamma: γ.
        lambda_: λ.
        generator: Where the uniforms come from; None draws from torch's global generator.
        particles: M.
        uniforms: In [0, 1), instead of `generator`: replace or not, and which j.
    """
    b, t_max, n = quantiles.shape
    if uniforms is None:
        shape = (2, b, t_max, particles)
        device = quantiles.device if generator is None else generator.device
        uniforms = torch.rand(shape, generator=generator, device=device).to(quantiles.device)
    following = next_state(quantiles.detach(), loss_mask)
    picked = following.gather(-1, (uniforms[1] * n).long().clamp(max=n - 1))
    keep = (uniforms[0] < lambda_) | ~leads_to_state(loss_mask).unsqueeze(-1)
    rewards = zero_padding(rewards, loss_mask).to(quantiles.dtype)
    z, steps = torch.zeros_like(picked[:, 0]), []
    for t in reversed(range(t_max)):
        z = rewards[:, t, None] + gamma * torch.where(keep[:, t], z, picked[:, t])
        steps.append(z)
    return zero_padding(torch.stack(steps[::-1], dim=1), loss_mask)


def monte_carlo(
    quantiles: Float[Tensor, "B T N"],
    rewards: Float[Tensor, "B T"],
    loss_mask: Bool[Tensor, "B T"],
    *,
    gamma: float = 1.0,
    lambda_: float = 1.0,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "B T 1"]:
    """The observed return to go, y_t = Σ_{n≥0} γⁿ r_{t+n}: one sample of the law.

    Args:
        quantiles: Only its dtype is used.
        rewards: r_t.
        loss_mask: True where a token counts.
        gamma: γ.
        lambda_: Unused: the whole return is observed.
        generator: Unused.
    """
    del lambda_, generator
    return returns_to_go(rewards, loss_mask, gamma).to(quantiles.dtype).unsqueeze(-1)


TARGETS: dict[str, Callable[..., Tensor]] = {
    "comonotone": comonotone,
    "mixture": mixture,
    "mixture_mean": partial(mixture, projection="bin_mean"),
    "sample_replacement": sample_replacement,
    "monte_carlo": monte_carlo,
}
