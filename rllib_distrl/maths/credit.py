"""Which tokens and completions an advantage falls to: spans, steps, positions, and the few kept."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from rllib_distrl.maths.advantages import discounted_sum, td_errors
from rllib_distrl.maths.group_advantages import group_index
from rllib_distrl.maths.statistics import AllReduce, identity, masked_mean_and_std, zero_padding

_SMALLEST_STD = 1e-8


def macro_gae(
    values: Float[Tensor, "B T"],
    rewards: Float[Tensor, "B T"],
    loss_mask: Bool[Tensor, "B T"],
    *,
    span: int = 5,
    gamma: float = 1.0,
    lambda_: float = 0.95,
) -> Float[Tensor, "B T"]:
    """GAE over macro actions of n tokens: every token of a span has the span's advantage.

    V and r of a span are the means of its tokens', as in the authors' code (MA-RLHF, arXiv
    2410.02743): a reward at the end of a span counts 1/n of itself there, so that advantages are
    smaller than GAE's; whitening takes that off. n = 1 is GAE.

    Args:
        values: V(s_t), without gradient.
        rewards: r_t.
        loss_mask: A prefix of each row.
        span: n ≥ 1, tokens of a macro action; the last one of a row may be shorter.
        gamma: γ, per span.
        lambda_: λ, per span.

    Returns:
        0 in the padding.

    Raises:
        ValueError: For a span below 1.
    """
    if span < 1:
        raise ValueError(f"span must be at least 1 token, got {span}: 5 is usual")
    width = values.shape[1]
    behind = -width % span

    def spans(x: Tensor) -> Tensor:
        return pad(zero_padding(x, loss_mask), (0, behind)).unflatten(1, (-1, span)).sum(2)

    counts = spans(torch.ones_like(values))
    mean_values, mean_rewards = (
        spans(x) / counts.clamp(min=1.0) for x in (values.detach(), rewards)
    )
    delta = td_errors(mean_values, mean_rewards, counts > 0, gamma)
    advantages = discounted_sum(delta, gamma * lambda_).repeat_interleave(span, dim=1)
    return zero_padding(advantages[:, :width], loss_mask)


def step_relative(
    per_token: Float[Tensor, "B T"], group: Int[Tensor, " B"], loss_mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """x_t less its mean over the group's completions that still run at t.

    SPRO (arXiv 2507.01551) applies it to R̃_t = β Σ_{j≤t} ln(π/π_ref).

    Args:
        per_token: x.
        group: Ids of the rows' prompts.
        loss_mask: True where a token counts.

    Returns:
        0 in the padding.
    """
    index, sizes = group_index(group)
    valid = zero_padding(per_token, loss_mask)
    sums = valid.new_zeros(len(sizes), valid.shape[1]).index_add_(0, index, valid)
    alive = torch.zeros_like(sums).index_add_(0, index, loss_mask.to(valid.dtype))
    return zero_padding(valid - (sums / alive.clamp(min=1.0))[index], loss_mask)


def most_varied(
    advantages: Float[Tensor, " B"], group: Int[Tensor, " B"], share: float
) -> Bool[Tensor, " B"]:
    """The completions of each group, round(share · G) but at least one, whose advantages vary most.

    Those are the lowest i and the highest n − i for the best i (D³S, arXiv 2509.22115).

    Args:
        advantages: A of each completion.
        group: Ids of the rows' prompts.
        share: In (0, 1].
    """
    index, sizes = group_index(group)
    kept = torch.zeros_like(group, dtype=torch.bool)
    for number, size in enumerate(sizes.tolist()):
        rows = (index == number).nonzero().squeeze(-1)
        order = rows[advantages[rows].argsort(stable=True)]
        count = max(1, round(share * size))
        choices = [
            torch.cat([order[:low], order[size - count + low :]]) for low in range(count + 1)
        ]
        kept[max(choices, key=lambda chosen: float(advantages[chosen].var(correction=0)))] = True
    return kept


def largest_share(
    score: Float[Tensor, "B T"], allowed: Bool[Tensor, "B T"], share: float
) -> Bool[Tensor, "B T"]:
    """The allowed tokens of highest score, ⌈share · their number⌉ of them.

    Args:
        score: Of each token.
        allowed: Which may be chosen.
        share: In (0, 1].
    """
    count = int(-(-share * int(allowed.sum()) // 1))
    ranked = torch.where(allowed, score, float("-inf")).flatten()
    chosen = torch.zeros_like(ranked, dtype=torch.bool)
    chosen[ranked.topk(count).indices] = True
    return chosen.view_as(allowed) & allowed


def perplexity_and_position(
    advantages: Float[Tensor, "B T"],
    action_logp: Float[Tensor, "B T"],
    loss_mask: Bool[Tensor, "B T"],
    *,
    perplexity_weight: float = 0.01,
    position_weight: float = 0.1,
    position_slope: float = 1.0,
    all_reduce: AllReduce = identity,
) -> Float[Tensor, "B T"]:
    """A (1 − a z(ln PPL)) + b sign(A) σ(d t/L): less for odd completions, more for late tokens.

    z standardises the completion's log-perplexity over the batch; t/L is the token's place in its
    completion. After arXiv 2508.02260; a and b are its numbers, d and the scale of t are ours.

    Args:
        advantages: A.
        action_logp: Of the policy that sampled.
        loss_mask: True where a token counts.
        perplexity_weight: a.
        position_weight: b ≥ 0.
        position_slope: d.
        all_reduce: Sum over learners.

    Returns:
        0 in the padding.
    """
    lengths = loss_mask.sum(1, keepdim=True).clamp(min=1)
    log_ppl = -zero_padding(action_logp, loss_mask).sum(1, keepdim=True) / lengths
    mean, std = masked_mean_and_std(log_ppl, loss_mask.any(1, keepdim=True), all_reduce)
    factor = 1.0 - perplexity_weight * (log_ppl - mean) / std.clamp(min=_SMALLEST_STD)
    place = torch.arange(loss_mask.shape[1], device=loss_mask.device) / lengths
    late = position_weight * torch.sigmoid(position_slope * place).to(advantages.dtype)
    return zero_padding(advantages * factor + advantages.sign() * late, loss_mask)


def lowest_confidence(
    logp: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], share: float = 0.2
) -> Float[Tensor, " B"]:
    """Exp of the mean log-probability of each row's least likely tokens (ProGRPO's c).

    Args:
        logp: Of each token.
        mask: True where a token counts.
        share: In (0, 1]; ⌈share · tokens⌉ of a row are taken.

    Returns:
        In (0, 1]; 1 for a row without tokens.
    """
    ascending = torch.where(mask, logp, float("inf")).sort(1).values
    counts = (share * mask.sum(1, keepdim=True)).ceil()
    taken = torch.arange(logp.shape[1], device=logp.device) < counts
    sums = torch.where(taken, ascending, 0.0).sum(1, keepdim=True)
    return (sums / counts.clamp(min=1.0)).exp().squeeze(1)


def entropy_credit(
    entropy: Float[Tensor, "B T"],
    right: Bool[Tensor, "B T"],
    group: Int[Tensor, " B"],
    loss_mask: Bool[Tensor, "B T"],
    alpha: float = 0.1,
) -> Float[Tensor, "B T"]:
    """Rewards shared out by entropy, right and wrong apart, and standardised in the group.

    Right: 1 + α d_t H/Σ H over the d_t right completions of the group that still run at t. Wrong:
    −(1 + α h_t H⁻¹/Σ H⁻¹) over the h_t wrong ones. Of each kind the advantage is (r − mean)/std
    over the group's tokens, which are 0 where they are of the other kind (our reading: α = 0 is
    then the standardised return). GTPO, and GRPO-S with completions for tokens (arXiv 2508.04349,
    after notes on it).

    Args:
        entropy: H > 0.
        right: Which tokens are of right completions.
        group: Ids of the rows' prompts.
        loss_mask: True where a token counts.
        alpha: α ≥ 0.

    Returns:
        0 in the padding, and in groups that are all right or all wrong where α is 0.
    """
    index, sizes = group_index(group)

    def shared(weight: Tensor, kind: Tensor) -> Tensor:
        valid = zero_padding(weight, kind)
        sums = valid.new_zeros(len(sizes), valid.shape[1]).index_add_(0, index, valid)
        counts = torch.zeros_like(sums).index_add_(0, index, kind.to(valid.dtype))
        share = valid / sums.clamp(min=_SMALLEST_STD)[index] * counts[index]
        return zero_padding(1.0 + alpha * share, kind)

    good, bad = right & loss_mask, ~right & loss_mask
    gained = _standardised(shared(entropy, good), index, len(sizes), loss_mask)
    lost = _standardised(
        -shared(entropy.clamp(min=_SMALLEST_STD).reciprocal(), bad), index, len(sizes), loss_mask
    )
    return torch.where(good, gained, zero_padding(lost, bad))


def _standardised(x: Tensor, index: Tensor, groups: int, loss_mask: Tensor) -> Tensor:
    """(x − mean) / (std + 1e-6) over all tokens of each group, with the population's std."""

    def mean(values: Tensor) -> Tensor:
        rows = zero_padding(values, loss_mask).sum(1)
        tokens = loss_mask.sum(1).to(values.dtype)
        sums = rows.new_zeros(groups).index_add_(0, index, rows)
        counts = rows.new_zeros(groups).index_add_(0, index, tokens)
        return (sums / counts.clamp(min=1.0))[index].unsqueeze(1)

    centred = x - mean(x)
    return centred / (mean(centred.square()).sqrt() + 1e-6)
