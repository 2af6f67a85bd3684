"""Advantages from a critic, whitening, and the targets that the critic itself learns.

Everywhere: a row is one completion, right-padded, and `loss_mask` (B, T) marks its tokens, a
prefix of the row. The state after the last marked token is terminal, with value 0.

Targets are samples or quantiles of the return from s_t on. All share one signature: `(quantiles
(B, T, N), rewards (B, T), loss_mask (B, T), *, gamma, lambda_, generator)` to (B, T, M), without
gradient, 0 in the padding; λ is `critic_lambda`. At λ = 1 all of them
equal the observed return. Below, `comonotone` and `expected_value` narrow the learned law, and
`mixture_mean` and `sample_replacement` keep it.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rllib_distrl.maths.quantiles import midpoints
from rllib_distrl.maths.statistics import AllReduce, identity, masked_mean_and_std, zero_padding

# RLlib 2.60's GAE connector divides by max(1e-4, std).
WHITEN_MIN_STD = 1e-4
# Roundings by which a mean of equal numbers may be off: PyTorch sums pairwise.
_ROUNDING_OF_MEAN = 32


def discounted_sum(
    terms: Float[Tensor, "B T *N"], decay: float | Float[Tensor, "B 1"]
) -> Float[Tensor, "B T *N"]:
    """Reversed discounted cumulative sum S_t = x_t + decay · S_{t+1} along axis 1.

    By doubling, so log2(T) vectorised steps instead of T; sums pairwise, hence accurately.

    Args:
        terms: x, zero in the padding; a column per token, or N of them.
        decay: In [0, 1]; a column gives each row its own, for terms (B, T).
    """
    total, step = terms, 1
    while step < terms.shape[1]:
        head = total[:, :-step] + decay**step * total[:, step:]
        total = torch.cat([head, total[:, -step:]], dim=1)
        step *= 2
    return total


def leads_to_state(loss_mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """Marks tokens whose s_{t+1} is a state of the row, rather than its end or padding.

    Args:
        loss_mask: A prefix of each row.
    """
    return torch.cat([loss_mask[:, 1:], torch.zeros_like(loss_mask[:, :1])], dim=1)


def next_state(
    per_state: Float[Tensor, "B T *N"], loss_mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T *N"]:
    """What belongs to s_{t+1} at each t, 0 where s_{t+1} is terminal and in the padding.

    Args:
        per_state: Quantities of s_t: one, or N.
        loss_mask: True where a token counts.
    """
    valid = zero_padding(per_state, loss_mask)
    return torch.cat([valid[:, 1:], torch.zeros_like(valid[:, :1])], dim=1)


def td_errors(
    per_state: Float[Tensor, "B T *N"],
    rewards: Float[Tensor, "B T"],
    loss_mask: Bool[Tensor, "B T"],
    gamma: float,
) -> Float[Tensor, "B T *N"]:
    """δ_t = r_t + γ V(s_{t+1}) − V(s_t), for a value or, index by index, for quantiles.

    Args:
        per_state: V(s_t), or N quantiles of s_t.
        rewards: r_t.
        loss_mask: True where a token counts.
        gamma: γ.

    Returns:
        0 in the padding.
    """
    rewards = zero_padding(rewards, loss_mask).to(per_state.dtype)
    rewards = rewards if per_state.dim() == 2 else rewards.unsqueeze(-1)
    delta = rewards + gamma * next_state(per_state, loss_mask) - per_state
    return zero_padding(delta, loss_mask)


def gae(
    values: Float[Tensor, "B T"],
    rewards: Float[Tensor, "B T"],
    loss_mask: Bool[Tensor, "B T"],
    gamma: float = 1.0,
    lambda_: float = 0.95,
) -> Float[Tensor, "B T"]:
    """Generalised advantage estimation, A_t = δ_t + γλ A_{t+1} (Schulman et al. 2016, eq. 16).

    Args:
        values: V(s_t), the state before token t; used without gradient.
        rewards: r_t.
        loss_mask: A prefix of each row.
        gamma: γ in [0, 1].
        lambda_: λ in [0, 1]; 1 is the return minus the value.

    Returns:
        0 in the padding.
    """
    delta = td_errors(values.detach(), rewards, loss_mask, gamma)
    return discounted_sum(delta, gamma * lambda_)


def length_gae(
    values: Float[Tensor, "B T"],
    rewards: Float[Tensor, "B T"],
    loss_mask: Bool[Tensor, "B T"],
    *,
    alpha: float = 1.5,
) -> Float[Tensor, "B T"]:
    """GAE with a λ of each completion's own, λ = max(0, 1 − 1/(α l)), l its number of tokens.

    The horizon 1/(1 − λ) is α completions: what the end says reaches the first token of a long
    completion as well as that of a short one. VAPO (arXiv 2504.05118) with α = 0.05, SAO (arXiv
    2607.07508, after notes on it) with 1.5. γ is 1.

    Args:
        values: V(s_t), the state before token t; used without gradient.
        rewards: r_t.
        loss_mask: A prefix of each row.
        alpha: α > 0.

    Returns:
        0 in the padding.
    """
    lengths = loss_mask.sum(1, keepdim=True).clamp(min=1)
    lambda_ = (1.0 - 1.0 / (alpha * lengths)).clamp(min=0.0).to(values.dtype)
    return discounted_sum(td_errors(values.detach(), rewards, loss_mask, 1.0), lambda_)


def returns_to_go(
    rewards: Float[Tensor, "B T"], loss_mask: Bool[Tensor, "B T"], gamma: float = 1.0
) -> Float[Tensor, "B T"]:
    """Observed return from each token on, Σ_{n≥0} γⁿ r_{t+n}.

    Args:
        rewards: r_t.
        loss_mask: A prefix of each row.
        gamma: γ in [0, 1].

    Returns:
        0 in the padding.
    """
    return zero_padding(discounted_sum(zero_padding(rewards, loss_mask), gamma), loss_mask)


def critic_weight(
    values: Float[Tensor, "B T"],
    returns: Float[Tensor, "B T"],
    loss_mask: Bool[Tensor, "B T"],
    all_reduce: AllReduce = identity,
) -> Float[Tensor, ""]:
    """max(0, 1 − Var(y − V)/Var(y)) over the batch: how far a critic is to be trusted.

    The batch's own explained variance. EVPO (arXiv 2604.19485, after notes on it) takes the critic
    where this is above 0 and none of it elsewhere; shrinking by it is our choice.

    Args:
        values: V(s_t), without gradient.
        returns: y, observed returns to go.
        loss_mask: True where a token counts.
        all_reduce: Sum over learners.

    Returns:
        In [0, 1]; 0 where the returns do not vary.
    """
    _, spread = masked_mean_and_std(returns, loss_mask, all_reduce)
    _, error = masked_mean_and_std(returns - values.detach(), loss_mask, all_reduce)
    explained = 1.0 - (error / spread).square()
    return torch.where(spread > 0, explained.clamp(min=0.0), 0.0)


def whiten(
    advantages: Float[Tensor, "B T"],
    loss_mask: Bool[Tensor, "B T"],
    all_reduce: AllReduce = identity,
) -> Float[Tensor, "B T"]:
    """(A − mean) / max(1e-4, std) with the population std, as RLlib 2.60's GAE connector does.

    The mean and std are over the marked tokens of all learners. RLlib also counts the artificial
    step that it appends to each episode, whose "advantage" mixes neighbouring episodes; it is no
    token of ours, so it is left out (a mask that marks such a step reproduces RLlib's numbers).
    Advantages that are all equal become exactly 0.

    Args:
        advantages: A.
        loss_mask: True where a token counts.
        all_reduce: Sum over learners.

    Returns:
        0 in the padding.
    """
    mean, std = masked_mean_and_std(advantages, loss_mask, all_reduce)
    # Equal advantages differ from their mean by its rounding alone, which is no signal.
    rounding = _ROUNDING_OF_MEAN * torch.finfo(advantages.dtype).eps * mean.abs()
    centred = torch.where(std > rounding, advantages - mean, 0.0)
    return zero_padding(centred / std.clamp(min=WHITEN_MIN_STD), loss_mask)


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


def mixture_mean(
    quantiles: Float[Tensor, "B T N"],
    rewards: Float[Tensor, "B T"],
    loss_mask: Bool[Tensor, "B T"],
    *,
    gamma: float = 1.0,
    lambda_: float = 0.95,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "B T N"]:
    """`mixture` with the projection `bin_mean`, which keeps the mean: that of its targets is GAE's.

    Our choice.

    Args:
        quantiles: Θ_i(s_t).
        rewards: r_t.
        loss_mask: True where a token counts.
        gamma: γ.
        lambda_: λ.
        generator: Unused.
    """
    return mixture(
        quantiles, rewards, loss_mask, gamma=gamma, lambda_=lambda_, generator=generator,
        projection="bin_mean",
    )  # fmt: skip


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


def expected_value(
    quantiles: Float[Tensor, "B T N"],
    rewards: Float[Tensor, "B T"],
    loss_mask: Bool[Tensor, "B T"],
    *,
    gamma: float = 1.0,
    lambda_: float = 0.95,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "B T 1"]:
    """The λ-return of the law's mean, y_t = V(s_t) + A_t, V = mean_i θ_i: one sample of less noise.

    Expected value substitution of DSAC-T (arXiv 2310.05858): the law of the next state is replaced
    by its mean, so that the critic learns the law of λ-returns, which is that of the return at
    λ = 1 alone and narrower below. Its twin critics are `method.critic.Twin`.

    Args:
        quantiles: Θ_i(s_t).
        rewards: r_t.
        loss_mask: True where a token counts.
        gamma: γ.
        lambda_: λ.
        generator: Unused.
    """
    del generator
    values = zero_padding(quantiles.detach(), loss_mask).mean(-1)
    y = values + gae(values, rewards, loss_mask, gamma, lambda_)
    return zero_padding(y, loss_mask).unsqueeze(-1)


TARGETS: dict[str, Callable[..., Tensor]] = {
    "comonotone": comonotone,
    "mixture": mixture,
    "mixture_mean": mixture_mean,
    "sample_replacement": sample_replacement,
    "monte_carlo": monte_carlo,
    "expected_value": expected_value,
}
