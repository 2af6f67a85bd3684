"""Engines by name: what `[rollout] engine` stands for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from rllib_distrl.engine.protocol import RolloutEngine
from rllib_distrl.engine.torch_engine import TorchEngine

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def make_engine(
    name: str,
    model_config: PreTrainedConfig,
    eos_token_ids: Iterable[int],
    *,
    max_batch_size: int,
    device: str,
    dtype: torch.dtype,
    options: Mapping[str, Any],
) -> RolloutEngine:
    """An engine without weights.

    Args:
        name: ``"torch"`` or ``"vllm"``.
        model_config: the model's config.
        eos_token_ids: tokens that end a completion.
        max_batch_size: most rows decoded at a time.
        device: of the torch engine; vLLM takes the first one that it sees.
        dtype: of weights and cache.
        options: of vLLM: ``sleep``, and arguments of ``vllm.LLM``.
    """
    if name == "torch":
        return TorchEngine(
            model_config, eos_token_ids, max_batch_size=max_batch_size, device=device, dtype=dtype
        )
    from rllib_distrl.engine.vllm_engine import VllmEngine

    further = dict(options)
    return VllmEngine(
        model_config,
        eos_token_ids,
        max_batch_size=max_batch_size,
        dtype=dtype,
        sleep=further.pop("sleep", False),
        options=further,
    )
