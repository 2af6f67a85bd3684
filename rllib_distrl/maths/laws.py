"""Laws of returns, and what a return is worth relative to the law at its prompt.

Of one prompt a group of completions tells the mean, the scale and the ranks of returns; a critic's
law tells the same before a second completion is sampled. Each worth g is a function of the return
r and the law F at the prompt's state s_0, and A_t = g(R) − E[g(Z_t)], Z_t of the law at s_t, has
the policy gradient of E[g(R)]; at s_0 the expectation is 0 for `rank` and `standardised`. Ours.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rllib_distrl.maths.best_of_k import gain_over_best


@dataclass(frozen=True)
class Law:
    """Discrete laws, one per state: atoms that do not fall along the last axis, and their weights.

    Quantiles are atoms of probability 1/N, a Bernoulli law has the atoms 0 and 1.

    Attributes:
        atoms: z (…, N), in units of the return.
        probs: p (…, N), not negative, of sum 1.
    """

    atoms: Tensor
    probs: Tensor

    @classmethod
    def of_quantiles(cls, quantiles: Float[Tensor, "... N"]) -> "Law":
        """N quantiles at midpoints, as atoms of probability 1/N.

        Args:
            quantiles: θ, ordered.
        """
        return cls(quantiles, quantiles.new_tensor(1 / quantiles.shape[-1]).expand_as(quantiles))

    def __getitem__(self, index: object) -> "Law":
        """The laws of some states: indexes all axes but the last."""
        return Law(self.atoms[index], self.probs[index])  # pyright: ignore[reportArgumentType]

    def moved(self, by: Float[Tensor, "..."]) -> "Law":
        """The laws of Z + x.

        Args:
            by: x of each state.
        """
        return Law(self.atoms + by.unsqueeze(-1), self.probs)

    @property
    def mean(self) -> Tensor:
        """Σ_i p_i z_i, (…)."""
        return (self.probs * self.atoms).sum(-1)

    @property
    def std(self) -> Tensor:
        """√(Σ_i p_i (z_i − mean)²), (…)."""
        centred = self.atoms - self.mean.unsqueeze(-1)
        return (self.probs * centred.square()).sum(-1).sqrt()

    @property
    def edges(self) -> Tensor:
        """Cumulative probabilities (…, N + 1), from 0 to 1."""
        total = self.probs.cumsum(-1).clamp(max=1.0)
        ends = torch.zeros_like(total[..., :1])
        return torch.cat([ends, total[..., :-1], ends + 1], dim=-1)

    def expectation(self, of_atoms: Float[Tensor, "... N"]) -> Float[Tensor, "..."]:
        """E[g(Z)].

        Args:
            of_atoms: g of each atom.
        """
        return (self.probs * of_atoms).sum(-1)


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
    for atom, prob in zip(prompt.atoms.unbind(-1), prompt.probs.unbind(-1), strict=True):
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
