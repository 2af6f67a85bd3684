"""A critic's value at the prompt, corrected by what the other completions of the prompt got.

Ours, for returns in [0, 1]: the critic is poor at the prompt, the group's results are not.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rllib_distrl.maths.group_advantages import group_index

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
