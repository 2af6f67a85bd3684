"""K small critics with trunks of their own, which disagree where none of them has learned."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, scaled_dot_product_attention


class _Blocks(nn.Module):
    """K causal transformers side by side: every weight has a leading axis K."""

    def __init__(
        self, size: int, n_inputs: int, width: int, depth: int, generator: torch.Generator
    ):
        super().__init__()

        def drawn(rows: int, columns: int) -> nn.Parameter:
            noise = torch.randn(size, rows, columns, generator=generator)
            return nn.Parameter(noise / math.sqrt(rows))

        self.inputs = drawn(n_inputs, width)
        self.attention = nn.ParameterList(drawn(width, 3 * width) for _ in range(depth))
        self.up = nn.ParameterList(drawn(2 * width, 4 * width) for _ in range(depth))
        self.down = nn.ParameterList(drawn(4 * width, width) for _ in range(depth))
        self.output = drawn(width, 1)
        self.bias = nn.Parameter(torch.zeros(size, 1, 1, 1))
        self.width = width

    def forward(self, embeddings: Tensor) -> Tensor:
        """One number (K, B, S) per member and position of embeddings (B, S, E)."""
        x = torch.einsum("bse,ked->kbsd", embeddings, self.inputs)
        x = x + _positions(x.shape[2], self.width, x)
        blocks = zip(self.attention, self.up, self.down, strict=True)
        for attention, up, down in blocks:
            q, k, v = (_normed(x) @ attention[:, None]).chunk(3, dim=-1)
            seen = scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + gelu(torch.cat([_normed(x), seen], dim=-1) @ up[:, None]) @ down[:, None]
        return (_normed(x) @ self.output[:, None] + self.bias).squeeze(-1)


def _normed(x: Tensor) -> Tensor:
    return layer_norm(x, x.shape[-1:])


def _positions(steps: int, width: int, like: Tensor) -> Tensor:
    """(S, width) sines and cosines (Vaswani et al. 2017)."""
    position = torch.arange(steps, device=like.device, dtype=torch.float32).unsqueeze(1)
    rate = torch.exp(torch.arange(0, width, 2, device=like.device) * (-math.log(1e4) / width))
    return torch.cat([(position * rate).sin(), (position * rate).cos()], dim=-1).to(like.dtype)


class Ensemble(nn.Module):
    """Values of K small critics: f_k = g_k + prior_scale · p_k, of which only g_k learns.

    Each p_k is a fixed random network of g_k's form, so that members differ where no data has
    taught them to agree (randomised priors, Osband et al. 2018). They read the policy's input
    embeddings, of which they have trunks of their own: heads on one common trunk disagree little
    where they are wrong. The form of the trunks is our choice.
    """

    def __init__(
        self, n_inputs: int, *, size: int, width: int, depth: int, prior_scale: float, seed: int
    ):
        """Draws the members.

        Args:
            n_inputs: Width of the embeddings.
            size: K ≥ 2.
            width: Of each trunk.
            depth: Blocks of each trunk.
            prior_scale: Of the fixed random networks, in units of the return.
            seed: Of all weights: equal on all learners.
        """
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.members = _Blocks(size, n_inputs, width, depth, generator)
        self.priors = _Blocks(size, n_inputs, width, depth, generator).requires_grad_(False)
        nn.init.zeros_(self.members.output)
        self.prior_scale = prior_scale

    def start_at(self, value: float) -> None:
        """Lets all members start around ``value``, in units of the return."""
        with torch.no_grad():
            self.members.bias.fill_(value)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Values (K, B, S) at every position of embeddings (B, S, E), from what precedes it."""
        embeddings = embeddings.detach().float()
        embeddings = embeddings / embeddings.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-6)
        with torch.no_grad():
            prior = self.priors(embeddings)
        return self.members(embeddings) + self.prior_scale * prior
