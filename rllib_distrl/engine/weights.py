"""Weights under their Hugging Face names, and the proof that an engine holds the learner's.

The proof is a version, a hash of all tensors (of places drawn anew for each version where they are
large), and log-probabilities of a few tokens (probes).
"""

import contextlib
import hashlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from rllib_distrl.engine.protocol import Request, RolloutEngine, SamplingParams
from rllib_distrl.engine.sampling import uniform_words
from rllib_distrl.model.causal_lm import gist, ordinary_tokens, own_logits

# Names under which Hugging Face stores an output head that may be tied to the embeddings.
_HEAD_NAMES = ("lm_head.weight", "embed_out.weight")


# Words per row of the multilinear hash: keys and one row's products fill a core's L2 cache.
_ROW = 1 << 15
_KEY_SEED = 0x9D157
# A tensor of more numbers may be hashed by a sample of so many of them.
_WHOLE = 1 << 18
_PLACES = 1 << 10


@lru_cache
def _keys(device: torch.device) -> torch.Tensor:
    """(_ROW,) odd int64 keys, the same everywhere."""
    words = uniform_words([(_KEY_SEED,)], _ROW)[0]
    return torch.from_numpy(words.view("int64") | 1).to(device)


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes in row-major order as int64, zeros behind the last."""
    flat = tensor.detach().contiguous().view(-1)
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()
    raw = flat.view(torch.uint8)
    if len(raw) % 8:
        raw = torch.nn.functional.pad(raw, (0, -len(raw) % 8))
    return raw.view(torch.int64)


def _products(rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Σ kᵢ wᵢ modulo 2⁶⁴ of every row (R, n): shape (R,)."""
    if rows.is_cpu:
        return rows @ keys
    scratch = torch.empty_like(keys)  # GPUs have no product of integer matrices
    sums = [torch.mul(row, keys, out=scratch).sum() for row in rows]
    return torch.stack(sums) if sums else rows.new_empty(0)


@lru_cache(maxsize=64)
def _places(sample: int, shape: torch.Size, device: torch.device) -> tuple[torch.Tensor, ...]:
    """An index of _PLACES numbers, at places in row-major order that sample and size decide."""
    size = shape.numel()
    words = uniform_words([(_KEY_SEED, sample, size)], _PLACES)[0]
    places = torch.from_numpy((words % np.uint64(size)).view("int64"))
    return torch.unravel_index(places.to(device), shape)


def _digest(tensor: torch.Tensor, size: int) -> bytes:
    """Multilinear hash of each row of words, then BLAKE2b of all rows' hashes.

    A row's hash is Σ kᵢ wᵢ modulo 2⁶⁴ with odd keys k: every change of one word is seen, and
    others with probability 1 - 2⁻⁶³ (Lemire & Kaser, "Strongly universal string hashing is fast",
    2014). It runs where the tensor is, at the speed of its memory.
    """
    words = _words(tensor)
    keys, whole = _keys(words.device), len(words) // _ROW * _ROW
    rows, rest = words[:whole].view(-1, _ROW), words[whole:]
    hashes = [_products(rows, keys), _products(rest.view(1, -1), keys[: len(rest)])]
    total = hashlib.blake2b(digest_size=32)
    total.update(f"{tensor.dtype} {size} ".encode())
    total.update(torch.cat(hashes).cpu().numpy().tobytes())
    return total.digest()


def content_hash(
    state: Mapping[str, torch.Tensor],
    *,
    dtype: torch.dtype | None = None,
    sample: int | None = None,
) -> str:
    """Names and contents of a causal LM's weights as one short string.

    An output head whose content is that of another tensor of its shape (a tied head) is
    counted once, whether the state dict lists it or not.

    A sample reads 1,024 numbers of each tensor that has more than 2^18, at places that depend on
    the sample and the tensor's size (our choice). If a share f of a tensor is wrong, at places that
    do not depend on the sample, it is seen with probability 1 - (1 - f)^1024: 99.99 % for a
    hundredth, and other samples see other places.

    Args:
        state: Tensors under their Hugging Face names, on any device.
        dtype: Casts every tensor first: the type in which an engine holds them.
        sample: Which places to read, such as the weights' version; None: all of every tensor.

    Returns:
        64 hexadecimal digits. Equal for equal names, types and bytes.
    """
    digests = {}
    for name in sorted(state):
        tensor, size = state[name], state[name].numel()
        if sample is not None and size > _WHOLE:
            tensor = tensor.detach()[_places(sample, tensor.shape, tensor.device)]
        digests[name] = _digest(_cast(tensor, dtype), size)
    for head in _HEAD_NAMES:
        if head in digests and list(digests.values()).count(digests[head]) > 1:
            del digests[head]
    return combine(digests)


def _cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """The tensor in another floating type; integer tensors stay."""
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def combine(digests: Mapping[str, bytes]) -> str:
    """One hash over (name, digest) pairs, sorted by name."""
    total = hashlib.blake2b(digest_size=32)
    for name in sorted(digests):
        total.update(name.encode() + b"\0" + digests[name])
    return total.hexdigest()


def _tied(state: Mapping[str, torch.Tensor], name: str) -> bool:
    """Whether this is an output head that repeats another tensor."""
    head = state[name]
    return name in _HEAD_NAMES and any(
        other.shape == head.shape
        and (other.data_ptr() == head.data_ptr() or torch.equal(other, head))
        for key, other in state.items()
        if key != name
    )


def check_names(state: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size]) -> None:
    """Compares a state dict with what an engine holds.

    Args:
        state: What is to be loaded; may repeat tied embeddings as an output head.
        shapes: Name to shape of everything the engine needs.

    Raises:
        ValueError: With the first names that are missing, unexpected or mis-shaped.
    """
    missing = [name for name in shapes if name not in state]
    unexpected = [name for name in state if name not in shapes and not _tied(state, name)]
    shaped = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(shape)}"
        for name, shape in shapes.items()
        if name in state and state[name].shape != shape
    ]
    problems = (("missing", missing), ("unexpected", unexpected), ("wrong shape", shaped))
    found = "; ".join(
        f"{kind}: {', '.join(names[:3])}" + (f" and {len(names) - 3} more" * (len(names) > 3))
        for kind, names in problems
        if names
    )
    if found:
        raise ValueError(
            f"These weights do not fit the engine's model ({found}). "
            "Pass the state dict of a causal LM made from the same config."
        )


def copy_weights(state: Mapping[str, torch.Tensor], views: Mapping[str, torch.Tensor]) -> None:
    """Copies tensors of equal row-major order into views of the engine's storage, in place."""
    for name, view in views.items():
        view.copy_(state[name].detach().reshape(view.shape))


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
