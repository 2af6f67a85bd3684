"""Rollout engines: prompts in, sampled tokens and their logps out."""

from rllib_distrl.engine.protocol import (
    UNKNOWN_VERSION,
    Completion,
    Request,
    RolloutEngine,
    SamplingParams,
)
from rllib_distrl.engine.torch_engine import TorchEngine
from rllib_distrl.engine.weights import content_hash

__all__ = [
    "UNKNOWN_VERSION",
    "Completion",
    "Request",
    "RolloutEngine",
    "SamplingParams",
    "TorchEngine",
    "content_hash",
]
