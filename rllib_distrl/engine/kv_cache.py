"""A static key-value cache whose rows each count their own columns, on the device."""

import numpy as np
import torch

# The cache has and grows by multiples of so many columns, which suits attention with a mask.
_COLUMN_STEP = 64
# Columns behind the prompts that the cache begins with.
_FIRST = 512
# The cache grows by at least this share: every growth records the graphs anew.
_GROWTH = 0.5


class KVCache:
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


def _whole(columns: int) -> int:
    return -(-columns // _COLUMN_STEP) * _COLUMN_STEP
