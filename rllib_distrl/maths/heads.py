"""Losses of critics whose law is no set of quantiles: Bernoulli, categorical on a grid, Gaussian.

Targets y (B, T, M) are samples or quantiles of the return, without gradient, as for the quantile
loss; each counts 1/M. `loss_mask` marks tokens; others get loss 0 and gradient 0.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from rllib_distrl.maths.statistics import zero_padding

PROJECTIONS = ("hl_gauss", "two_hot")
_BISECTIONS = 60
# Of the grid's width: the start of a categorical law is no nearer to an end.
_CLOSEST_START = 0.01


def bernoulli_loss(
    logits: Float[Tensor, "B T"], targets: Float[Tensor, "B T M"], loss_mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """−[ȳ ln p + (1 − ȳ) ln(1 − p)], ȳ = mean_j y_j, p = σ(logit).

    Least at p = E[y], so that the mean is right for any returns in [0, 1], and the law for 0/1.

    Args:
        logits: Of p.
        targets: y in [0, 1].
        loss_mask: True where a token counts.
    """
    y = zero_padding(targets, loss_mask).mean(-1).detach().to(logits.dtype)
    loss = binary_cross_entropy_with_logits(zero_padding(logits, loss_mask), y, reduction="none")
    return zero_padding(loss, loss_mask)


def two_hot(y: Float[Tensor, "..."], atoms: Float[Tensor, " K"]) -> Float[Tensor, "... K"]:
    """Splits each y between the two atoms around it, so that the mean is y (C51's projection).

    Bellemare et al. 2017; MuZero and DreamerV3 name it two-hot.

    Args:
        y: Within the grid.
        atoms: z, evenly spaced.

    Returns:
        Probabilities.
    """
    step = atoms[1] - atoms[0]
    return (1 - (y.unsqueeze(-1) - atoms).abs() / step).clamp(min=0.0)


def hl_gauss(
    y: Float[Tensor, "..."], atoms: Float[Tensor, " K"], sigma: float = 0.75
) -> Float[Tensor, "... K"]:
    """The mass of N(y, σ²) in the bin around each atom, over that in all bins.

    Imani & White 2018; Farebrother et al. 2024 (arXiv 2403.03950), whose σ is 0.75 bins. Bins reach
    half a step to both sides of their atom (our choice, so that the ends of the range are atoms);
    what falls outside is left out, which moves a y at an end inwards by about a third of a step.

    Args:
        y: Within the grid.
        atoms: z, evenly spaced.
        sigma: σ, in steps of the grid.

    Returns:
        Probabilities.
    """
    step = atoms[1] - atoms[0]
    edges = torch.cat([atoms - step / 2, atoms[-1:] + step / 2])
    below = torch.special.ndtr((edges - y.unsqueeze(-1)) / (sigma * step))
    return below.diff(dim=-1) / (below[..., -1:] - below[..., :1])


def categorical_loss(
    logits: Float[Tensor, "B T K"],
    targets: Float[Tensor, "B T M"],
    atoms: Float[Tensor, " K"],
    loss_mask: Bool[Tensor, "B T"],
    projection: str = "hl_gauss",
    sigma: float = 0.75,
) -> Float[Tensor, "B T"]:
    """Cross-entropy −Σ_i m_i ln p_i to the mean m of the projected targets, p = softmax(logits).

    Args:
        logits: Of p.
        targets: y, within the grid.
        atoms: z, evenly spaced.
        loss_mask: True where a token counts.
        projection: One of `PROJECTIONS`.
        sigma: σ of `hl_gauss`, in steps of the grid.

    Raises:
        ValueError: For an unknown projection.
    """
    if projection not in PROJECTIONS:
        raise ValueError(f"projection must be one of {PROJECTIONS}, got {projection!r}")
    atoms = atoms.to(logits.dtype)
    mass = torch.zeros_like(logits)
    for y in zero_padding(targets, loss_mask).detach().to(logits.dtype).unbind(-1):
        mass += two_hot(y, atoms) if projection == "two_hot" else hl_gauss(y, atoms, sigma)
    logp = zero_padding(logits, loss_mask).log_softmax(-1)
    return zero_padding(-(mass * logp).sum(-1) / targets.shape[-1], loss_mask)


def gaussian_loss(
    mean: Float[Tensor, "B T"],
    log_std: Float[Tensor, "B T"],
    targets: Float[Tensor, "B T M"],
    loss_mask: Bool[Tensor, "B T"],
    beta: float = 0.5,
) -> Float[Tensor, "B T"]:
    """sg(σ^{2β}) mean_j [ln σ + (y_j − μ)²/(2 σ²)]: β-NLL of a mean and a variance.

    Nix & Weigend 1994 (β = 0); Seitzer et al. 2022 (arXiv 2203.09168) for β, which keeps states of
    large variance from being left alone: the gradient of μ is (μ − y) σ^{2β − 2}.

    Args:
        mean: μ.
        log_std: ln σ.
        targets: y.
        loss_mask: True where a token counts.
        beta: β in [0, 1]; 1 has the gradient of the squared error in μ.
    """
    y = zero_padding(targets, loss_mask).detach().to(mean.dtype)
    mean, log_std = zero_padding(mean, loss_mask), zero_padding(log_std, loss_mask)
    error = (y - mean.unsqueeze(-1)).square().mean(-1)
    loss = log_std + error * (-2.0 * log_std).exp() / 2.0
    return zero_padding((2.0 * beta * log_std).exp().detach() * loss, loss_mask)


def standard_normal_atoms(n: int) -> Float[Tensor, " n"]:
    """Mid-quantiles Φ⁻¹((i − ½)/n) of a standard normal, stretched so that their std is 1 again.

    Our choice: the law that they make has its mean and its standard deviation exactly.

    Args:
        n: At least 2.
    """
    levels = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    atoms = torch.special.ndtri(levels)
    return atoms / atoms.std(correction=0)


def tilted_logits(atoms: Float[Tensor, " K"], mean: float) -> Float[Tensor, " K"]:
    """Logits η z of the law of most entropy with a given mean: what a head starts with.

    Args:
        atoms: z, rising.
        mean: Kept a hundredth of the range away from both ends.
    """
    z = atoms.double()
    width = float(z[-1] - z[0])
    margin = _CLOSEST_START * width
    mean = min(max(mean, float(z[0]) + margin), float(z[-1]) - margin)
    low, high = -1e4 / width, 1e4 / width
    for _ in range(_BISECTIONS):
        eta = (low + high) / 2
        reached = float(((eta * z).softmax(0) * z).sum())
        low, high = (eta, high) if reached < mean else (low, eta)
    return ((low + high) / 2 * (z - z[0])).to(atoms.dtype)


def bernoulli_logit(mean: float) -> float:
    """The logit that a Bernoulli head starts with, its probability kept within [0.01, 0.99].

    Args:
        mean: The mean return of the initial policy.
    """
    p = min(max(mean, _CLOSEST_START), 1 - _CLOSEST_START)
    return math.log(p / (1 - p))
