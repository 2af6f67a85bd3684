"""Proof that an engine holds the learner's weights: version, hash of its tensors, probe logps."""

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from rllib_distrl.engine.protocol import Request, RolloutEngine, SamplingParams
from rllib_distrl.model.causal_lm import gist, ordinary_tokens, own_logits

logger = logging.getLogger(__name__)

PROBE_TOKENS = 8
# A key that no training request has: seeds, rows, samples and visits are 0 or more.
_PROBE_KEY = (-1, -1, -1, -1)
# Lengths of the prompts with which an engine is compared with its model.
_CHECKED_PROMPTS = (3, 3, 2)
# Mean |logp difference| that still counts as agreement, by the engine's type. Measured on tiny
# models of 25 architectures: rounding to bfloat16 gives 0.002 where logits have a standard
# deviation of 0.3, 0.006 to 0.06 at 0.9, 0.08 at 4.5.
PROBE_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
# Every so many tokens one ends a completion while an engine is compared with its model.
_ENDING = 6


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


def check_engine(engine: RolloutEngine, model: Any, params: SamplingParams, dtype: str) -> float:
    """Compares what an engine samples with the own forward pass of the model it was made from.

    Prompts of equal and of different length, several samples each: what shares a prompt's cache,
    and what waits for another batch. Where a model's own cache cannot do that, the torch engine
    goes without it (`TorchEngine.forgo_cache`), slowly.

    Args:
        engine: With the model's weights.
        model: A Hugging Face causal LM.
        params: How training samples; its temperature is kept.
        dtype: Of the engine, a key of `PROBE_TOLERANCE`, of which as much is allowed as the logits'
            standard deviation, at most all.

    Returns:
        The mean absolute difference of logps.

    Raises:
        ValueError: If it is above the tolerance, or the engine cannot run the model.
    """
    try:
        with _varied_lengths(engine):
            error, spread = _compared(engine, model, params)
        why = ""
    except Exception as failure:
        error, spread, why = math.inf, 1.0, gist(failure)
    tolerance = PROBE_TOLERANCE[dtype] * min(1.0, spread)
    if error <= tolerance:
        return error
    if getattr(engine, "forgo_cache", bool)():
        logger.warning(
            "%s does not sample right from a key-value cache%s: every token runs its whole row.",
            type(model).__name__,
            why and f" ({why})",
        )
        return check_engine(engine, model, params, dtype)
    raise _not_sampled(model, error, why, f"{tolerance:.1g} is allowed for {dtype}")


@contextlib.contextmanager
def _varied_lengths(engine: Any) -> Iterator[None]:
    """Lets rows end at different times, so that some leave a batch before others."""
    ends = getattr(engine, "is_eos", None)
    if ends is not None:
        engine.is_eos = np.arange(len(ends)) % _ENDING == 0
    try:
        yield
    finally:
        if ends is not None:
            engine.is_eos = ends


def _not_sampled(model: Any, error: float, why: str, allowed: str) -> ValueError:
    name = type(model).__name__
    if why:
        return ValueError(
            f"The rollout engine cannot sample from {name} ({why}). Choose another model, or "
            "another [rollout] engine."
        )
    return ValueError(
        f"The rollout engine samples from other probabilities than {name} has: logps differ by "
        f"{error:.3g} on average from the model's own forward pass, where {allowed}. Choose "
        "another model, or another [rollout] engine."
    )


def _compared(engine: RolloutEngine, model: Any, params: SamplingParams) -> tuple[float, float]:
    """Mean |logp difference| of a few completions from the model, and its logits' spread."""
    tokens = ordinary_tokens(model.config, sum(_CHECKED_PROMPTS), seed=1)
    ends = np.cumsum(_CHECKED_PROMPTS).tolist()
    prompts = [tokens[end - n : end] for end, n in zip(ends, _CHECKED_PROMPTS, strict=True)]
    requests = [
        Request(prompt, (*_PROBE_KEY[:3], -2 - sample)) for prompt in prompts for sample in range(2)
    ]
    errors, spreads = [], []
    completions = engine.generate(requests, _as_probe(params))
    for request, completion in zip(requests, completions, strict=True):
        ids = [*request.prompt_ids, *completion.tokens.tolist()]
        logits = own_logits(model, ids)[len(request.prompt_ids) - 1 : -1] / params.temperature
        picked = torch.from_numpy(completion.tokens).to(logits.device).unsqueeze(-1)
        own = logits.log_softmax(-1).gather(-1, picked).squeeze(-1).cpu().numpy()
        errors.append(np.abs(own - completion.logps))
        spreads.append(float(logits.std(-1).mean()))
    return float(np.concatenate(errors).mean()), float(np.mean(spreads))


def _as_probe(params: SamplingParams) -> SamplingParams:
    """Few tokens, from the whole distribution."""
    return replace(
        params,
        max_tokens=min(PROBE_TOKENS, params.max_tokens),
        top_p=1.0,
        top_k=0,
        greedy=False,
        entropy=False,
    )


def take_probe(engine: RolloutEngine, prompt_ids: Sequence[int], params: SamplingParams) -> Probe:
    """Lets the engine sample its probe: always the same tokens for the same weights.

    Args:
        engine: with weights.
        prompt_ids: any prompt of the task.
        params: how training samples; its temperature is kept.
    """
    (completion,) = engine.generate([Request(prompt_ids, _PROBE_KEY)], _as_probe(params))
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
