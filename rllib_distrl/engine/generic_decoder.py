"""A decoder for any Hugging Face causal LM, through the model's own cache.

Rows of one wave have prompts of equal length and stay in lockstep, so that no padding, mask or
position is left to the model's own idea of them. A model without such a cache (it takes no
`past_key_values`), or with one that does not do as others do, is run on the whole context again at
each step.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Prompt = tuple[int, ...]


class GenericDecoder:
    """Wraps a Hugging Face module. Rows join only at the start of a wave.

    Args:
        config: Any causal LM's config.
        device: Where the module lives.
        dtype: Type of its floating-point weights.
    """

    joins_midway = False
    # The module's cache is copied whole when rows leave.
    row_step = 16
    # Closing the gaps costs about a tenth of a step.
    shrink_share = 0.0625

    def __init__(self, config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM

        self.device = device
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        self.model = model.to(device=device, dtype=dtype).eval().requires_grad_(False)
        parameters = inspect.signature(self.model.forward).parameters
        self._extra = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self.caches = "past_key_values" in parameters
        self._cache = None
        self._ids = torch.empty(0, 0, dtype=torch.int64, device=device)

    def canonical(self) -> Mapping[str, torch.Tensor]:
        """The module's own tensors, under every name that they have."""
        return self.model.state_dict()

    def shapes(self) -> Mapping[str, torch.Size]:
        """Hugging Face names to Hugging Face shapes."""
        return {name: tensor.shape for name, tensor in self.canonical().items()}

    def open(self, batch: int, width: int, length: int) -> None:
        """Starts empty; the module's cache grows by itself."""
        del batch, width, length
        self.close()

    def close(self) -> None:
        """Forgets all rows."""
        self._cache, self._ids = None, self._ids[:0, :0]

    def admit(self, prompts: Sequence[Prompt], index: np.ndarray) -> torch.Tensor:
        """Starts rows from U distinct prompts of equal length.

        Args:
            prompts: U distinct prompts.
            index: (n,) which of them each row continues.

        Returns:
            (n, V) logits of the token after each row's prompt.
        """
        which = torch.from_numpy(index).to(self.device)
        logits = self._forward(torch.tensor(prompts, device=self.device))
        self._select(which)
        return logits.index_select(0, which)

    def keep(self, rows: np.ndarray) -> None:
        """Makes old row rows[i] the new row i and drops the others."""
        self._select(torch.from_numpy(rows).to(self.device))

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Appends one token (n,) to every row and returns the next logits (n, V)."""
        return self._forward(tokens.unsqueeze(1))

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        if not self.caches:
            self._ids = torch.cat((self._ids, ids), dim=1) if self._ids.numel() else ids
            return self.model(input_ids=self._ids, use_cache=False, **self._extra).logits[:, -1]
        out = self.model(input_ids=ids, past_key_values=self._cache, use_cache=True, **self._extra)
        self._cache = out.past_key_values
        if self._cache is None:
            raise ValueError(f"{type(self.model).__name__} returned no key-value cache.")
        return out.logits[:, -1]

    def _select(self, rows: torch.Tensor) -> None:
        if self._cache is not None:
            self._cache.reorder_cache(rows)
        else:
            self._ids = self._ids.index_select(0, rows)
