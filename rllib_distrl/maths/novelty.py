"""How far a completion's gradient points where the gradients of its group do not."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from rllib_distrl.maths.group_advantages import group_index


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
