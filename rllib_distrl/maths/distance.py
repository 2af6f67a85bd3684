"""How far a state's features are from those that have been seen."""

import torch
from jaxtyping import Float
from torch import Tensor


def second_moment(features: Float[Tensor, "K D"]) -> Float[Tensor, "D D"]:
    """Σ φ φᵀ over K vectors.

    Args:
        features: φ.

    Returns:
        In float64.
    """
    features = features.double()
    return features.t() @ features


def elliptical_distance(
    features: Float[Tensor, "... D"],
    moment: Float[Tensor, "D D"],
    count: float,
    ridge: float = 1e-3,
) -> Float[Tensor, "..."]:
    """√(φᵀ (M/n + ridge I)⁻¹ φ / D): its mean square over the vectors that made M is at most 1.

    The elliptical bonus of linear bandits (Abbasi-Yadkori et al. 2011) with the mean in place of
    the sum (our choice): it says how rare a direction is, and does not shrink as data comes in;
    that is left to the bonus's schedule.

    Args:
        features: φ.
        moment: M = Σ φ φᵀ of what has been seen.
        count: n > 0, how many vectors (or their weights) are in M.
        ridge: > 0.

    Returns:
        In float32, without unit.

    Raises:
        ValueError: For a ridge that is not positive, or nothing seen.
    """
    if ridge <= 0.0 or count <= 0.0:
        raise ValueError(f"need ridge > 0 and count > 0, got ridge={ridge}, count={count}")
    width = features.shape[-1]
    eye = torch.eye(width, dtype=torch.float64, device=features.device)
    factor = torch.linalg.cholesky(moment / count + ridge * eye)
    flat = features.reshape(-1, width).double().t()
    squares = torch.linalg.solve_triangular(factor, flat, upper=False).square().sum(0)
    return (squares / width).sqrt().view(features.shape[:-1]).float()
