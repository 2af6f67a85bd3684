"""A decoder for Qwen2, Qwen3 and Llama on CPU: BLAS and compiled kernels.

In bfloat16 products take and give bfloat16 and add in float32 (AMX or AVX-512 where the processor
has them); the residual stream, norms and attention are float32. NumPy knows bfloat16 as uint16.

Prompts and completions go the same way: a batch of tokens, each with its sequence and its
position. Rows may have any length, and join and leave at any time at no cost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch

from rllib_distrl.engine.fast_weights import (
    FastWeights,
    LayerWeights,
    Shape,
    rotary_table,
    shape_of,
    unsupported,
)
from rllib_distrl.engine.kernels import PAGE, kernels
from rllib_distrl.engine.lanes import LANES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# The cache grows by at least this share of its pages.
_GROWTH = 0.5
# Bytes of a cache line: a vector that begins elsewhere is read twice.
_LINE = 64


def pages_of(tokens):
    """Pages that so many tokens (a number or an array) fill or begin."""
    return -(-tokens // PAGE)


def aligned_zeros(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Zeros that begin at a cache line; memory is taken as it is written to."""
    size, item = math.prod(shape), dtype.itemsize
    raw = torch.from_numpy(np.zeros(size * item + _LINE, dtype=np.uint8))
    first = -raw.data_ptr() % _LINE
    return raw[first : first + size * item].view(dtype).view(*shape)


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """The same memory for kernels: bfloat16 as uint16."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


class PagedCache:
    """Keys and values of sequences on CPU.

    Attributes:
        keys: (layers, pages · kv_heads · D · 16), a layer's in the order that `kernels.attend` has.
        values: (layers, pages · kv_heads · 16 · D), likewise.
        users: (pages,) int64, how many sequences hold each page; 0 where it is free.

    Args:
        layers: Number of layers.
        heads: Key heads per layer.
        head_dim: Width D of a head.
        dtype: Of keys and values, float32 or bfloat16.
    """

    def __init__(self, layers: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
        self._size, self._dtype = heads * head_dim * PAGE, dtype
        self.keys, self.values = (as_array(aligned_zeros((layers, 0), dtype)) for _ in range(2))
        self.users = np.zeros(0, dtype=np.int64)
        self.clear()

    def clear(self) -> None:
        """Forgets all sequences; the memory is kept."""
        self.users[:] = 0
        self._free = np.arange(len(self.users))[::-1]

    def take(self, count: int) -> np.ndarray:
        """(count,) int64 pages, each with one user."""
        if count > len(self._free):
            self._grow(max(count - len(self._free), int(_GROWTH * len(self.users))))
        left = len(self._free) - count
        pages, self._free = self._free[left:][::-1], self._free[:left]
        self.users[pages] = 1
        return pages

    def share(self, pages: np.ndarray, users: int) -> None:
        """Counts so many further users of each page."""
        self.users[pages] += users

    def drop(self, pages: np.ndarray) -> None:
        """Ends one use for every mention of a page."""
        np.subtract.at(self.users, pages, 1)
        mentioned = np.unique(pages)
        self._free = np.concatenate((self._free, mentioned[self.users[mentioned] == 0]))

    def copy(self, page: int, to: np.ndarray) -> None:
        """Copies a page of every layer to others."""
        for data in (self.keys, self.values):
            pages = data.reshape(len(data), -1, self._size)
            pages[:, to] = pages[:, page : page + 1]

    def _grow(self, pages: int) -> None:
        old = len(self.users)
        self.keys, self.values = (
            self._grown(data, (old + pages) * self._size) for data in (self.keys, self.values)
        )
        self.users = np.concatenate((self.users, np.zeros(pages, dtype=np.int64)))
        self._free = np.concatenate((np.arange(old, old + pages)[::-1], self._free))

    def _grown(self, data: np.ndarray, size: int) -> np.ndarray:
        new = as_array(aligned_zeros((len(data), size), self._dtype))
        new[:, : data.shape[1]] = data
        return new


# Prompts are computed in chunks of this many tokens: their activations stay in a core's cache.
PREFILL_TOKENS = 256
# The table of rotations grows by at least this many positions at a time.
_POSITION_STEP = 64

_NAMES: Mapping[torch.dtype, Literal["float32", "bfloat16"]] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
}

Prompt = tuple[int, ...]


class Parked(NamedTuple):
    """Pages that hold the first `length` tokens of a row that is to go on."""

    pages: np.ndarray
    length: int


def not_compiled(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the compiled decoder cannot run this, or None if it can."""
    if device.type != "cpu" or dtype not in _NAMES:
        return f"it is compiled for {' and '.join(_NAMES.values())} on CPU, not {dtype} on {device}"
    reason = unsupported(config)
    if reason is None and shape_of(config).head_dim % LANES:
        return f"heads of {shape_of(config).head_dim} are no multiple of {LANES}"
    return reason


class _Layer:
    """One layer's tensors: matrices (in, out) for BLAS, vectors as arrays for the kernels."""

    def __init__(self, weights: LayerWeights) -> None:
        w, none = weights, weights.norm_in.new_zeros(0)
        self.qkv, self.out = w.qkv.t(), w.out.t()
        self.gate_up, self.down = w.gate_up.t(), w.down.t()
        self.norm_in, self.norm_post = as_array(w.norm_in), as_array(w.norm_post)
        self.qkv_bias = _bias(w.qkv_bias, self.qkv)
        self.gate_bias = _bias(w.gate_up_bias, self.gate_up).reshape(2, -1)
        self.out_bias, self.down_bias = w.out_bias, w.down_bias
        self.q_norm = as_array(none if w.q_norm is None else w.q_norm)
        self.k_norm = as_array(none if w.k_norm is None else w.k_norm)


def _bias(bias: torch.Tensor | None, matrix: torch.Tensor) -> np.ndarray:
    return as_array(matrix.new_zeros(matrix.shape[1]) if bias is None else bias)


class _Buffers:
    """Activations of N tokens: tensors for BLAS, and the same memory as arrays for the kernels."""

    def __init__(self, shape: Shape, memory: Sequence[torch.Tensor], tokens: int) -> None:
        self.rows = np.arange(tokens)
        tensors = [whole[:tokens] for whole in memory]
        self.x, self.normed, self.qkv, self.attended, self.gate_up, self.gated, self.product = (
            tensors
        )
        self.x_array, self.normed_array, qkv, attended, gate_up, self.gated_array, product = map(
            as_array, tensors
        )
        self.qkv_array = qkv.reshape(tokens, -1, shape.head_dim)
        self.attended_array = attended.reshape(tokens, -1, shape.head_dim)
        self.gate_up_array = gate_up.reshape(tokens, 2, -1)
        self.product_array = product

    @staticmethod
    def memory(shape: Shape, tokens: int, dtype: torch.dtype) -> list[torch.Tensor]:
        """Memory of as many tokens: the residual stream in float32, what products need in dtype."""
        s = shape
        widths = (s.hidden, s.qkv, s.heads * s.head_dim, 2 * s.inner, s.inner, s.hidden)
        stream = aligned_zeros((tokens, s.hidden), torch.float32)
        return [stream, *(aligned_zeros((tokens, width), dtype) for width in widths)]


class CompiledDecoder:
    """Rows are 0 … n - 1; new rows are appended after them.

    Args:
        config: A Qwen2, Qwen3 or Llama config.
        device: The CPU.
        dtype: float32 or bfloat16.

    Raises:
        ValueError: A config, device or type that this decoder does not compute.
    """

    joins_midway = True
    row_step = 1
    shrink_share = 0.0

    def __init__(self, config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> None:
        reason = not_compiled(config, device, dtype)
        if reason:
            raise ValueError(f'The compiled decoder cannot run this: {reason}. Use "auto".')
        self.config, self.shape = config, shape_of(config)
        self.dtype, self._kernels = dtype, kernels(_NAMES[dtype])
        self.weights = FastWeights(self.shape, device, dtype)
        self._layers = [_Layer(layer) for layer in self.weights.layers]
        self._norm, self._head = as_array(self.weights.norm), self.weights.head.t()
        self._eps = np.float32(self.shape.eps)
        self._rotations = np.zeros((0, 2, self.shape.head_dim), dtype=np.float32)
        self._memory = _Buffers.memory(self.shape, 0, dtype)
        self._buffers: dict[int, _Buffers] = {}
        self.cache = PagedCache(self.shape.layers, self.shape.kv_heads, self.shape.head_dim, dtype)
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
        del batch, width
        self.close()
        self._tables = np.zeros((0, pages_of(length)), dtype=np.int64)
        if len(self._rotations) < length:
            table = rotary_table(self.config, length + _POSITION_STEP, torch.device("cpu"))
            own, other = table.real.repeat_interleave(2, 1), table.imag.repeat_interleave(2, 1)
            other[:, ::2].neg_()
            self._rotations = torch.stack((own, other), dim=1).numpy()

    def close(self) -> None:
        """Forgets all rows."""
        self.cache.clear()
        self._tables = np.zeros((0, 0), dtype=np.int64)
        self._lengths = np.zeros(0, dtype=np.int64)
        self._kept: tuple[Prompt, np.ndarray, torch.Tensor] | None = None

    def admit(self, prompts: Sequence[Prompt], index: np.ndarray) -> torch.Tensor:
        """Appends rows; each distinct prompt is computed once.

        Args:
            prompts: U distinct prompts.
            index: (n,) which of them each new row continues, in rising order.

        Returns:
            (n, V) logits of the token after each row's prompt.
        """
        if self._kept is not None and self._kept[0] == prompts[0]:
            pages, logits = [self._kept[1]], [self._kept[2]]
        else:
            self._forget_kept()
            pages, logits = [], []
        new = prompts[len(pages) :]
        if new:
            pages += [self.cache.take(pages_of(len(prompt))) for prompt in new]
            logits.append(self.prefill(new, pages[-len(new) :], np.zeros(len(new), dtype=np.int64)))
        uses = np.bincount(index, minlength=len(prompts)).tolist()
        tables = [self._branch(*branch) for branch in zip(prompts, pages, uses, strict=True)]
        for own in pages[:-1]:
            self.cache.drop(own)
        every = torch.cat(logits)
        self._kept = (prompts[-1], pages[-1], every[-1:].clone())
        lengths = np.array([len(prompts[i]) for i in index], dtype=np.int64)
        self._tables = np.concatenate((self._tables, *tables))
        self._lengths = np.concatenate((self._lengths, lengths))
        return every[torch.from_numpy(index)]

    def park(self, row: int, length: int) -> Parked:
        """Keeps the first `length` tokens of a row, also when the row itself is dropped."""
        pages = self._tables[row, : pages_of(length)].copy()
        self.cache.share(pages, 1)
        return Parked(pages, length)

    def resume(self, parked: Sequence[Parked], more: Sequence[Sequence[int]]) -> torch.Tensor:
        """Appends rows that were parked and have left, and computes what follows them.

        Args:
            parked: Of `park`, n rows.
            more: At least one token for each.

        Returns:
            (n, V) logits after the last of these tokens.
        """
        lengths = np.array([past.length for past in parked], dtype=np.int64)
        after = lengths + [len(ids) for ids in more]
        pages = [past.pages for past in parked]
        for i, own in enumerate(pages):
            pages[i] = np.concatenate((own, self.cache.take(pages_of(int(after[i])) - len(own))))
        logits = self.prefill(more, pages, lengths)
        tables = np.zeros((len(pages), self._tables.shape[1]), dtype=np.int64)
        for table, own in zip(tables, pages, strict=True):
            table[: len(own)] = own
        self._tables = np.concatenate((self._tables, tables))
        self._lengths = np.concatenate((self._lengths, after))
        return logits

    def release(self, parked: Parked) -> None:
        """Forgets a parked row."""
        self.cache.drop(parked.pages)

    def keep(self, rows: np.ndarray) -> None:
        """Makes old row rows[i] the new row i and drops the others."""
        gone = np.ones(len(self._lengths), dtype=bool)
        gone[rows] = False
        tables, counts = self._tables[gone], pages_of(self._lengths[gone])
        self.cache.drop(tables[np.arange(tables.shape[1]) < counts[:, None]])
        self._tables, self._lengths = self._tables[rows], self._lengths[rows]

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Appends one token to every row.

        Args:
            tokens: (n,) int64.

        Returns:
            (n, V) logits of the token after it.
        """
        full = np.nonzero(self._lengths % PAGE == 0)[0]
        if len(full):
            self._tables[full, self._lengths[full] // PAGE] = self.cache.take(len(full))
        buffers = self._room(len(tokens))
        self._compute(buffers, tokens, self._lengths, buffers.rows, self._tables)
        self._lengths += 1
        return torch.mm(buffers.normed, self._head)

    def _room(self, tokens: int) -> _Buffers:
        """Buffers for a batch of this size."""
        if tokens > len(self._memory[0]):
            self._memory = _Buffers.memory(self.shape, tokens, self.dtype)
            self._buffers.clear()
        if tokens not in self._buffers:
            self._buffers[tokens] = _Buffers(self.shape, self._memory, tokens)
        return self._buffers[tokens]

    def _compute(
        self,
        buffers: _Buffers,
        tokens: torch.Tensor,
        positions: np.ndarray,
        rows: np.ndarray,
        tables: np.ndarray,
    ) -> None:
        """Appends tokens to their sequences; leaves normed last states in the buffers.

        Args:
            buffers: For N tokens.
            tokens: (N,).
            positions: (N,), rising within a sequence.
            rows: (N,), each token's row of the tables.
            tables: Pages of the sequences, those of the tokens among them.
        """
        b, run, heads = buffers, self._kernels, self.shape.heads
        if self.dtype == torch.float32:
            torch.index_select(self.weights.embed, 0, tokens, out=b.x)
        else:
            b.x.copy_(self.weights.embed.index_select(0, tokens))
        for w, keys, values in zip(self._layers, self.cache.keys, self.cache.values, strict=True):
            run.rms_norm(b.x_array, w.norm_in, self._eps, b.normed_array)
            torch.mm(b.normed, w.qkv, out=b.qkv)
            run.attend(
                b.qkv_array,
                w.qkv_bias,
                w.q_norm,
                w.k_norm,
                self._eps,
                heads,
                self._rotations,
                positions,
                rows,
                tables,
                keys,
                values,
                b.attended_array,
            )
            self._add_product(b, b.attended, w.out, w.out_bias)
            run.rms_norm(b.x_array, w.norm_post, self._eps, b.normed_array)
            torch.mm(b.normed, w.gate_up, out=b.gate_up)
            run.gate(b.gate_up_array, w.gate_bias, b.gated_array)
            self._add_product(b, b.gated, w.down, w.down_bias)
        run.rms_norm(b.x_array, self._norm, self._eps, b.normed_array)

    def _add_product(
        self, b: _Buffers, factor: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        """X += factor · matrix + bias, in place."""
        if bias is not None:
            b.x.add_(bias)
        if self.dtype == torch.float32:
            b.x.addmm_(factor, matrix)
        else:
            torch.mm(factor, matrix, out=b.product)
            self._kernels.accumulate(b.x_array, b.product_array)

    def prefill(
        self, more: Sequence[Sequence[int]], pages: Sequence[np.ndarray], start: np.ndarray
    ) -> torch.Tensor:
        """Appends tokens to U sequences; returns the logits (U, V) after each.

        Args:
            more: Tokens of each sequence.
            pages: Of each, with room for them.
            start: (U,) tokens that each has already.
        """
        lengths = np.array([len(ids) for ids in more])
        tables = np.zeros((len(more), max(map(len, pages))), dtype=np.int64)
        for row, own in enumerate(pages):
            tables[row, : len(own)] = own
        tokens = torch.tensor([token for ids in more for token in ids])
        rows = np.repeat(np.arange(len(more)), lengths)
        ends = np.cumsum(lengths)
        positions = np.arange(len(rows)) + (start - ends + lengths)[rows]
        last = torch.empty(len(more), self.shape.hidden, dtype=self.dtype)
        for first in range(0, len(rows), PREFILL_TOKENS):
            part = slice(first, first + PREFILL_TOKENS)
            buffers = self._room(len(rows[part]))
            self._compute(buffers, tokens[part], positions[part], rows[part], tables)
            done = np.nonzero((ends > first) & (ends <= first + PREFILL_TOKENS))[0]
            last[torch.from_numpy(done)] = buffers.normed[torch.from_numpy(ends[done] - first - 1)]
        return torch.mm(last, self._head)

    def _branch(self, prompt: Prompt, pages: np.ndarray, uses: int) -> np.ndarray:
        """(uses, pages) tables of the rows that continue a prompt."""
        tables = np.zeros((uses, self._tables.shape[1]), dtype=np.int64)
        whole = len(prompt) // PAGE
        tables[:, :whole] = pages[:whole]
        self.cache.share(pages[:whole], uses)
        if whole < len(pages):
            tables[:, whole] = copies = self.cache.take(uses)
            self.cache.copy(int(pages[whole]), copies)
        return tables

    def _forget_kept(self) -> None:
        if self._kept is not None:
            self.cache.drop(self._kept[1])
            self._kept = None
