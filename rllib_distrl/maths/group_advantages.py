"""Advantages of whole completions against the others of their prompt, without a critic.

All take the returns (B,) and the group ids (B,), and give (B,). Groups are whole. A group of
equal returns gets exactly 0 at any size: every estimator first takes the group's first return off,
which changes none of them in exact arithmetic, and leaves no rounding for a std to blow up.

Below them: what corrects a critic's value at the prompt by the group's results (ours, for returns
in [0, 1]: the critic is poor at the prompt, the group's results are not), and how far a
completion's gradient points where those of its group do not.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from rllib_distrl.maths.statistics import (
    AllReduce,
    identity,
    masked_mean_and_std,
    zero_padding,
)


def group_index(group: Int[Tensor, " B"]) -> tuple[Int[Tensor, " B"], Int[Tensor, " P"]]:
    """Numbers the groups 0…P−1.

    Args:
        group: Any ids.

    Returns:
        Each row's group, and the groups' sizes.
    """
    _, index, sizes = torch.unique(group, return_inverse=True, return_counts=True)
    return index, sizes


def group_mean(values: Float[Tensor, " B"], group: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Each row's group mean.

    Args:
        values: Of each row.
        group: Ids of the rows' prompts.
    """
    index, sizes = group_index(group)
    sums = values.new_zeros(len(sizes)).index_add_(0, index, values)
    return (sums / sizes)[index]


def from_first(returns: Float[Tensor, " B"], group: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """R − the return of the first row of the group: exactly 0 where all of them are equal.

    Args:
        returns: R.
        group: Ids of the rows' prompts.
    """
    index, sizes = group_index(group)
    rows = torch.arange(len(returns), device=returns.device)
    first = torch.full_like(sizes, len(returns)).scatter_reduce(0, index, rows, "amin")
    return returns - returns[first[index]]


def _centred(returns: Tensor, group: Tensor) -> Tensor:
    """R − the group's mean."""
    returns = from_first(returns, group)
    return returns - group_mean(returns, group)


def grpo(
    returns: Float[Tensor, " B"],
    group: Int[Tensor, " B"],
    *,
    scale_by_std: bool = True,
    std_epsilon: float = 1e-6,
) -> Float[Tensor, " B"]:
    """(R − mean) / (std + 1e-6) over the group, with the sample std (n − 1), as in TRL.

    Shao et al. 2024, with `scale_by_std=False` Dr. GRPO (Liu et al. 2025). A group of one, or of
    equal returns, gets 0.

    Args:
        returns: R.
        group: Ids of the rows' prompts.
        scale_by_std: Whether to divide by the std.
        std_epsilon: Added to the std, in units of the return.
    """
    centred = _centred(returns, group)
    if not scale_by_std:
        return centred
    index, sizes = group_index(group)
    squares = returns.new_zeros(len(sizes)).index_add_(0, index, centred.square())
    std = (squares / (sizes - 1).clamp(min=1)).sqrt()
    return centred / (std[index] + std_epsilon)


def leave_one_out(returns: Float[Tensor, " B"], group: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """R_i − mean of the others (RLOO, Ahmadian et al. 2024) = G/(G − 1) (R_i − mean).

    Args:
        returns: R.
        group: Ids of the rows' prompts.

    Returns:
        0 in a group of one.
    """
    index, sizes = group_index(group)
    size = sizes[index].to(returns.dtype)
    return _centred(returns, group) * size / (size - 1).clamp(min=1)


def opo(
    returns: Float[Tensor, " B"], lengths: Int[Tensor, " B"], group: Int[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """R_i − Σ_j L_j R_j / Σ_j L_j: the length-weighted, variance-optimal baseline.

    OPO (arXiv 2505.23585). For one epoch without clip, KL or entropy bonus.

    Args:
        returns: R.
        lengths: L, tokens.
        group: Ids of the rows' prompts.
    """
    lengths = lengths.to(returns.dtype)
    returns = from_first(returns, group)
    weighted = group_mean(lengths * returns, group)
    return returns - weighted / group_mean(lengths, group).clamp(min=1e-9)


def _log_choose(n: Tensor | float, k: int) -> Tensor:
    """Logarithm of the binomial coefficient C(n, k); −inf where n < k."""
    n = torch.as_tensor(n, dtype=torch.float64)
    safe = n.clamp(min=k)
    value = torch.lgamma(safe + 1) - torch.lgamma(safe - k + 1)
    value = value - torch.lgamma(torch.tensor(k + 1.0, dtype=torch.float64))
    return torch.where(n >= k, value, float("-inf"))


def maxk(returns: Float[Tensor, " B"], group: Int[Tensor, " B"], *, k: int) -> Float[Tensor, " B"]:
    """Gradient weight of the expected best of k, with a leave-one-out baseline.

    With returns g sorted upwards: s_(i) = [C(i−1, k−1) g_(i) + Σ_{j>i} C(j−2, k−2) g_(j)] /
    C(G, k), A_i = s_i − (k/G) ρ_{k−1}(others), ρ_k(g) = Σ_i C(i−1, k−1) g_(i) / C(G, k). Binary:
    a correct completion gets C(G − c, k − 1)/C(G, k) with c correct, a wrong one 0.
    (max@k / PKPO.) Not to be divided by a std. k = 1, where there is no best of others, is
    leave-one-out over G (our choice).

    Args:
        returns: g.
        group: Ids of the rows' prompts.
        k: In 1…G.

    Raises:
        ValueError: For k outside 1…G of some group.
    """
    index, sizes = group_index(group)
    if not 1 <= k <= int(sizes.min()):
        raise ValueError(f"maxk needs 1 <= k <= num_generations = {int(sizes.min())}, got k={k}")
    if k == 1:
        return leave_one_out(returns, group) / sizes[index]
    returns, advantages = from_first(returns, group), torch.empty_like(returns)
    for number in range(len(sizes)):
        rows = (index == number).nonzero().squeeze(-1)
        ordered, order = returns[rows].double().sort()
        advantages[rows[order]] = _maxk_sorted(ordered, k).to(returns.dtype)
    return advantages


def _maxk_sorted(g: Tensor, k: int) -> Tensor:
    """`maxk` of one group for k ≥ 2, float64 returns sorted upwards."""
    count = len(g)
    rank = torch.arange(1, count + 1, dtype=torch.float64, device=g.device)
    total = _log_choose(count, k).to(g.device)
    own = (_log_choose(rank - 1, k - 1) - total).exp() * g
    above = (_log_choose(rank - 2, k - 2) - total).exp() * g
    s = own + above.flip(0).cumsum(0).flip(0) - above
    best_of_others = (_log_choose(rank[:-1] - 1, k - 2) - _log_choose(count - 1, k - 1)).exp()
    keep = ~torch.eye(count, dtype=torch.bool, device=g.device)
    others = g.expand(count, -1)[keep].view(count, count - 1)
    return s - (k / count) * (others @ best_of_others)


def bnpo(
    returns: Float[Tensor, " B"],
    group: Int[Tensor, " B"],
    all_reduce: AllReduce = identity,
    max_scale: float = 1e6,
) -> Float[Tensor, " B"]:
    """(R − p) / BetaPDF(p; α, β) with p the group mean and a Beta law fitted to all p.

    m, v: mean and population variance of p over groups; a = (m(1−m)/v − 1) m, b likewise with
    1 − m; α = max(1, 1 + a/3), β = max(1, 1 + b/3). BNPO.

    Args:
        returns: R in [0, 1].
        group: Ids of the rows' prompts.
        all_reduce: Sum over learners.
        max_scale: Largest 1/pdf.

    Raises:
        ValueError: For returns outside [0, 1].
    """
    if bool(((returns < 0) | (returns > 1)).any()):
        raise ValueError("bnpo needs returns in [0, 1]: map them with return_min and return_max")
    index, sizes = group_index(group)
    p = returns.new_zeros(len(sizes)).index_add_(0, index, returns) / sizes
    every = torch.ones_like(p, dtype=torch.bool)
    mean, std = masked_mean_and_std(p, every, all_reduce)
    concentration = mean * (1 - mean) / std.square().clamp(min=1e-9) - 1
    alpha = (1 + concentration * mean / 3).clamp(min=1.0)
    beta = (1 + concentration * (1 - mean) / 3).clamp(min=1.0)
    p_safe = p.clamp(1e-6, 1 - 1e-6)
    log_beta = torch.lgamma(alpha) + torch.lgamma(beta) - torch.lgamma(alpha + beta)
    log_pdf = (alpha - 1) * p_safe.log() + (beta - 1) * (-p_safe).log1p() - log_beta
    return _centred(returns, group) * (-log_pdf).exp().clamp(max=max_scale)[index]


def gdpo(
    reward_parts: Float[Tensor, "B C"],
    group: Int[Tensor, " B"],
    *,
    weights: Sequence[float] | None = None,
    std_epsilon: float = 1e-4,
) -> Float[Tensor, " B"]:
    """Σ_c w_c (R_c − mean) / (std + ε): each reward is standardised in the group by itself.

    So that none drowns in the spread of another. GDPO, as verl computes it; its whitening over the
    batch is `whiten_advantages`. One reward of weight 1 is `grpo`. ε is TRL's: rounding in sums of
    rewards stays far below.

    Args:
        reward_parts: R_c.
        group: Ids of the rows' prompts.
        weights: w; None: 1 each.
        std_epsilon: ε, in units of the return.

    Raises:
        ValueError: For another number of weights than of rewards.
    """
    count = reward_parts.shape[1]
    if weights is not None and len(weights) != count:
        raise ValueError(f"gdpo has {len(weights)} weights for {count} rewards: the task's, and "
                         "one of each reward transform. Give as many.")  # fmt: skip
    return torch.stack(
        [
            weight * grpo(part, group, std_epsilon=std_epsilon)
            for weight, part in zip(weights or [1.0] * count, reward_parts.unbind(1), strict=True)
        ]
    ).sum(0)


def optimal_token_baseline(
    to_go: Float[Tensor, "B T"],
    energy: Float[Tensor, "B T"],
    group: Int[Tensor, " B"],
    loss_mask: Bool[Tensor, "B T"],
) -> Float[Tensor, "B T"]:
    """G_t − Σ_j G_j,t W_j,t / Σ_j W_j,t over the group's completions that still run at t.

    W_t = Σ_{s≤t} w_s, w the squared length of the score by the logits: the baseline of least
    variance for each token (arXiv 2602.07078). As in verl, but where a completion runs alone: verl
    takes 0 there, so that its tail gets the whole return; here the last baseline of two or more
    stays (our choice). A group of one, or of equal returns, gets 0.

    Args:
        to_go: G, reward to go.
        energy: w = 1 − 2π + Σ_v π_v².
        group: Ids of the rows' prompts.
        loss_mask: True where a token counts.

    Returns:
        0 in the padding.
    """
    index, sizes = group_index(group)
    # Weights of 0, of tokens that were certain, would leave no mean.
    w = zero_padding(energy.clamp(min=0.0), loss_mask).cumsum(1) + 1e-8
    total = zero_padding(to_go, loss_mask)
    start = total[:, 0] - from_first(total[:, 0], group)
    relative = zero_padding(total - start.unsqueeze(1), loss_mask)

    def per_group(x: Tensor) -> Tensor:
        return x.new_zeros(len(sizes), x.shape[1]).index_add_(0, index, zero_padding(x, loss_mask))

    baseline = per_group(relative * w) / per_group(w).clamp(min=1e-12)
    shared = per_group(loss_mask.to(w.dtype)) > 1
    steps = torch.arange(w.shape[1], device=w.device)
    last = torch.where(shared, steps, 0).cummax(1).values
    alone = sizes.unsqueeze(1) == 1
    baseline = torch.where(alone, per_group(relative), baseline.gather(1, last))
    return zero_padding(relative - baseline[index], loss_mask)


def gradient_novelty(
    features: Float[Tensor, "B H"], scores: Float[Tensor, " B"], group: Int[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """ν_i = max(1 − Σ_{j≠i} w_ij cos²(Φ_i, Φ_j), 0), brought to [0, 1] in the group.

    w_i is the softmax of the others' scores. G²RL (arXiv 2512.15687). Groups of one, and of equal
    novelty, get 0 (our choice).

    Args:
        features: Φ, the gradient by the last hidden states, or what stands for it.
        scores: r, in which better completions count more.
        group: Ids of the rows' prompts.
    """
    index, sizes = group_index(group)
    found = torch.zeros_like(scores)
    directions = normalize(features, dim=1)
    for number, size in enumerate(sizes.tolist()):
        rows = (index == number).nonzero().squeeze(-1)
        if size < 2:
            continue
        alike = (directions[rows] @ directions[rows].T).square().to(scores.dtype)
        others = (
            scores[rows]
            .expand(size, size)
            .masked_fill(torch.eye(size, dtype=torch.bool, device=rows.device), float("-inf"))
        )
        novelty = (1.0 - (others.softmax(1) * alike).sum(1)).clamp(min=0.0)
        low, high = novelty.aminmax()
        if high - low > 1e-6:
            found[rows] = (novelty - low) / (high - low)
    return found


# Keeps logits finite: no critic's 0 or 1 is meant as certainty.
_PROBABILITY_FLOOR = 1e-4
_ROUNDING = 1e-5  # sums of rewards may end a little outside


def check_unit_returns(returns: Float[Tensor, " B"], what: str) -> None:
    """Refuses returns that are no probability, or share, of success.

    Args:
        returns: R.
        what: Who needs them, for the message.

    Raises:
        ValueError: For a return outside [0, 1], naming it.
    """
    outside = (returns < -_ROUNDING) | (returns > 1 + _ROUNDING)
    if bool(outside.any()):
        raise ValueError(
            f"{what} needs returns in [0, 1] and got {float(returns[outside][0]):g}. Scale the "
            "task's rewards, and leave out reward transforms that move them (overlong, "
            "kl_penalty, noise_backward)."
        )


def leave_one_out_posterior(
    prior: Float[Tensor, " B"],
    returns: Float[Tensor, " B"],
    group: Int[Tensor, " B"],
    prior_weight: float = 2.0,
) -> Float[Tensor, " B"]:
    """post_j = (n₀ V(s_0) + Σ_{l≠j} R_l) / (n₀ + G − 1).

    Leaves R_j out, so that a weight made of it does not bias row j's gradient.

    Args:
        prior: V(s_0) of each row.
        returns: R in [0, 1].
        group: Ids of the rows' prompts.
        prior_weight: n₀ ≥ 0, in completions.

    Returns:
        The prior itself where n₀ + G − 1 is 0.
    """
    index, sizes = group_index(group)
    others = sizes[index] - 1
    sums = returns.new_zeros(len(sizes)).index_add_(0, index, returns)[index] - returns
    weight = prior_weight + others
    return torch.where(weight > 0, (prior_weight * prior + sums) / weight.clamp(min=1e-9), prior)


def logit_shift(
    posterior: Float[Tensor, "*#S"], prior: Float[Tensor, "*#S"]
) -> Float[Tensor, "*S"]:
    """The shift, logit post − logit V(s_0), both kept within [1e-4, 1 − 1e-4].

    Args:
        posterior: In [0, 1].
        prior: V(s_0).
    """
    floor = _PROBABILITY_FLOOR
    return posterior.logit(eps=floor) - prior.logit(eps=floor)


def shifted_edges(
    edges: Float[Tensor, "... n_edges"], shift: Float[Tensor, "..."]
) -> Float[Tensor, "... n_edges"]:
    """Proportional odds: e ↦ σ(logit(e) − shift), which moves a law up where the shift is positive.

    A Bernoulli(p) law becomes Bernoulli(σ(logit p + shift)).

    Args:
        edges: Cumulative probabilities from 0 to 1.
        shift: In logits.

    Returns:
        From 0 to 1.
    """
    return torch.sigmoid(edges.logit() - shift.unsqueeze(-1))


def calibrated_edges(shift: Float[Tensor, " B"], n: int) -> Float[Tensor, "B n_edges"]:
    """`shifted_edges` of quantiles, whose edges are i/N, i = 0…N.

    The calibrated value of a state is Σ_i θ_i (e_i − e_{i−1}).

    Args:
        shift: In logits.
        n: N, the number of quantiles.

    Returns:
        From 0 to 1.
    """
    levels = torch.linspace(0, 1, n + 1, dtype=shift.dtype, device=shift.device)
    return shifted_edges(levels, shift)
