"""Losses on whole groups: what one completion of a prompt costs depends on the others.

All take logps (B, T) and give one number per row (B,); the loss is their mean over rows.
"""

from jaxtyping import Bool, Float, Int
from torch import Tensor

from rllib_distrl.maths.group_advantages import from_first, group_index, group_mean
from rllib_distrl.maths.statistics import bounded_log_ratio


def copg(
    logp: Float[Tensor, "B T"],
    ref_logp: Float[Tensor, "B T"],
    returns: Float[Tensor, " B"],
    group: Int[Tensor, " B"],
    *,
    beta: float = 0.05,
    loss_mask: Bool[Tensor, "B T"],
) -> Float[Tensor, " B"]:
    """CoPG: −mean_{j≠i} [(R_i − R_j) D_ij − (β/2) D_ij²], D_ij = x_i − x_j, x = ln(π/π_ref).

    x is a completion's whole log-ratio. The optimum over pairs is D_ij = (R_i − R_j)/β, that of
    KL-regularised RL, whatever policy sampled: no ratio to it is needed. Flet-Berliac et al. 2024
    (arXiv 2406.19185), whose pairs are drawn at random; all pairs of a group are our choice, and
    so are β and the bound of ±10 on a token's log-ratio.

    Args:
        logp: Of the sampled tokens, with gradient.
        ref_logp: Under the reference policy.
        returns: R.
        group: Ids of the rows' prompts.
        beta: β ≥ 0, weight of the KL to the reference.
        loss_mask: The completion's tokens.

    Returns:
        0 in a group of one.
    """
    x = bounded_log_ratio(logp, ref_logp, loss_mask).sum(1)
    index, sizes = group_index(group)
    # Σ_j (a_i − a_j)(b_i − b_j) = G (a_i b_i + mean_j a_j b_j) where both have mean 0.
    x = x - group_mean(x, group)
    returns = from_first(returns, group)
    returns = (returns - group_mean(returns, group)).to(x.dtype)
    gain = returns * x - beta / 2 * x.square()
    size = sizes[index].to(x.dtype)
    return -(gain + group_mean(gain, group)) * size / (size - 1).clamp(min=1)
