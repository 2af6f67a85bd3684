"""Laws of returns, and what a return is worth relative to the law at its prompt.

Of one prompt a group of completions tells the mean, the scale and the ranks of returns; a critic's
law tells the same before a second completion is sampled. Each worth g is a function of the return
r and the law F at the prompt's state s_0, and A_t = g(R) − E[g(Z_t)], Z_t of the law at s_t, has
the policy gradient of E[g(R)]; at s_0 the expectation is 0 for `rank` and `standardised`. Ours.

The best of k: ∇E[max(R_1 … R_k)] = k E[u(R) ∇log π] with u(x) = E[(x − M)₊] and M the best of k − 1
independent returns of the same prompt: a completion counts by how far it lifts the best of the
others. Ours; the group estimator of the same gradient is `group_advantages.maxk`, which needs k
completions. There a law is given as atoms (…, N), rising, and edges (…, N + 1), its cumulative
probabilities from 0 to 1: quantiles have the edges i/N.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rllib_distrl.maths.group_advantages import check_unit_returns
from rllib_distrl.maths.optimism import BONUS_STATS, bonus_statistic
from rllib_distrl.maths.quantiles import best_of_k, check_read_out, distorted
from rllib_distrl.maths.quantiles import read_out as quantiles_read_out
from rllib_distrl.maths.statistics import AllReduce, identity


@dataclass(frozen=True)
class Law:
    """Discrete laws, one per state: atoms that do not fall along the last axis, and their weights.

    What a critic says of a state, whatever its head: N quantiles are atoms of probability 1/N, a
    Bernoulli law has the atoms 0 and 1, a categorical one those of its grid.

    Attributes:
        atoms: z, in units of the return.
        probs: p, not negative, of sum 1; None: 1/N each.
    """

    atoms: Float[Tensor, "... N"]
    probs: Float[Tensor, "... N"] | None = None

    def __getitem__(self, index: Any) -> "Law":
        """The laws of some states: indexes all axes but the last."""
        return Law(self.atoms[index], None if self.probs is None else self.probs[index])

    def moved(self, by: Float[Tensor, "..."]) -> "Law":
        """The laws of Z + x.

        Args:
            by: x of each state.
        """
        return Law(self.atoms + by.unsqueeze(-1), self.probs)

    @property
    def weights(self) -> Float[Tensor, "... N"]:
        """P, also where it is 1/N."""
        if self.probs is not None:
            return self.probs
        return self.atoms.new_tensor(1 / self.atoms.shape[-1]).expand_as(self.atoms)

    @property
    def edges(self) -> Float[Tensor, "... n_edges"]:
        """The N + 1 cumulative probabilities, from 0 to 1."""
        if self.probs is None:
            n, like = self.atoms.shape[-1], self.atoms
            levels = torch.linspace(0, 1, n + 1, dtype=like.dtype, device=like.device)
            return levels.expand(*like.shape[:-1], n + 1)
        total = self.probs.cumsum(-1).clamp(max=1.0)
        ends = torch.zeros_like(total[..., :1])
        return torch.cat([ends, total[..., :-1], ends + 1], dim=-1)

    @property
    def mean(self) -> Float[Tensor, "..."]:
        """Σ_i p_i z_i."""
        return self.expectation(self.atoms)

    @property
    def std(self) -> Float[Tensor, "..."]:
        """√(Σ_i p_i (z_i − mean)²)."""
        if self.probs is None:
            return self.atoms.std(-1, correction=0)
        return self.expectation((self.atoms - self.mean.unsqueeze(-1)).square()).sqrt()

    def expectation(self, of_atoms: Float[Tensor, "... N"]) -> Float[Tensor, "..."]:
        """E[g(Z)].

        Args:
            of_atoms: g of each atom.
        """
        return of_atoms.mean(-1) if self.probs is None else (self.probs * of_atoms).sum(-1)

    def cdf(self, x: Float[Tensor, "..."], *, strict: bool = False) -> Float[Tensor, "..."]:
        """F(x) = P(Z ≤ x), or P(Z < x).

        Args:
            x: A return of each state.
            strict: Whether an atom at x stays out.
        """
        y = x.unsqueeze(-1)
        held = self.atoms < y if strict else self.atoms <= y
        return self.expectation(held.to(self.atoms.dtype))

    def inverse(self, levels: Float[Tensor, "... K"]) -> Float[Tensor, "... K"]:
        """F⁻¹(u), the least atom z with F(z) ≥ u.

        Args:
            levels: u in (0, 1), K of each state.
        """
        reached = self.edges[..., 1:].contiguous()
        place = torch.searchsorted(reached, levels.contiguous(), out_int32=False)
        return self.atoms.gather(-1, place.clamp(max=self.atoms.shape[-1] - 1))

    def sample(self, uniforms: Float[Tensor, "... K"]) -> Float[Tensor, "... K"]:
        """K returns of each state.

        Args:
            uniforms: Uniform in (0, 1).
        """
        return self.inverse(uniforms)

    def quantiles(self, n: int) -> Float[Tensor, "... n"]:
        """N quantiles θ_i = n ∫ F⁻¹ over [(i − 1)/n, i/n], whose mean is the law's own.

        The closest n equal atoms in the 2-Wasserstein distance; n quantiles are their own. A
        Bernoulli law becomes zeros, ones, and perhaps one number between.

        Args:
            n: How many.
        """
        if self.probs is None and self.atoms.shape[-1] == n:
            return self.atoms
        edges, double = self.edges.double(), self.atoms.double()
        area = torch.cat([double.new_zeros(*double.shape[:-1], 1),
                          (edges.diff(dim=-1) * double).cumsum(-1)], dim=-1)  # fmt: skip
        levels = torch.linspace(0, 1, n + 1, dtype=torch.float64, device=edges.device)
        levels = levels.expand(*edges.shape[:-1], n + 1).contiguous()
        place = torch.searchsorted(edges[..., 1:-1].contiguous(), levels)
        reached = area.gather(-1, place)
        reached = reached + (levels - edges.gather(-1, place)) * double.gather(-1, place)
        return (n * reached.diff(dim=-1)).to(self.atoms.dtype)


def read_out(law: Law, name: str = "mean", level: float | None = None) -> Float[Tensor, "..."]:
    """The value of a state, as the actor uses it: exact for each law.

    Args:
        law: Of the return.
        name: One of `quantiles.READ_OUTS`.
        level: See `quantiles.check_read_out`. `pass_at_k` clamps V to [0, 1] (our choice).

    Returns:
        In units of the return.

    Raises:
        ValueError: As `quantiles.check_read_out`.
    """
    name, level = check_read_out({"name": name, "level": level})
    if law.probs is None:
        return quantiles_read_out(law.atoms, name, level)
    if name == "mean":
        return law.mean
    if name == "mean_dev":
        return law.mean + level * law.std
    if name == "pass_at_k":
        return 1.0 - (1.0 - law.mean.clamp(0.0, 1.0)) ** level
    if name == "best_of_k":
        return best_of_k(law.atoms, int(level), law.edges)
    return (law.atoms * distorted(law.edges, name, level).diff(dim=-1)).sum(-1)


def uncertainty(law: Law, bonus_stat: str = "ltv_sqrt") -> Float[Tensor, "..."]:
    """b(s) of `optimism.bonus_statistic`, exact for each law.

    σ₊² = ½ ∫_{½}^1 (F⁻¹(u) − median)² du, the median being F⁻¹ just above ½.

    Args:
        law: Of the return.
        bonus_stat: "ltv_sqrt", "ltv" or "std".

    Raises:
        ValueError: As `optimism.bonus_statistic`.
    """
    if law.probs is None or bonus_stat not in BONUS_STATS:
        return bonus_statistic(law.atoms, bonus_stat)
    if bonus_stat == "std":
        return law.std
    edges = law.edges
    median = law.atoms.gather(-1, (edges[..., 1:-1] <= 0.5).sum(-1, keepdim=True))
    upper = edges.clamp(min=0.5).diff(dim=-1)
    variance = 0.5 * (upper * (law.atoms - median).square()).sum(-1)
    return variance.sqrt() if bonus_stat == "ltv_sqrt" else variance


def rank(x: Float[Tensor, "B ..."], prompt: Law, tie_width: float = 0.0) -> Float[Tensor, "B ..."]:
    """2 F(x) − 1 = Σ_i p_i (1{x > z_i} − 1{x < z_i}): mid-ranks where x is an atom.

    Scale-free, and within ±1 whatever the reward: an outlier counts no more than a best return.

    Args:
        x: Returns.
        prompt: F, the law at the prompt's state, (B, N).
        tie_width: Atoms this close to x tie with it, in units of the return.
    """
    rows = (len(x), *[1] * (x.dim() - 1))
    found = torch.zeros_like(x)
    for atom, prob in zip(prompt.atoms.unbind(-1), prompt.weights.unbind(-1), strict=True):
        above = x - atom.view(rows)
        found += torch.where(above.abs() > tie_width, above.sign(), 0.0) * prob.view(rows)
    return found


def standardised(
    x: Float[Tensor, "B ..."], prompt: Law, min_std: float = 0.05
) -> Float[Tensor, "B ..."]:
    """(x − mean) / max(std, min_std): GRPO's advantage, mean and std those of the law.

    Args:
        x: Returns.
        prompt: The law at the prompt's state, (B, N).
        min_std: Least std, in units of the return: it bounds what a law that is sure and wrong
            makes of a return (our choice).
    """
    rows = (len(x), *[1] * (x.dim() - 1))
    return (x - prompt.mean.view(rows)) / prompt.std.clamp(min=min_std).view(rows)


def utility(x: Float[Tensor, "B ..."], prompt: Law, k: int) -> Float[Tensor, "B ..."]:
    """h_k(x) = k ∫_{−∞}^x F^{k−1}, whose policy gradient is that of the expected best of k.

    Equals k E[(x − M)₊], M the best of k − 1 others; x itself for k = 1.

    Args:
        x: Returns.
        prompt: F, the law at the prompt's state, (B, N).
        k: ≥ 1.
    """
    return k * gain_over_best(x, prompt.atoms, prompt.edges, k)


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
