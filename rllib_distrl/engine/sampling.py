"""Counter-based uniforms and inverse-CDF sampling.

Randomness is a pure function of (seed, row, sample, visit, position): neither the batch that a
request is part of nor the order of requests can change what is sampled.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from rllib_distrl.engine.protocol import SamplingParams

# SplitMix64: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014).
GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_WORD = (1 << 64) - 1
# 48 bits: u < 1 survives multiplication by a float64 total, so the last token is never overrun.
_UNIFORM_BITS = 48
# From this vocabulary on, sums over blocks replace most of the (sequential) cumulative sum.
_BLOCKED_VOCAB = 1024
_BLOCK = 64


def splitmix64(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer on uint64 words (wrapping arithmetic)."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def _words(keys: Sequence[Sequence[int]]) -> np.ndarray:
    """Key components as uint64 words, modulo 2**64."""
    try:
        return np.asarray(keys, dtype=np.int64).astype(np.uint64)
    except OverflowError:
        return np.asarray([[part & _WORD for part in key] for key in keys], dtype=np.uint64)


def uniform_words(keys: Sequence[Sequence[int]], num_positions: int) -> np.ndarray:
    """64 random bits per (key, position), independent of every other row.

    Each key is hashed to the state of a SplitMix64 stream; position t is its t-th output.

    Args:
        keys: N tuples of integers, such as (seed, row, sample, visit).
        num_positions: T, the number of positions from 0 on.

    Returns:
        (N, T) uint64.
    """
    words = _words(keys)
    state = np.full(len(words), GOLDEN_GAMMA)
    for column in range(words.shape[1]):
        state = splitmix64((state ^ words[:, column]) + GOLDEN_GAMMA)
    counters = np.arange(1, num_positions + 1, dtype=np.uint64) * GOLDEN_GAMMA
    return splitmix64(state[:, None] + counters[None, :])


def uniforms(keys: Sequence[Sequence[int]], num_positions: int) -> np.ndarray:
    """One uniform per (key, position): the upper bits of `uniform_words`.

    Args:
        keys: N tuples (seed, row, sample, visit) of integers.
        num_positions: T, the number of positions from 0 on.

    Returns:
        (N, T) float64 in [0, 1), multiples of 2**-48.
    """
    bits = uniform_words(keys, num_positions) >> np.uint64(64 - _UNIFORM_BITS)
    return bits.astype(np.float64) * 2.0**-_UNIFORM_BITS


def filter_logits(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Removes what top-k, then top-p leave out; the only place that sorts.

    Top-p keeps the smallest set of most probable tokens whose mass, after top-k, reaches
    `top_p`; at least one token stays. Equal logits are ranked by token id.

    Args:
        logits: (B, V) float32, already divided by the temperature.
        top_k: Number of tokens to keep, 0 = all.
        top_p: Mass to keep, 1 = all.

    Returns:
        (B, V) float32 with -inf where a token was removed.
    """
    ordered, order = torch.sort(logits, dim=-1, descending=True, stable=True)
    if top_k:
        ordered[:, top_k:] = -torch.inf
    if top_p < 1.0:
        probs = torch.softmax(ordered, dim=-1)
        mass_before = probs.cumsum(-1, dtype=torch.float64) - probs
        ordered.masked_fill_(mass_before >= top_p, -torch.inf)
    return torch.empty_like(logits).scatter_(-1, order, ordered)


def invert_cdf(probs: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """The token at which the cumulative sum, in vocabulary order, first exceeds u.

    A token of probability 0 is never returned. Cumulative sums are float64. Where probabilities
    are NaN the last token is returned: an index behind it would end a GPU's process.

    Args:
        probs: (B, V) float32, not necessarily summing to exactly 1.
        u: (B,) float64 in [0, 1).

    Returns:
        (B,) int64 token ids.
    """
    size = probs.shape[-1]
    if size < _BLOCKED_VOCAB:
        cumulative = probs.cumsum(-1, dtype=torch.float64)
        target = (u * cumulative[:, -1]).unsqueeze(-1)
        return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp_(max=size - 1)
    if size % _BLOCK:
        probs = torch.nn.functional.pad(probs, (0, -size % _BLOCK))
    blocks = probs.view(len(probs), -1, _BLOCK)
    cumulative = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
    target = (u * cumulative[:, -1]).unsqueeze(-1)
    block = torch.searchsorted(cumulative, target, right=True).clamp_(max=blocks.shape[1] - 1)
    before = cumulative.gather(-1, (block - 1).clamp_(min=0)).where(block > 0, 0.0)
    index = block.unsqueeze(-1).expand(-1, -1, _BLOCK)
    inside = blocks.gather(1, index).squeeze(1).cumsum(-1, dtype=torch.float64)
    # The float32 sum of a block may exceed its float64 one in the last digits.
    rest = torch.minimum(target - before, inside[:, -1:] * (1.0 - 2.0**-_UNIFORM_BITS))
    token = block * _BLOCK + torch.searchsorted(inside, rest, right=True)
    return token.squeeze(-1).clamp_(max=size - 1)


def sample(
    logits: torch.Tensor, u: torch.Tensor, params: SamplingParams
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Draws one token per row.

    Args:
        logits: (B, V), any floating type; may be overwritten.
        u: (B,) float64 uniforms in [0, 1); unused if greedy.
        params: How to sample.

    Returns:
        tokens (B,) int64, logps (B,) float32 under the distribution sampled from, and its
        entropies (B,) float32 in nats (None unless asked for).
    """
    logits = logits.float()
    if (params.top_k or params.top_p < 1.0) and not params.greedy:
        logits = filter_logits(logits / params.temperature, params.top_k, params.top_p)
        params = replace(params, temperature=1.0)
    return _draw_compiled(logits, u, params) if logits.is_cpu else draw(logits, u, params)


def draw(
    logits: torch.Tensor, u: torch.Tensor, params: SamplingParams
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Draws in plain PyTorch, on any device, from logits in float32; as `sample`, unfiltered.

    A row whose logits are not finite has NaN as its logp; `check_logps` refuses it. (To look here
    would let the host wait for the device.)
    """
    if not params.greedy and params.temperature != 1.0:
        logits = logits / params.temperature
    probs = torch.softmax(logits, dim=-1)
    tokens = logits.argmax(-1) if params.greedy else invert_cdf(probs, u)
    logps = probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).log_()
    entropies = torch.special.entr(probs).sum(-1) if params.entropy else None
    return tokens, logps, entropies


def _draw_compiled(
    logits: torch.Tensor, u: torch.Tensor, params: SamplingParams
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Draws in one pass on CPU; as `draw`."""
    from rllib_distrl.engine.kernels import kernels  # Numba: imported by who samples

    rows = len(logits)
    tokens, logps = torch.empty(rows, dtype=torch.int64), torch.empty(rows)
    entropies = torch.empty(rows if params.entropy else 0)
    temperature = np.float32(1.0 if params.greedy else params.temperature)
    arrays = (tensor.numpy() for tensor in (tokens, logps, entropies))
    uniforms = u.contiguous().numpy()
    bad = kernels().draw(logits.contiguous().numpy(), uniforms, temperature, params.greedy, *arrays)
    if bad >= 0:
        raise _diverged(bad)
    return tokens, logps, entropies if params.entropy else None


def check_logps(logps: np.ndarray) -> None:
    """Refuses what was drawn from logits that are not finite.

    Args:
        logps: (B,), of `sample`.

    Raises:
        RuntimeError: With the first such row.
    """
    bad = np.flatnonzero(np.isnan(logps))
    if len(bad):
        raise _diverged(int(bad[0]))


def _diverged(row: int) -> RuntimeError:
    return RuntimeError(
        f"The logits of row {row} are not finite: the weights have diverged. "
        "Lower the learning rate."
    )
