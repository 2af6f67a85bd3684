"""The fast decoder for GPUs: a step and its draw are one CUDA graph, replayed several times.

A step of a small model is hundreds of kernels of microseconds each, which takes longer to launch
than to run. Everything that changes from step to step (columns, tokens, uniforms) therefore lies
in tensors of fixed address on the device, and the host looks at what was drawn every `ahead` steps.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from rllib_distrl.engine.fast_decoder import Attend, FastDecoder
from rllib_distrl.engine.protocol import SamplingParams
from rllib_distrl.engine.sampling import sample

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# The cache has and grows by multiples of so many columns, which suits attention with a mask.
_COLUMN_STEP = 64
# Columns behind the prompts that the cache begins with.
_FIRST = 512
# The cache grows by at least this share: every growth records the graphs anew.
_GROWTH = 0.5
# Graphs are recorded for multiples of so many rows, and for powers of two below.
_ROW_STEP = 64


class RowCache:
    """Keys and values of rows that each count their own columns, on the device.

    A prompt ends before column `width`, whenever its row joined.

    Attributes:
        data: (layers, 2, rows, columns, heads, head_dim), keys before values.
        starts: (rows,) int64, the first column of each row's prompt.
        columns: (rows,) int64, the column of each row's next token.
        rows: How many rows are in use, the first ones.

    Args:
        layers: Number of layers.
        heads: Key heads per layer.
        head_dim: Width of a head.
        device: Where it lives.
        dtype: Type of keys and values.
    """

    def __init__(
        self, layers: int, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._layers, self._heads = layers, (heads, head_dim)
        self._device, self._dtype = device, dtype
        self.data = self._zeros(0, 0)
        self.starts = self.columns = torch.zeros(0, dtype=torch.int64, device=device)
        self.close()

    def _zeros(self, *size: int) -> torch.Tensor:
        size = (self._layers, 2, *size, *self._heads)
        return torch.zeros(size, device=self._device, dtype=self._dtype)

    def allocate(self, columns: int, batch: int) -> torch.Tensor:
        """Zeros of shape (layers, 2, columns, batch, heads, head_dim), for prompts."""
        return self._zeros(columns, batch)

    def open(self, batch: int, width: int, length: int) -> None:
        """Empties the cache and makes room.

        Args:
            batch: Most rows at a time.
            width: Longest prompt, in tokens.
            length: Longest prompt and completion together, in tokens.
        """
        self.close()
        self._width, self._length = width, length
        rows, columns = self.data.shape[2:4]
        if rows < batch:
            self.data = self._zeros(0, 0)  # Frees before it takes.
            self.data = self._zeros(batch, max(columns, _whole(min(length, width + _FIRST))))
            self.starts, self.columns = (
                torch.zeros(batch, dtype=torch.int64, device=self._device) for _ in range(2)
            )
        self.make_room(1)

    def close(self) -> None:
        """Forgets all rows; the memory is kept."""
        self.rows = self._width = self._length = 0
        # Where each row's column is, or beyond: known without asking the device.
        self._reached = np.zeros(0, dtype=np.int64)

    def append(self, kv: torch.Tensor, lengths: np.ndarray) -> None:
        """Adds rows with their prompts.

        Args:
            kv: (layers, 2, P, rows, heads, head_dim), aligned to the right.
            lengths: (rows,) prompt lengths, at most P.
        """
        columns, rows = kv.shape[2:4]
        new = slice(self.rows, self.rows + rows)
        self.data[:, :, new, self._width - columns : self._width] = kv.transpose(2, 3)
        self.starts[new] = self._width - torch.from_numpy(lengths).to(self._device)
        self.columns[new] = self._width
        self._reached = np.concatenate((self._reached, np.full(rows, self._width)))
        self.rows += rows

    def keep(self, rows: np.ndarray) -> None:
        """Makes old row rows[i] the new row i and drops the others."""
        moved = np.nonzero(rows != np.arange(len(rows)))[0]
        if len(moved):
            source = torch.from_numpy(rows[moved]).to(self._device)
            target = torch.from_numpy(moved).to(self._device)
            live = self.data[:, :, :, : int(self._reached[rows].max())]
            live.index_copy_(2, target, live.index_select(2, source))
            for counts in (self.starts, self.columns):
                counts.index_copy_(0, target, counts.index_select(0, source))
        self._reached = self._reached[rows]
        self.rows = len(rows)

    def make_room(self, steps: int) -> None:
        """Grows if the next steps need it; finished rows may pass the end, where they stay."""
        reached = max(self._width, int(self._reached.max(initial=0)))
        needed = min(reached + steps, self._length)
        columns = self.data.shape[3]
        if needed > columns:
            more = max(needed, columns + min(int(_GROWTH * columns), self._length - columns))
            old, self.data = self.data, self._zeros(self.data.shape[2], _whole(more))
            self.data[:, :, :, :columns] = old

    def passed(self, steps: int) -> None:
        """Notes that every row has gone on by so many columns."""
        self._reached += steps


class GraphDecoder(FastDecoder):
    """As `FastDecoder`, and draws by itself, several tokens at a time.

    On a CPU the same steps run without a graph.
    """

    row_step = _ROW_STEP
    # Fewer rows are another graph, and a finished row costs little beside the weights' traffic.
    shrink_share = 0.25
    ahead = 8
    """Tokens that are drawn before the host looks at them."""

    def __init__(self, config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(config, device, dtype)
        s = self.shape
        self.cache: RowCache = RowCache(s.layers, s.kv_heads, s.head_dim, device, dtype)  # pyright: ignore[reportIncompatibleVariableOverride]
        # PyTorch's flash attention reads each row as far as it goes; float32 it does not take.
        self.flash = device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)
        self._make_buffers(0)
        self._graphs: dict[tuple[int, SamplingParams], torch.cuda.CUDAGraph] = {}
        self._recorded_for: tuple[int, ...] = ()
        # The graphs' memory: one of them runs at a time.
        self._pool: tuple[int, int] | None = None

    def open(self, batch: int, width: int, length: int) -> None:
        """Starts empty; see `FastDecoder.open`."""
        super().open(_padded(batch), width, length)
        if len(self._tokens) < _padded(batch):
            self._make_buffers(_padded(batch))

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
            self._pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    def _replay(self, rows: int, params: SamplingParams) -> None:
        """One step and its draw; the first of its kind runs as it is, and is then recorded."""
        key = (rows, replace(params, max_tokens=1))
        if key in self._graphs:
            self._graphs[key].replay()
            return
        self._advance(rows, params)
        if self.device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            # Other threads of the process may go on using the device.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                self._advance(rows, params)
            self._graphs[key] = graph

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


def _whole(columns: int) -> int:
    return -(-columns // _COLUMN_STEP) * _COLUMN_STEP


def _padded(rows: int) -> int:
    """Rows of the graph that computes so many."""
    if rows >= _ROW_STEP:
        return -(-rows // _ROW_STEP) * _ROW_STEP
    return 1 << (rows - 1).bit_length()
