"""From token losses to one loss: weights that are fixed before micro-batches are cut.

loss = Σ weights · token_loss over the whole minibatch and all learners. The normaliser is in the
weights, so micro-batches' losses and gradients just add up. With several learners the gradients
are to be SUMMED: DDP averages them, so multiply the loss by the number of learners there.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rllib_distrl.maths.statistics import AllReduce, identity

AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum", "constant")


def token_weights(
    loss_mask: Bool[Tensor, "B T"],
    aggregation: str = "token_mean",
    *,
    divisor: float | None = None,
    all_reduce: AllReduce = identity,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "B T"]:
    """The weight of each token of a minibatch.

    `token_mean`: mean over all tokens. `sequence_mean`: mean over sequences of their token means.
    `sequence_sum`: mean over sequences of their token sums. `constant`: the latter divided by
    `divisor` (Dr. GRPO; the divisor is the length limit). Rows without a token do not count.

    Args:
        loss_mask: Of the whole minibatch.
        aggregation: One of the names above.
        divisor: Tokens by which `constant` divides each sequence's sum.
        all_reduce: Sum over learners.
        dtype: Of the result.

    Returns:
        0 in the padding; the mean modes sum to 1 over all learners.

    Raises:
        ValueError: For an unknown aggregation or `constant` without a positive divisor.
    """
    mask = loss_mask.to(dtype)
    if aggregation == "token_mean":
        return mask / all_reduce(mask.sum()).clamp(min=1.0)
    lengths = mask.sum(1, keepdim=True)
    sequences = all_reduce((lengths > 0).to(dtype).sum()).clamp(min=1.0)
    if aggregation == "sequence_mean":
        return mask / lengths.clamp(min=1.0) / sequences
    if aggregation == "sequence_sum":
        return mask / sequences
    if aggregation != "constant":
        raise ValueError(f"aggregation must be one of {AGGREGATIONS}, got {aggregation!r}")
    if divisor is None or divisor <= 0:
        raise ValueError(f"constant aggregation needs a divisor > 0 in tokens, got {divisor}")
    return mask / (divisor * sequences)


def weighted_sum(
    token_loss: Float[Tensor, "B T"], weights: Float[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """Σ weights · token_loss; a token of weight 0 adds nothing, even if its loss is NaN.

    Args:
        token_loss: Of each token.
        weights: See `token_weights`.
    """
    return torch.where(weights != 0, weights * token_loss, 0.0).sum()
