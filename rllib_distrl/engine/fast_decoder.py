"""A decoder for Qwen2, Qwen3 and Llama in PyTorch's operators, with a static key-value cache.

Any device, float32 or bfloat16; float32 on CPU has a faster one, `compiled_decoder`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from rllib_distrl.engine.fast_weights import FastWeights, rotary_table, shape_of, unsupported
from rllib_distrl.engine.kv_cache import KVCache

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Prompts are computed in chunks of about this many tokens, which bounds activations.
_PREFILL_TOKENS = 16384
# The table of rotations grows by at least this many positions at a time.
_POSITION_STEP = 64

Prompt = tuple[int, ...]
# (layer, rotated and scaled queries (N, heads, D), rotated keys and values (N, 2, kv_heads, D))
# to weighted values (N, heads * D).
Attend = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]


class FastDecoder:
    """Static-cache decoder. Rows are 0 … n - 1; new rows are appended after them.

    Args:
        config: A Qwen2, Qwen3 or Llama config.
        device: Where weights and cache live.
        dtype: float32 or bfloat16; rotations and norms are computed in float32.

    Raises:
        ValueError: A config that this decoder does not compute.
    """

    joins_midway = True
    row_step = 16
    # Closing the gaps costs about a tenth of a step.
    shrink_share = 0.0625

    def __init__(self, config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> None:
        reason = unsupported(config)
        if reason:
            raise ValueError(f'The fast decoder cannot run this model: {reason}. Use "generic".')
        self.config, self.device, self.dtype = config, device, dtype
        self.shape = s = shape_of(config)
        self.weights = FastWeights(s, device, dtype)
        self._rotations = torch.empty(0, 3, 1, device=device, dtype=torch.complex64)
        # Which of the three rotations each head has.
        counts = torch.tensor([s.heads, s.kv_heads, s.kv_heads])
        self._kinds = torch.arange(3).repeat_interleave(counts).to(device)
        self.cache = KVCache(s.layers, s.kv_heads, s.head_dim, device, dtype)
        self.close()

    def canonical(self) -> Mapping[str, torch.Tensor]:
        """Hugging Face names to views whose row-major order is that of the named tensor."""
        return self.weights.views

    def shapes(self) -> Mapping[str, torch.Size]:
        """Hugging Face names to Hugging Face shapes."""
        return self.weights.shapes

    def open(self, batch: int, width: int, length: int) -> None:
        """Starts empty.

        Args:
            batch: Most rows at a time.
            width: Longest prompt that will be admitted, in tokens.
            length: Longest prompt and completion together, in tokens.
        """
        self.close()
        self.cache.open(batch, width, length)
        if len(self._rotations) < length:
            table = rotary_table(self.config, length + _POSITION_STEP, self.device)
            # Queries carry the scale of the scores; values are not rotated.
            parts = (table * self.shape.head_dim**-0.5, table, torch.ones_like(table))
            self._rotations = torch.stack(parts, dim=1)

    def close(self) -> None:
        """Forgets all rows."""
        self.cache.close()
        self._kept: tuple[Prompt, torch.Tensor, torch.Tensor] | None = None

    def admit(self, prompts: Sequence[Prompt], index: np.ndarray) -> torch.Tensor:
        """Appends rows; each distinct prompt is computed once.

        Args:
            prompts: U distinct prompts.
            index: (n,) which of them each new row continues, in rising order.

        Returns:
            (n, V) logits of the token after each row's prompt.
        """
        logits, done = [], 0
        while done < len(prompts):
            chunk, kv, last = self._prefill_next(prompts[done:])
            here = index[(index >= done) & (index < done + chunk)]
            which = torch.from_numpy(here - done).to(self.device)
            lengths = np.array([len(prompts[i]) for i in here], dtype=np.int64)
            self.cache.append(kv.index_select(3, which), lengths)
            logits.append(last.index_select(0, which))
            done += chunk
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def keep(self, rows: np.ndarray) -> None:
        """Makes old row rows[i] the new row i and drops the others."""
        self.cache.keep(rows)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Appends one token to every row.

        Args:
            tokens: (n,) int64.

        Returns:
            (n, V) logits of the token after it.
        """
        # Finished rows that still wait to be dropped may run past the last position.
        positions = np.minimum(self.cache.positions(), len(self._rotations) - 1)
        rotations = self._rotations.index_select(0, torch.from_numpy(positions).to(self.device))
        x = self.weights.embed.index_select(0, tokens)
        x = self._layers(x, rotations, self._attend)
        self.cache.advance()
        return self._logits(x)

    def _attend(self, layer: int, query: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """One query per row against the columns in use."""
        self.cache.target(layer).copy_(kv.transpose(0, 1))
        keys, values, mask = self.cache.used(layer)
        out = F.scaled_dot_product_attention(
            query.unsqueeze(2),
            keys.permute(1, 2, 0, 3),
            values.permute(1, 2, 0, 3),
            None if mask is None else mask.permute(1, 2, 0).unsqueeze(1),
            scale=1.0,
            enable_gqa=self.shape.heads != self.shape.kv_heads,
        )
        return out.view(len(query), -1)

    def _layers(self, x: torch.Tensor, rotations: torch.Tensor, attend: Attend) -> torch.Tensor:
        """All layers.

        Args:
            x: (N, H) embeddings; overwritten.
            rotations: (N, 3, D / 2) complex, of queries, keys and values.
            attend: What becomes of the projections.

        Returns:
            (N, H) before the last norm.
        """
        s, n = self.shape, len(x)
        rotations = rotations.index_select(1, self._kinds)
        for w in self.weights.layers:
            qkv = F.linear(self._norm(x, w.norm_in), w.qkv, w.qkv_bias)
            if w.q_norm is not None and w.k_norm is not None:
                self._normalise(qkv, w.q_norm, w.k_norm)
            pairs = qkv.float().view(torch.complex64).view(n, -1, s.head_dim // 2)
            turned = pairs.mul_(rotations).view(torch.float32).to(self.dtype)
            q, kv = turned.split((s.heads, 2 * s.kv_heads), 1)
            _add_linear(x, attend(w.index, q, kv.view(n, 2, s.kv_heads, -1)), w.out, w.out_bias)
            gate, up = F.linear(self._norm(x, w.norm_post), w.gate_up, w.gate_up_bias).chunk(2, -1)
            _add_linear(x, F.silu(gate).mul_(up), w.down, w.down_bias)
        return x

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, self.shape.eps)

    def _normalise(self, qkv: torch.Tensor, q_norm: torch.Tensor, k_norm: torch.Tensor) -> None:
        """Qwen3's norms of every query and key head, in place."""
        s = self.shape
        heads = qkv.view(len(qkv), -1, s.head_dim)
        q, k = heads[:, : s.heads], heads[:, s.heads : s.qk_heads]
        q.copy_(F.rms_norm(q, (s.head_dim,), q_norm, s.eps))
        k.copy_(F.rms_norm(k, (s.head_dim,), k_norm, s.eps))

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self._norm(x, self.weights.norm), self.weights.head)

    def _prefill_next(self, prompts: Sequence[Prompt]) -> tuple[int, torch.Tensor, torch.Tensor]:
        """Computes the next prompts, about _PREFILL_TOKENS tokens; remembers the last one.

        Returns:
            How many prompts (U), their keys and values (layers, 2, P, U, kv_heads, D) aligned
            to the right, and the logits (U, V) after each.
        """
        if self._kept is not None and self._kept[0] == prompts[0]:
            return 1, self._kept[1], self._kept[2]
        width = chunk = 0
        for prompt in prompts:
            if chunk and (chunk + 1) * max(width, len(prompt)) > _PREFILL_TOKENS:
                break
            width, chunk = max(width, len(prompt)), chunk + 1
        kv, logits = self._prefill(prompts[:chunk], width)
        last = prompts[chunk - 1]
        self._kept = (last, kv[:, :, -len(last) :, -1:].clone(), logits[-1:].clone())
        return chunk, kv, logits

    def _prefill(self, prompts: Sequence[Prompt], width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys, values and last logits of left-padded prompts, as `_prefill_next` returns them."""
        s, count = self.shape, len(prompts)
        starts = torch.tensor([width - len(p) for p in prompts])
        columns = torch.arange(width)
        ragged = bool(starts.any())
        mask = self._prefill_mask(starts, width) if ragged else None
        cache = self.cache.allocate(width, count)

        def attend(layer: int, query: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
            kv = kv.view(count, width, 2, s.kv_heads, s.head_dim)
            cache[layer].copy_(kv.permute(2, 1, 0, 3, 4))
            keys_values = cache[layer].permute(0, 2, 3, 1, 4)
            if ragged and self.device.type == "cuda":  # No kernel takes a mask and shared heads.
                keys_values = keys_values.repeat_interleave(s.heads // s.kv_heads, 2)
            out = F.scaled_dot_product_attention(
                query.view(count, width, s.heads, s.head_dim).transpose(1, 2),
                *keys_values,
                attn_mask=mask,
                is_causal=not ragged,
                scale=1.0,
                enable_gqa=keys_values.shape[2] != s.heads,
            )
            return out.transpose(1, 2).reshape(count * width, -1)

        ids = [token for p in prompts for token in ((0,) * (width - len(p)) + p)]
        positions = (columns - starts[:, None]).clamp_(min=0).view(-1).to(self.device)
        x = self.weights.embed[torch.tensor(ids).to(self.device)]
        x = self._layers(x, self._rotations.index_select(0, positions), attend)
        return cache, self._logits(x.view(count, width, -1)[:, -1].contiguous())

    def _prefill_mask(self, starts: torch.Tensor, width: int) -> torch.Tensor:
        """(U, 1, P, P) bool, True where a query may look, for prompts that start at `starts`."""
        columns = torch.arange(width)
        allowed = (columns >= starts[:, None, None]) & (columns <= columns[:, None])
        # A padding query sees itself: without any key it would be NaN and poison the cache.
        return (allowed | torch.eye(width, dtype=torch.bool))[:, None].to(self.device)


def _add_linear(
    x: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """Adds a linear layer's output to x in place, in the product's own kernel."""
    x.addmm_(inputs, weight.t())
    if bias is not None:
        x.add_(bias)
