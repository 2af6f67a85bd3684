"""What a return adds to the best of k: the utility whose policy gradient raises the expected best.

∇E[max(R_1 … R_k)] = k E[u(R) ∇log π] with u(x) = E[(x − M)₊] and M the best of k − 1 independent
returns of the same prompt: a completion counts by how far it lifts the best of the others. Ours;
the group estimator of the same gradient is `group_advantages.maxk`, which needs k completions.

A law of returns is given as atoms (…, N), rising, and edges (…, N + 1), its cumulative
probabilities from 0 to 1: quantiles have the edges i/N.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from rllib_distrl.maths.group_calibration import check_unit_returns
from rllib_distrl.maths.statistics import AllReduce, identity

# Steps of the grid on which the law of a batch's returns is counted: exact for 0/1 returns.
_GRID = 50


def gain_over_best(
    x: Float[Tensor, "B ..."],
    atoms: Float[Tensor, "B N"],
    edges: Float[Tensor, "B n_edges"],
    k: int,
) -> Float[Tensor, "B ..."]:
    """u(x) = Σ_i (x − z_i)₊ (e_i^{k−1} − e_{i−1}^{k−1}); x itself for k = 1.

    Args:
        x: Returns.
        atoms: z, the law of one completion's return at the row's prompt.
        edges: e.
        k: ≥ 1.

    Returns:
        The shape of `x`.
    """
    if k == 1:
        return x
    rows = (len(x), *[1] * (x.dim() - 1))
    weights = (edges ** (k - 1)).diff(dim=-1)
    found = torch.zeros_like(x)
    for atom, weight in zip(atoms.unbind(-1), weights.unbind(-1), strict=True):
        found += (x - atom.view(rows)).clamp(min=0.0) * weight.view(rows)
    return found


def law_of_batch(
    returns: Float[Tensor, " B"], all_reduce: AllReduce = identity
) -> tuple[Float[Tensor, " 51"], Float[Tensor, " 52"]]:
    """The law of all completions' returns, whatever their prompt, on a grid of 51 points.

    A return counts for its two neighbours on the grid, so that the mean is exact.

    Args:
        returns: In [0, 1].
        all_reduce: Sum over learners.

    Returns:
        Atoms and edges.

    Raises:
        ValueError: For a return outside [0, 1].
    """
    check_unit_returns(returns, "the law of a batch")
    place = returns.clamp(0.0, 1.0) * _GRID
    low = place.floor().clamp(max=_GRID - 1)
    counts = returns.new_zeros(_GRID + 1)
    counts.index_add_(0, low.long(), low + 1 - place)
    counts.index_add_(0, low.long() + 1, place - low)
    counts = all_reduce(counts)
    atoms = torch.linspace(0, 1, _GRID + 1, dtype=returns.dtype, device=returns.device)
    edges = torch.cat([counts.new_zeros(1), counts.cumsum(0) / counts.sum()])
    edges[-1] = 1.0
    return atoms, edges.clamp(max=1.0)
