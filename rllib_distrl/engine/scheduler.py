"""Drives a decoder through one call: rows that end leave, waiting requests take their place."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from rllib_distrl.engine.protocol import Completion, Request, SamplingParams
from rllib_distrl.engine.sampling import check_logps, sample, uniforms

# Computing a few prompts costs about as much as a step: requests wait until this share of the batch
# is empty or finished.
_REFILL_SHARE = 0.25

Prompt = tuple[int, ...]


class Decoder(Protocol):
    """What the engine needs of a decoder. Rows are 0 … n - 1; new rows are appended."""

    joins_midway: bool
    row_step: int
    """A shrinking batch keeps a multiple of this many rows."""
    shrink_share: float
    """Finished rows stay in the batch until they are this share of it."""

    def canonical(self) -> Mapping[str, torch.Tensor]:
        """Hugging Face names to views whose row-major order is that of the named tensor."""
        ...

    def shapes(self) -> Mapping[str, torch.Size]:
        """Hugging Face names to Hugging Face shapes."""
        ...

    def open(self, batch: int, width: int, length: int) -> None:
        """Starts empty, for so many rows, prompt tokens, and prompt + completion tokens."""
        ...

    def close(self) -> None:
        """Forgets all rows."""
        ...

    def admit(self, prompts: Sequence[Prompt], index: np.ndarray) -> torch.Tensor:
        """Appends rows continuing prompts[index[i]], index rising; returns logits (n, V)."""
        ...

    def keep(self, rows: np.ndarray) -> None:
        """Makes old row rows[i] the new row i and drops the others."""
        ...


class SteppingDecoder(Decoder, Protocol):
    """A decoder that hands its logits on after every step."""

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Appends one token (n,) to every row and returns the next logits (n, V)."""
        ...


@runtime_checkable
class DrawingDecoder(Decoder, Protocol):
    """A decoder that draws by itself, several tokens before the host looks at them."""

    ahead: int
    """Most tokens that one `draw` gives every row."""

    def draw(
        self, tokens: torch.Tensor, uniforms: np.ndarray, params: SamplingParams
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Appends a token (n,) to every row and draws the next, once per uniform (K, n).

        Returns tokens (K, n), their logps, and entropies if asked for.
        """
        ...


class Call:
    """One `generate` call: its requests, random numbers and what was sampled so far.

    Finished rows point at one spare request at the end of every table, so that a step needs no
    bookkeeping per row.

    Args:
        decoder: Holds the weights.
        requests: N requests.
        params: How to sample.
        is_eos: (V,) bool, True at end-of-sequence tokens.
        device: Where the decoder's tensors are.
    """

    def __init__(
        self,
        decoder: SteppingDecoder | DrawingDecoder,
        requests: Sequence[Request],
        params: SamplingParams,
        is_eos: np.ndarray,
        device: torch.device,
    ) -> None:
        self.decoder, self.params, self.device = decoder, params, device
        self.is_eos, self.count = is_eos, len(requests)
        ids: dict[Prompt, int] = {}
        prompts = [tuple(map(int, request.prompt_ids)) for request in requests]
        self.prompt_of = np.array([ids.setdefault(p, len(ids)) for p in prompts], dtype=np.int64)
        self.prompts = list(ids)
        size = (self.count + 1, params.max_tokens)
        self.uniforms = np.zeros(size if not params.greedy else (self.count + 1, 1))
        if not params.greedy:
            self.uniforms[:-1] = uniforms([request.key for request in requests], size[1])
        self.tokens = np.zeros(size, dtype=np.int64)
        self.logps = np.zeros(size, dtype=np.float32)
        self.entropies = np.zeros(size, dtype=np.float32) if params.entropy else None
        self.starts = np.array([request.start for request in requests], dtype=np.int64)
        last = [request.last(params.max_tokens) for request in requests]
        self.limits = np.array([*last, params.max_tokens + 1], dtype=np.int64)
        self.lengths = np.zeros(size[0], dtype=np.int64)
        self.ended: list[int] = []  # since they were last asked for

    def run(self, max_batch_size: int) -> Iterator[tuple[int, Completion]]:
        """Samples every request, at most `max_batch_size` rows at a time.

        Yields:
            Each request's place and its completion, once it has ended.
        """
        order = np.argsort(self.prompt_of, kind="stable")
        queues = [order] if self.decoder.joins_midway else self._waves(order, max_batch_size)
        try:
            for queue in queues:
                for index in self._run_queue(queue, max_batch_size):
                    yield index, self._completion(index)
        finally:
            self.decoder.close()

    def _waves(self, order: np.ndarray, max_batch_size: int) -> list[np.ndarray]:
        """Requests of equal prompt length, at most a batch of them each."""
        lengths = np.array([len(prompt) for prompt in self.prompts])[self.prompt_of[order]]
        groups = [order[lengths == length] for length in np.unique(lengths)]
        return [
            group[first : first + max_batch_size]
            for group in groups
            for first in range(0, len(group), max_batch_size)
        ]

    def _run_queue(self, queue: np.ndarray, max_batch_size: int) -> Iterator[int]:
        """Serves the queued requests in order, refilling the batch as rows finish.

        Yields:
            The requests that have ended.
        """
        batch = min(max_batch_size, len(queue))
        width = max(len(self.prompts[i]) for i in self.prompt_of[queue])
        rows = counts = np.zeros(0, dtype=np.int64)
        tokens = torch.zeros(0, dtype=torch.int64, device=self.device)
        while True:
            finished = int((rows == self.count).sum())
            refill = len(queue) and finished + batch - len(rows) >= _REFILL_SHARE * batch
            if finished == len(rows):
                if not len(queue):
                    return
                self.decoder.open(batch, width, width + self.params.max_tokens)
                rows, counts, tokens = rows[:0], counts[:0], tokens[:0]
            elif finished and (refill or finished >= self.decoder.shrink_share * len(rows)):
                kept = self._survivors(rows, 1 if refill else self.decoder.row_step)
                if len(kept) < len(rows):
                    self.decoder.keep(kept)
                    rows, counts = rows[kept], counts[kept]
                    tokens = tokens[torch.from_numpy(kept).to(self.device)]
            if refill:
                new, queue = np.split(queue, [batch - len(rows)])
                first = self.starts[new]
                tokens = torch.cat((tokens, self._admit(new, first)))
                rows, counts = np.concatenate((rows, new)), np.concatenate((counts, first))
            else:
                tokens = self._step(tokens, rows, counts)
            ended, self.ended = self.ended, []
            yield from ended

    def _survivors(self, rows: np.ndarray, step: int) -> np.ndarray:
        """Rows to keep, a multiple of `step`; as few as possible move: the last fill the holes."""
        alive = rows != self.count
        size = min(len(rows), -(-int(alive.sum()) // step) * step)
        kept, moved = np.arange(size), size + np.nonzero(alive[size:])[0]
        kept[np.nonzero(~alive[:size])[0][: len(moved)]] = moved
        return kept

    def _admit(self, new: np.ndarray, counts: np.ndarray) -> torch.Tensor:
        """Computes the prompts of new rows and draws their first tokens."""
        prompts, index = np.unique(self.prompt_of[new], return_inverse=True)
        logits = self.decoder.admit([self.prompts[i] for i in prompts], index)
        return self._draw(logits, new, counts)

    def _step(self, tokens: torch.Tensor, rows: np.ndarray, counts: np.ndarray) -> torch.Tensor:
        """The next tokens of all rows: one, or as many as the decoder draws ahead."""
        if not isinstance(self.decoder, DrawingDecoder):
            return self._draw(self.decoder.step(tokens), rows, counts)
        most = self.params.max_tokens
        steps = min(self.decoder.ahead, most - int(counts[rows != self.count].min()))
        # What a row draws behind its end is thrown away.
        ahead = np.minimum(counts + np.arange(steps)[:, None], self.uniforms.shape[1] - 1)
        drawn, logps, entropies = self.decoder.draw(tokens, self.uniforms[rows, ahead], self.params)
        for step in range(steps):
            entropy = None if entropies is None else entropies[step]
            self._record(drawn[step], logps[step], entropy, rows, counts)
        return torch.from_numpy(drawn[-1].copy()).to(self.device)

    def _draw(self, logits: torch.Tensor, rows: np.ndarray, counts: np.ndarray) -> torch.Tensor:
        """Draws and records one token per row, as `_record`."""
        u = torch.from_numpy(self.uniforms[rows, 0 if self.params.greedy else counts])
        tokens, logps, entropies = sample(logits, u.to(self.device), self.params)
        entropy = None if entropies is None else entropies.cpu().numpy()
        self._record(tokens.cpu().numpy(), logps.cpu().numpy(), entropy, rows, counts)
        return tokens

    def _record(
        self,
        drawn: np.ndarray,
        logps: np.ndarray,
        entropies: np.ndarray | None,
        rows: np.ndarray,
        counts: np.ndarray,
    ) -> None:
        """Records one token per row; moves `rows` and `counts` on in place."""
        check_logps(logps)
        self.tokens[rows, counts] = drawn
        self.logps[rows, counts] = logps
        if entropies is not None and self.entropies is not None:
            self.entropies[rows, counts] = entropies
        counts += 1
        self.lengths[rows] = counts
        last = self.is_eos[drawn] | (counts >= self.limits[rows])
        self.ended += rows[last & (rows != self.count)].tolist()
        rows[last] = self.count
        counts[rows == self.count] = 0

    def _completion(self, index: int) -> Completion:
        part = slice(self.starts[index], self.lengths[index])
        tokens = self.tokens[index, part].copy()
        return Completion(
            tokens=tokens,
            logps=self.logps[index, part].copy(),
            finish_reason="stop" if self.is_eos[tokens[-1]] else "length",
            entropies=None if self.entropies is None else self.entropies[index, part].copy(),
        )
