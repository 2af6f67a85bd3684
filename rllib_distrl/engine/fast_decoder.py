"""A decoder for Qwen2, Qwen3 and Llama in PyTorch's operators: the engine of GPUs.

A step of a small model is hundreds of kernels of microseconds each, which takes longer to launch
than to run. On CUDA a step and its draw are therefore recorded once as a graph, and replayed:
everything that changes from step to step (columns, tokens, uniforms) lies in tensors of fixed
address on the device, and the host looks at what was drawn every `ahead` steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from rllib_distrl.engine.fast_weights import FastWeights, rotary_table, shape_of, unsupported
from rllib_distrl.engine.kv_cache import KVCache
from rllib_distrl.engine.protocol import SamplingParams
from rllib_distrl.engine.sampling import sample

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Prompts are computed in chunks of about this many tokens, which bounds activations.
PREFILL_TOKENS = 16384
# The table of rotations grows by at least this many positions at a time.
_POSITION_STEP = 64
# Graphs are recorded for multiples of so many rows, and for powers of two below.
_ROW_STEP = 64

Prompt = tuple[int, ...]
# (layer, rotated and scaled queries (N, heads, D), rotated keys and values (N, 2, kv_heads, D))
# to weighted values (N, heads * D).
Attend = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]


class FastDecoder:
    """Draws by itself, several tokens at a time. Rows are 0 … n - 1; new rows come after them.

    Args:
        config: A Qwen2, Qwen3 or Llama config.
        device: Where weights and cache live.
        dtype: float32 or bfloat16; rotations and norms are computed in float32.

    Attributes:
        records: Whether steps become CUDA graphs; elsewhere the same operators are launched.

    Raises:
        ValueError: A config that this decoder does not compute.
    """

    joins_midway = True
    row_step = _ROW_STEP
    # Fewer rows are another graph, and a finished row costs little beside the weights' traffic.
    shrink_share = 0.25
    ahead = 8
    """Tokens that are drawn before the host looks at them."""

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
        self.records = device.type == "cuda"
        # PyTorch's flash attention reads each row as far as it goes; float32 it does not take.
        self.flash = device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)
        self._make_buffers(0)
        self._graphs: dict[tuple[int, SamplingParams], torch.cuda.CUDAGraph] = {}
        self._recent: list[SamplingParams] = []
        self._recorded_for: tuple[int, ...] = ()
        # The graphs' memory: one of them runs at a time.
        self._pool: Any = None
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
        batch = _padded(batch)
        self.cache.open(batch, width, length)
        if len(self._tokens) < batch:
            self._make_buffers(batch)
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

    def _make_buffers(self, batch: int) -> None:
        size, device = (self.ahead, batch), self.device
        self._tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        self._uniforms = torch.zeros(size, dtype=torch.float64, device=device)
        self._drawn = torch.zeros(size, dtype=torch.int64, device=device)
        # Logps, then entropies.
        self._numbers = torch.zeros(2, *size, device=device)
        self._slot = torch.zeros(1, dtype=torch.int64, device=device)
        self._rows = torch.arange(batch + 1, device=device)

    def draw(
        self, tokens: torch.Tensor, uniforms: np.ndarray, params: SamplingParams
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Appends a token to every row and draws the next, as often as there are uniforms.

        Args:
            tokens: (n,) int64, appended first.
            uniforms: (K, n), K at most `ahead`.
            params: How to sample.

        Returns:
            (K, n) tokens, their logps, and entropies if asked for.
        """
        steps, n = uniforms.shape
        rows = _padded(n)
        self.cache.make_room(steps)
        self._forget_stale_graphs()
        self._tokens[:n] = tokens
        self._uniforms[:steps, :n] = torch.from_numpy(uniforms).to(self.device)
        self._slot.zero_()
        for _ in range(steps):
            self._replay(rows, params)
        self.cache.passed(steps)
        drawn = self._drawn[:steps, :n].cpu().numpy()
        logps, *entropies = self._numbers[: 1 + params.entropy, :steps, :n].cpu().numpy()
        return drawn, logps, entropies[0] if params.entropy else None

    def _forget_stale_graphs(self) -> None:
        """Graphs hold addresses: other tensors need other graphs."""
        tensors = (self.cache.data, self._rotations, self._tokens)
        addresses = tuple(tensor.data_ptr() for tensor in tensors)
        if addresses != self._recorded_for:
            self._graphs.clear()
            self._recorded_for = addresses
            # A pool ends with its last graph.
            self._pool = torch.cuda.graph_pool_handle() if self.records else None

    def _replay(self, rows: int, params: SamplingParams) -> None:
        """One step and its draw; the first of its kind runs as it is, and is then recorded."""
        key = (rows, replace(params, max_tokens=1))
        # A temperature that moves records anew; of what was recorded, two kinds stay: the batch's
        # and the probes'.
        self._recent = [key[1], *(kind for kind in self._recent if kind != key[1])][:2]
        if key in self._graphs:
            self._graphs[key].replay()
            return
        self._advance(rows, params)
        if self.records:
            graph = torch.cuda.CUDAGraph()
            # Other threads of the process may go on using the device.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                self._advance(rows, params)
            self._graphs[key] = graph
            self._graphs = {k: g for k, g in self._graphs.items() if k[1] in self._recent}

    def _advance(self, rows: int, params: SamplingParams) -> None:
        """Reads and writes nothing but tensors of fixed address, and asks the device nothing."""
        starts, columns = self.cache.starts[:rows], self.cache.columns[:rows]
        positions = (columns - starts).clamp_(max=len(self._rotations) - 1)
        rotations = self._rotations.index_select(0, positions)
        attend = (self._flash_attention if self.flash else self._attention)(rows, starts, columns)
        x = self.weights.embed.index_select(0, self._tokens[:rows])
        logits = self._logits(self._layers(x, rotations, attend))
        uniforms = self._uniforms.index_select(0, self._slot)[0, :rows]
        tokens, logps, entropies = sample(logits, uniforms, params)
        self._drawn[:, :rows].index_copy_(0, self._slot, tokens[None])
        self._numbers[0, :, :rows].index_copy_(0, self._slot, logps[None])
        if entropies is not None:
            self._numbers[1, :, :rows].index_copy_(0, self._slot, entropies[None])
        self._tokens[:rows].copy_(tokens)
        self._slot.add_(1)
        columns.add_(1).clamp_(max=self.cache.data.shape[3] - 1)

    def _write(self, layer: int, places: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """Puts the tokens' keys and values into the cache; a layer's, (2, rows, columns, ...)."""
        cache = self.cache.data[layer]
        cache.flatten(1, 2).index_copy_(1, places, kv.transpose(0, 1))
        return cache

    def _attention(self, rows: int, starts: torch.Tensor, columns: torch.Tensor) -> Attend:
        """Attention over the whole width of the cache, with a mask."""
        s, width = self.shape, self.cache.data.shape[3]
        places = self._rows[:rows] * width + columns
        column = torch.arange(width, device=self.device)
        hidden = (column < starts[:, None]) | (column > columns[:, None])
        mask = torch.zeros(hidden.shape, device=self.device, dtype=self.dtype)
        mask = mask.masked_fill_(hidden, -torch.inf)[:, None, None]

        def attend(layer: int, query: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
            keys, values = self._write(layer, places, kv)[:, :rows].transpose(2, 3)
            # The queries that share a key head stand where a sequence has its tokens.
            query = query.view(rows, s.kv_heads, -1, s.head_dim)
            out = F.scaled_dot_product_attention(query, keys, values, mask, scale=1.0)
            return out.reshape(rows, -1)

        return attend

    def _flash_attention(self, rows: int, starts: torch.Tensor, columns: torch.Tensor) -> Attend:
        """Attention of rows of unequal length, each read from its start to its column."""
        s, width = self.shape, self.cache.data.shape[3]
        begins = self._rows[: rows + 1] * width
        places = begins[:rows] + columns
        begins[:rows] += starts
        # The queries that share a key head stand where a sequence has its tokens: read once.
        shared = s.heads // s.kv_heads
        of_keys, of_queries = begins.int(), (self._rows[: rows + 1] * shared).int()
        lengths = (columns - starts + 1).int()

        def attend(layer: int, query: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
            keys, values = self._write(layer, places, kv).flatten(1, 2)
            query = query.view(rows, s.kv_heads, shared, -1).transpose(1, 2).flatten(0, 1)
            out = torch.ops.aten._flash_attention_forward(
                query, keys, values, of_queries, of_keys, shared, width, 0.0, False, False,
                scale=1.0, seqused_k=lengths,
            )[0]  # fmt: skip
            return out.view(rows, shared, s.kv_heads, -1).transpose(1, 2).reshape(rows, -1)

        return attend

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
        """Computes the next prompts, about PREFILL_TOKENS tokens; remembers the last one.

        Returns:
            How many prompts (U), their keys and values (layers, 2, P, U, kv_heads, D) aligned
            to the right, and the logits (U, V) after each.
        """
        if self._kept is not None and self._kept[0] == prompts[0]:
            return 1, self._kept[1], self._kept[2]
        width = chunk = 0
        for prompt in prompts:
            if chunk and (chunk + 1) * max(width, len(prompt)) > PREFILL_TOKENS:
                break
            width, chunk = max(width, len(prompt)), chunk + 1
        kv, logits = self.prefill(prompts[:chunk], width)
        last = prompts[chunk - 1]
        self._kept = (last, kv[:, :, -len(last) :, -1:].clone(), logits[-1:].clone())
        return chunk, kv, logits

    def prefill(self, prompts: Sequence[Prompt], width: int) -> tuple[torch.Tensor, torch.Tensor]:
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


def _padded(rows: int) -> int:
    """Rows of the graph that computes so many."""
    if rows >= _ROW_STEP:
        return -(-rows // _ROW_STEP) * _ROW_STEP
    return 1 << (rows - 1).bit_length()
