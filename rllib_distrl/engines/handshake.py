"""Proof that an engine holds the learner's weights: version, hash of its tensors, probe logps."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from rllib_distrl.engines.engine import Request, RolloutEngine, SamplingParams

PROBE_TOKENS = 8
# A key that no training request has: seeds, rows, samples and visits are 0 or more.
_PROBE_KEY = (-1, -1, -1, -1)
# Mean |logp difference| of a probe that still counts as agreement, by the engine's type. Rounding
# stays far below it; one wrong, missing or stale tensor lies far above it.
PROBE_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.15}


@dataclass(frozen=True)
class Probe:
    """A few tokens that an engine sampled, for the learner to score.

    Attributes:
        prompt_ids: the probe prompt.
        tokens: (T,) int64, at most `PROBE_TOKENS`.
        logps: (T,) float32 under the distribution sampled from, top-k and top-p off.
    """

    prompt_ids: tuple[int, ...]
    tokens: np.ndarray
    logps: np.ndarray


def take_probe(engine: RolloutEngine, prompt_ids: Sequence[int], params: SamplingParams) -> Probe:
    """Lets the engine sample its probe: always the same tokens for the same weights.

    Args:
        engine: with weights.
        prompt_ids: any prompt of the task.
        params: how training samples; its temperature is kept.
    """
    params = replace(
        params,
        max_tokens=min(PROBE_TOKENS, params.max_tokens),
        top_p=1.0,
        top_k=0,
        greedy=False,
        entropy=False,
    )
    (completion,) = engine.generate([Request(prompt_ids, _PROBE_KEY)], params)
    return Probe(tuple(map(int, prompt_ids)), completion.tokens, completion.logps)


def check_probe(name: str, probe: Probe, learner_logps: np.ndarray, dtype: str) -> float:
    """Compares a probe with the learner's logps of its tokens.

    Args:
        name: of the runner, for the message.
        probe: what it sampled.
        learner_logps: (T,).
        dtype: the coarser one of the types in which both compute, a key of `PROBE_TOLERANCE`.

    Returns:
        The mean absolute difference.

    Raises:
        RuntimeError: if it is above the tolerance, or not a number.
    """
    error = float(np.abs(probe.logps - learner_logps).mean())
    if not error <= PROBE_TOLERANCE[dtype]:
        raise RuntimeError(
            f"{name} computes other logps than the learner: they differ by {error:.3g} on average "
            f"over {len(probe.tokens)} probe tokens; {PROBE_TOLERANCE[dtype]:g} is allowed for "
            f"{dtype}. Its weights have the right hash, so the engine computes another model."
        )
    return error
