"""What a rollout engine is asked for and what it answers: requests in, sampled tokens out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch

UNKNOWN_VERSION = -1
"""`version` of an engine that has never been given weights."""

_SETTINGS = ("temperature", "top_p", "top_k")


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn; the same for every request of one call.

    Attributes:
        max_tokens: Completion length, in tokens, after which a request ends with "length".
        temperature: Divides the logits before anything else.
        top_p: Keeps the smallest set of most probable tokens with at least this mass (1 = off).
        top_k: Keeps this many most probable tokens (0 = off).
        greedy: Takes the most probable token; the reported logp is then the model's own,
            at temperature 1, because that of a point mass says nothing.
        entropy: Also returns the entropy of each distribution sampled from, in nats.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    greedy: bool = False
    entropy: bool = False

    @classmethod
    def of(
        cls, settings: Mapping[str, Any], max_tokens: int, *, greedy: bool = False
    ) -> "SamplingParams":
        """What a table of settings says of sampling, `[rollout]` or `[eval]`: the one reader.

        Args:
            settings: With or without what `distribution` names; further keys are for others.
            max_tokens: Completion length.
            greedy: Takes the most probable token.
        """
        known = {name: settings[name] for name in _SETTINGS if name in settings}
        return cls(max_tokens, greedy=greedy, **known)

    def distribution(self) -> dict[str, Any]:
        """What an episode remembers of how it was sampled."""
        return {name: getattr(self, name) for name in (*_SETTINGS, "greedy")}

    def validate(self) -> None:
        """Raises ValueError for a setting outside its range."""
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens}: must be at least 1.")
        if not self.temperature > 0.0:
            raise ValueError(
                f"temperature={self.temperature}: must be positive; "
                "set greedy=True to take the most probable token."
            )
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p={self.top_p}: must be in (0, 1]; 1 turns it off.")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: must be at least 0; 0 turns it off.")


@dataclass(frozen=True)
class Request:
    """One completion to sample.

    Attributes:
        prompt_ids: The prompt's token ids. Equal prompts are computed once per call.
        key: (seed, row, sample, visit): names the random numbers, one uniform per
            (key, position), whatever else is in the batch.
        start: Tokens of this completion that were sampled before and are part of `prompt_ids`:
            random numbers, and the count up to `max_tokens`, go on from there.
        limit: Ends the completion at so many sampled tokens, those before `start` included, where
            that is before `max_tokens`.
    """

    prompt_ids: Sequence[int]
    key: tuple[int, int, int, int]
    start: int = 0
    limit: int | None = None

    def last(self, max_tokens: int) -> int:
        """Sampled tokens, those before `start` included, at which this one ends at the latest."""
        return max_tokens if self.limit is None else min(self.limit, max_tokens)


@dataclass
class Completion:
    """What was sampled for one request.

    Attributes:
        tokens: (T,) int64, the end-of-sequence token included where there is one.
        logps: (T,) float32, log-probability of each token under the distribution actually
            sampled from (after temperature, top-k and top-p).
        finish_reason: "stop" after an end-of-sequence token, else "length"; "paused" where its
            sampling goes on another time (`rollout.turns.sample_episodes`).
        entropies: (T,) float32 in nats if asked for, else None.
        replies: What an environment said between its turns (`EnvReply`); no engine reads it.
        versions: (T,) int64, version of the weights that sampled each token, where a runner has
            noted it.
    """

    tokens: np.ndarray
    logps: np.ndarray
    finish_reason: Literal["stop", "length", "paused"]
    entropies: np.ndarray | None = None
    replies: Sequence[Any] = ()
    versions: np.ndarray | None = None

    def joined(self, more: "Completion") -> "Completion":
        """This one and what was sampled after it."""
        entropies = None
        if self.entropies is not None and more.entropies is not None:
            entropies = np.concatenate((self.entropies, more.entropies))
        return Completion(
            np.concatenate((self.tokens, more.tokens)),
            np.concatenate((self.logps, more.logps)),
            more.finish_reason,
            entropies,
        )

    def cut(self, length: int) -> "Completion":
        """Its first tokens, as if it had stopped there; itself if it has no more."""
        if length >= len(self.tokens):
            return self
        entropies = None if self.entropies is None else self.entropies[:length]
        return Completion(self.tokens[:length], self.logps[:length], "stop", entropies)


def check_requests(
    requests: Sequence[Request], max_tokens: int, max_seq_len: int, vocab_size: int
) -> None:
    """Raises ValueError for requests that a model cannot serve.

    Args:
        requests: What to continue.
        max_tokens: Completion length.
        max_seq_len: Longest prompt and completion together.
        vocab_size: Tokens that the model knows.
    """
    for request in requests:
        last = request.last(max_tokens)
        if not 0 <= request.start < last:
            raise ValueError(
                f"A request starts at {request.start} sampled tokens and ends at {last}: "
                "it must start at 0 or later, and before its end."
            )
        if len(request.prompt_ids) + last - request.start > max_seq_len:
            raise ValueError(
                f"A prompt of {len(request.prompt_ids)} tokens and max_tokens="
                f"{last - request.start} exceed the window of {max_seq_len} tokens. Lower "
                "max_tokens or shorten the prompts."
            )
    # The samples of a prompt share its list.
    prompts = {id(request.prompt_ids): request.prompt_ids for request in requests}.values()
    if not all(map(len, prompts)):
        raise ValueError("A prompt is empty: give it at least one token.")
    low, high = min(map(min, prompts)), max(map(max, prompts))
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"A prompt holds token {low if low < 0 else high}: "
            f"the model's vocabulary is 0 … {vocab_size - 1}."
        )


@runtime_checkable
class RolloutEngine(Protocol):
    """Samples completions and proves which weights it samples them with.

    An engine may also have ``stream(requests, params)``, which yields each request's place and its
    completion as soon as that has ended; evaluations then show how far they are, row by row.
    """

    version: int

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        """Samples one completion per request.

        Args:
            requests: Any number of requests, in any order.
            params: How to sample.

        Returns:
            The completions, in the order of the requests.

        Raises:
            ValueError: A request or a parameter that the model cannot serve.
            RuntimeError: No weights were loaded yet.
        """
        ...

    def load_weights(self, state: Mapping[str, torch.Tensor], version: int) -> str:
        """Copies a Hugging Face causal LM's state dict into the engine's own tensors.

        Args:
            state: Tensors under their Hugging Face names.
            version: Number of these weights, 0 or more.

        Returns:
            The content hash of the engine's own tensors after loading.

        Raises:
            ValueError: A missing, unexpected or mis-shaped tensor; nothing is loaded then.
        """
        ...

    def weights_hash(self) -> str:
        """The content hash of the engine's own tensors, computed now."""
        ...
