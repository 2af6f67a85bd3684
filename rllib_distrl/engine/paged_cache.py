"""A key-value cache in pages of 16 tokens that sequences share.

A sequence is a list of pages, and the completions of a prompt share its full pages, so that a
prompt is computed and stored once; a page that is not full is copied (Kwon et al., "Efficient
Memory Management for Large Language Model Serving with PagedAttention", 2023).
"""

import numpy as np

from rllib_distrl.engine.kernels import PAGE

# The cache grows by at least this share of its pages.
_GROWTH = 0.5
# Bytes of a cache line: a vector that begins elsewhere is read twice.
_LINE = 64


def pages_of(tokens):
    """Pages that so many tokens (a number or an array) fill or begin."""
    return -(-tokens // PAGE)


def aligned_zeros(size: int) -> np.ndarray:
    """(size,) float32 that begin at a cache line; memory is taken as it is written to."""
    raw = np.zeros(size + _LINE // 4, dtype=np.float32)
    first = -raw.ctypes.data % _LINE // 4
    return raw[first : first + size]


class PagedCache:
    """Keys and values of sequences; CPU, float32.

    Attributes:
        keys: (layers, pages · kv_heads · D · 16), a layer's in the order that `kernels.attend` has.
        values: (layers, pages · kv_heads · 16 · D), likewise.

    Args:
        layers: Number of layers.
        heads: Key heads per layer.
        head_dim: Width D of a head.
    """

    def __init__(self, layers: int, heads: int, head_dim: int) -> None:
        self._size = heads * head_dim * PAGE
        self.keys, self.values = (aligned_zeros(0).reshape(layers, 0) for _ in range(2))
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

    @staticmethod
    def _grown(data: np.ndarray, size: int) -> np.ndarray:
        new = aligned_zeros(len(data) * size).reshape(len(data), size)
        new[:, : data.shape[1]] = data
        return new
