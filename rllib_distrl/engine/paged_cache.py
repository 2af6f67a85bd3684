"""A key-value cache in pages of 16 tokens that sequences share.

A sequence is a list of pages, and the completions of a prompt share its full pages, so that a
prompt is computed and stored once; a page that is not full is copied (Kwon et al., "Efficient
Memory Management for Large Language Model Serving with PagedAttention", 2023).
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

from rllib_distrl.engine.kernels import PAGE

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

    Args:
        layers: Number of layers.
        heads: Key heads per layer.
        head_dim: Width D of a head.
        dtype: Of keys and values, float32 or bfloat16.
    """

    def __init__(self, layers: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
        self._size, self._dtype = heads * head_dim * PAGE, dtype
        self.keys, self.values = (as_array(aligned_zeros((layers, 0), dtype)) for _ in range(2))
        self._users = np.zeros(0, dtype=np.int64)
        self.clear()

    def clear(self) -> None:
        """Forgets all sequences; the memory is kept."""
        self._users[:] = 0
        self._free = np.arange(len(self._users))[::-1]

    def take(self, count: int) -> np.ndarray:
        """(count,) int64 pages, each with one user."""
        if count > len(self._free):
            self._grow(max(count - len(self._free), int(_GROWTH * len(self._users))))
        left = len(self._free) - count
        pages, self._free = self._free[left:][::-1], self._free[:left]
        self._users[pages] = 1
        return pages

    def share(self, pages: np.ndarray, users: int) -> None:
        """Counts so many further users of each page."""
        self._users[pages] += users

    def drop(self, pages: np.ndarray) -> None:
        """Ends one use for every mention of a page."""
        np.subtract.at(self._users, pages, 1)
        mentioned = np.unique(pages)
        self._free = np.concatenate((self._free, mentioned[self._users[mentioned] == 0]))

    def copy(self, page: int, to: np.ndarray) -> None:
        """Copies a page of every layer to others."""
        for data in (self.keys, self.values):
            pages = data.reshape(len(data), -1, self._size)
            pages[:, to] = pages[:, page : page + 1]

    def _grow(self, pages: int) -> None:
        old = len(self._users)
        self.keys, self.values = (
            self._grown(data, (old + pages) * self._size) for data in (self.keys, self.values)
        )
        self._users = np.concatenate((self._users, np.zeros(pages, dtype=np.int64)))
        self._free = np.concatenate((np.arange(old, old + pages)[::-1], self._free))

    def _grown(self, data: np.ndarray, size: int) -> np.ndarray:
        new = as_array(aligned_zeros((len(data), size), self._dtype))
        new[:, : data.shape[1]] = data
        return new
