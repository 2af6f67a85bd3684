"""Learning from completions that were shown (demonstrations) beside those that were sampled.

Log-probabilities are (B, T) of the rows' tokens, with gradient; everything else has none. Losses
are per token, to be minimised, and 0 in the padding.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rllib_distrl.maths.group_advantages import group_index, group_mean
from rllib_distrl.maths.statistics import row_mean, zero_padding

Tokens = Float[Tensor, "B T"]
Mask = Bool[Tensor, "B T"]


def few_right(right: Bool[Tensor, " B"], group: Int[Tensor, " B"], gate: int) -> Bool[Tensor, " B"]:
    """Whether at most `gate` completions of the row's prompt are right: HPT's switch.

    arXiv 2509.04419, as its authors' code has it (`switch_gate`); the paper compares the share of
    right ones with a threshold.

    Args:
        right: Of each sampled completion.
        group: Ids of the rows' prompts.
        gate: γ ≥ 0, in completions.
    """
    index, sizes = group_index(group)
    count = torch.zeros_like(sizes).index_add_(0, index, right.to(sizes.dtype))
    return (count <= gate)[index]


def supervised(logp: Tokens, *, loss_mask: Mask) -> Tokens:
    """−log π of what was shown.

    Args:
        logp: Of its tokens.
        loss_mask: True where a token counts.
    """
    return -zero_padding(logp, loss_mask)


def srft_sampled(
    logp: Tokens,
    entropy: Tokens,
    right: Bool[Tensor, " B"],
    *,
    positive_coeff: float = 0.1,
    loss_mask: Mask,
) -> Tokens:
    """−c e^H log π of completions that are right, +log π of those that are wrong.

    H is the mean entropy of the completion's tokens, in nats, before the update (our choice; public
    code takes the present policy's, which agrees in the first step). SRFT, arXiv 2506.19767, its
    loss of self-rollouts, as it stands in the code of HPT (arXiv 2509.04419), whose authors compare
    with it. There is neither ratio nor clip, and no baseline.

    Args:
        logp: Of the sampled tokens.
        entropy: Of the policy at each.
        right: Of each completion.
        positive_coeff: c.
        loss_mask: True where a token counts.
    """
    positive = positive_coeff * row_mean(entropy, loss_mask).exp()
    weight = torch.where(right, positive, -1.0).unsqueeze(1)
    return -weight * zero_padding(logp, loss_mask)


def srft_shown(
    logp: Tokens,
    entropy: Tokens,
    advantages: Tokens,
    *,
    supervised_coeff: float = 0.5,
    shaping: float = 0.1,
    loss_mask: Mask,
) -> Tokens:
    """−c e^{−H} log π − A π/(π + s): imitation, and reinforcement of what was shown.

    H is the mean entropy of the demonstration's tokens, in nats, before the update. The second term
    is the surrogate without a clip, to a behaviour policy of probability 1; π/(π + s) in the place
    of its ratio π is LUFFY's (arXiv 2504.14945), and what public code of SRFT trains with. SRFT,
    arXiv 2506.19767, its two losses of demonstrations.

    Args:
        logp: Of the shown tokens.
        entropy: Of the policy at each.
        advantages: A, see `shown_advantage`.
        supervised_coeff: c.
        shaping: s > 0.
        loss_mask: True where a token counts.
    """
    weight = supervised_coeff * torch.exp(-row_mean(entropy, loss_mask)).unsqueeze(1)
    logp, advantages = zero_padding(logp, loss_mask), zero_padding(advantages, loss_mask)
    probability = logp.exp()
    return -weight * logp - advantages * probability / (probability + shaping)


def shown_advantage(
    returns: Float[Tensor, " B"],
    group: Int[Tensor, " B"],
    shown_group: Int[Tensor, " D"],
    shown_return: float,
) -> Float[Tensor, " D"]:
    """R_d less the mean of its prompt's returns and itself: what was shown joins the group.

    SRFT, arXiv 2506.19767; without the division by the group's deviation that the paper has, as
    public code trains it.

    Args:
        returns: R of the sampled completions.
        group: Ids of their prompts.
        shown_group: The prompt of each demonstration.
        shown_return: R_d.
    """
    shown = returns.new_full((len(shown_group),), shown_return)
    means = group_mean(torch.cat((returns, shown)), torch.cat((group, shown_group)))
    return shown - means[len(returns) :]
