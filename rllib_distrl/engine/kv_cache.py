"""A static key-value cache whose rows all write the same column at each step.

A row's prompt ends just before the column at which the row joined, so rows differ only in where
they start: a token's position is its column minus its row's start, and columns before the start
are masked (no mask where all starts are equal).
"""

import numpy as np
import torch

# The cache grows by at least this many columns at a time.
_COLUMN_STEP = 64


class KVCache:
    """Keys and values of rows 0 … n - 1.

    Time is the outermost axis: the columns in use are one stretch of memory.

    Attributes:
        rows: n, rows in use.
        column: The column that the next token is written to.
        mask: (columns, n, 1), 0 or -inf, or None where all rows start at the same column.

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
        self._size, self._device, self._dtype = (layers, heads, head_dim), device, dtype
        self._data = self.allocate(0, 0)
        self.close()

    def allocate(self, columns: int, batch: int) -> torch.Tensor:
        """Zeros of shape (layers, 2, columns, batch, heads, head_dim), keys before values."""
        layers, heads, head_dim = self._size
        size = (layers, 2, columns, batch, heads, head_dim)
        return torch.zeros(size, device=self._device, dtype=self._dtype)

    def open(self, batch: int, width: int, length: int) -> None:
        """Empties the cache and makes room.

        Args:
            batch: Most rows at a time.
            width: Longest prompt, in tokens.
            length: Longest prompt and completion together, in tokens.
        """
        self.close()
        columns = min(length, width + _COLUMN_STEP)
        if self._data.shape[3] < batch or self._data.shape[2] < columns:
            columns = max(columns, self._data.shape[2])
            self._data = self.allocate(columns, max(batch, self._data.shape[3]))
        self.column = self._width = width

    def close(self) -> None:
        """Forgets all rows; the memory is kept."""
        self.rows = self.column = self._width = self._low = 0
        self._start = np.zeros(0, dtype=np.int64)
        self.mask: torch.Tensor | None = None
        self._stale = True

    def append(self, kv: torch.Tensor, lengths: np.ndarray) -> None:
        """Adds rows whose prompts end at the current column.

        Args:
            kv: (layers, 2, P, rows, heads, head_dim), aligned to the right.
            lengths: (rows,) prompt lengths, at most P.
        """
        columns, rows = kv.shape[2:4]
        first = self.column - columns
        self._data[:, :, first : self.column, self.rows : self.rows + rows] = kv
        self._start = np.concatenate((self._start, self.column - lengths))
        self.rows += rows
        self._stale = True

    def keep(self, rows: np.ndarray) -> None:
        """Makes old row rows[i] the new row i and drops the others."""
        moved = np.nonzero(rows != np.arange(len(rows)))[0]
        if len(moved):
            live = self._data[:, :, int(self._start[rows].min()) : self.column]
            source = torch.from_numpy(rows[moved]).to(self._device)
            target = torch.from_numpy(moved).to(self._device)
            live.index_copy_(3, target, live.index_select(3, source))
        self._start = self._start[rows]
        self.rows = len(rows)
        self._stale = True

    def positions(self) -> np.ndarray:
        """(n,) int64 positions of the next tokens; makes room for them."""
        if self._stale or self.column == self._data.shape[2]:
            self._make_room()
        return self.column - self._start

    def target(self, layer: int) -> torch.Tensor:
        """(2, n, heads, head_dim): where the next tokens' keys and values go."""
        return self._data[layer, :, self.column, : self.rows]

    def used(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Keys and values (S, n, heads, head_dim) up to the current column, and their mask."""
        stretch = slice(self._low, self.column + 1)
        keys, values = self._data[layer, :, stretch, : self.rows]
        return keys, values, None if self.mask is None else self.mask[stretch]

    def advance(self) -> None:
        """Ends a step."""
        self.column += 1

    def _make_room(self) -> None:
        """Finds a column for the next tokens, and the mask that goes with the rows' starts."""
        low = int(self._start.min())
        if self.column == self._data.shape[2]:
            shift = min(low, self.column - self._width)
            if shift > self.column // 2:
                self._shift(shift)
                low -= shift
            else:
                self._grow(self.column + max(_COLUMN_STEP, self.column // 2))
        self._low = low
        self.mask = None
        if (self._start != low).any():
            columns = torch.arange(self._data.shape[2], device=self._device).view(-1, 1, 1)
            hidden = columns < torch.from_numpy(self._start).to(self._device).view(1, -1, 1)
            mask = torch.zeros(hidden.shape, device=self._device, dtype=self._dtype)
            self.mask = mask.masked_fill_(hidden, -torch.inf)
        self._stale = False

    def _shift(self, columns: int) -> None:
        """Moves everything left over columns that no row uses any more."""
        live = self._data[:, :, columns : self.column, : self.rows].clone()
        self.column -= columns
        self._data[:, :, : self.column, : self.rows] = live
        self._start -= columns

    def _grow(self, columns: int) -> None:
        """Gives the cache this many columns, keeping what is in use."""
        old = self._data[:, :, : self.column, : self.rows]
        self._data = self.allocate(columns, self._data.shape[3])
        self._data[:, :, : self.column, : self.rows] = old
