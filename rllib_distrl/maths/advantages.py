"""Advantages from a critic, and whitening.

Everywhere: a row is one completion, right-padded, and `loss_mask` (B, T) marks its tokens, a
prefix of the row. The state after the last marked token is terminal, with value 0.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rllib_distrl.maths.statistics import AllReduce, identity, masked_mean_and_std, zero_padding

# RLlib 2.60's GAE connector divides by max(1e-4, std).
WHITEN_MIN_STD = 1e-4
# Roundings by which a mean of equal numbers may be off: PyTorch sums pairwise.
_ROUNDING_OF_MEAN = 32


def discounted_sum(terms: Float[Tensor, "B T *N"], decay: float) -> Float[Tensor, "B T *N"]:
    """Reversed discounted cumulative sum S_t = x_t + decay · S_{t+1} along axis 1.

    By doubling, so log2(T) vectorised steps instead of T; sums pairwise, hence accurately.

    Args:
        terms: x, zero in the padding; a column per token, or N of them.
        decay: In [0, 1].
    """
    total, step = terms, 1
    while step < terms.shape[1] and decay > 0.0:
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
