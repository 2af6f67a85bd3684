"""Drives a decoder through one call: rows that end leave, waiting requests take their place."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from rllib_distrl.engine.conversation import Answer, Conversation
from rllib_distrl.engine.protocol import Completion, Request, SamplingParams
from rllib_distrl.engine.sampling import check_logps, sample, uniforms

# Computing a few prompts costs about as much as a step: requests wait until this share of the batch
# is empty or finished. Rows that are answered come and go all the time: less may be empty, and
# answers wait until they are the same share of the rows that run.
_REFILL_SHARE, _TALK_SHARE = 0.25, 0.125

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


@runtime_checkable
class ResumingDecoder(Decoder, Protocol):
    """A decoder that keeps what it has computed of a row while the row waits for more tokens."""

    def park(self, row: int, length: int) -> Any:
        """Keeps the first `length` tokens of a row, also when the row itself is dropped."""
        ...

    def resume(self, parked: Sequence[Any], more: Sequence[Sequence[int]]) -> torch.Tensor:
        """Appends rows that were parked, with more tokens; returns logits (n, V) after these."""
        ...

    def release(self, parked: Any) -> None:
        """Forgets a parked row."""
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
        conversation: Who answers the turns of the requests; needs a `ResumingDecoder`, but where
            nobody ever answers.
    """

    def __init__(
        self,
        decoder: SteppingDecoder | DrawingDecoder,
        requests: Sequence[Request],
        params: SamplingParams,
        is_eos: np.ndarray,
        device: torch.device,
        conversation: Conversation | None = None,
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
        self.ended: list[tuple[int, int]] = []  # requests and rows, since they were last asked for
        self.conversation = conversation
        self.share = _REFILL_SHARE if conversation is None else _TALK_SHARE
        # Tokens of prompt and answers so far; rows that wait; answers that have come to them.
        prompt_lens = [len(prompt) for prompt in prompts]
        self.given = np.array(prompt_lens, dtype=np.int64) - self.starts
        self.parked: dict[int, Any] = {}
        self.answers: list[Answer] = []
        self.stopped = np.zeros(size[0], dtype=bool)

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
        length = width + int((self.limits[queue] - self.starts[queue]).max())
        if self.conversation is not None:
            length = self.conversation.longest
        rows = counts = np.zeros(0, dtype=np.int64)
        tokens = torch.zeros(0, dtype=torch.int64, device=self.device)
        self.decoder.open(batch, width, length)
        while True:
            finished = int((rows == self.count).sum())
            done = finished == len(rows)
            yield from self._listen(idle=done and not len(queue))
            refill = len(queue) and finished + batch - len(rows) >= self.share * batch
            if done:
                if not len(queue) and not self.answers:
                    return
                if len(rows):
                    self._empty(batch, width, length)
                rows, counts, tokens = rows[:0], counts[:0], tokens[:0]
            elif finished and (refill or finished >= self.decoder.shrink_share * len(rows)):
                kept = self._survivors(rows, 1 if refill else self.decoder.row_step)
                if len(kept) < len(rows):
                    self.decoder.keep(kept)
                    rows, counts = rows[kept], counts[kept]
                    tokens = tokens[torch.from_numpy(kept).to(self.device)]
            first_new, free = 0, batch - len(rows)
            if refill or (free and len(self.answers) > self.share * len(rows)):
                if self.answers:
                    new, start, drawn = self._resume(free)
                else:
                    new, queue = np.split(queue, [free])
                    start = self.starts[new]
                    drawn = self._admit(new, start)
                first_new, tokens = len(rows), torch.cat((tokens, drawn))
                rows, counts = np.concatenate((rows, new)), np.concatenate((counts, start))
            else:
                tokens = self._step(tokens, rows, counts)
            ended, self.ended = self.ended, []
            yield from (index for index, row in ended if not self._waits(index, first_new + row))

    def _empty(self, batch: int, width: int, length: int) -> None:
        """Lets all rows of the batch go; those that wait stay."""
        if self.parked:
            self.decoder.keep(np.zeros(0, dtype=np.int64))
        else:
            self.decoder.open(batch, width, length)

    def _waits(self, index: int, row: int) -> bool:
        """Whether a request whose turn has ended in this row will be answered."""
        if self.conversation is None:
            return False
        length = int(self.lengths[index])
        if not self.conversation.ended(index, self.tokens[index, self.starts[index] : length]):
            return False
        # The last token was drawn, and is not computed yet.
        past = int(self.given[index]) + length - 1
        self.parked[index] = self.decoder.park(row, past)  # pyright: ignore[reportAttributeAccessIssue]
        return True

    def _listen(self, idle: bool) -> Iterator[int]:
        """Takes the answers that have come, and waits for one while there is nothing else to do.

        Yields:
            The requests that are over.
        """
        while self.parked.keys() - {answer.place for answer in self.answers}:
            assert self.conversation is not None
            for answer in self.conversation.ready(wait=idle and not self.answers):
                if answer.ids:
                    self.answers.append(answer)
                else:
                    self.decoder.release(self.parked.pop(answer.place))  # pyright: ignore[reportAttributeAccessIssue]
                    yield answer.place
            if self.answers or not idle:
                return

    def _resume(self, most: int) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
        """Continues so many answered rows at most; returns requests, their counts, and tokens."""
        some, self.answers = self.answers[:most], self.answers[most:]
        requests = np.array([answer.place for answer in some], dtype=np.int64)
        counts = self.lengths[requests]
        last = self.tokens[requests, counts - 1].tolist()
        more = [[token, *answer.ids] for token, answer in zip(last, some, strict=True)]
        self.given[requests] += [len(answer.ids) for answer in some]
        self.limits[requests] = [min(answer.limit, self.params.max_tokens) for answer in some]
        self.stopped[requests] = False
        parked = [self.parked.pop(answer.place) for answer in some]
        logits = self.decoder.resume(parked, more)  # pyright: ignore[reportAttributeAccessIssue]
        return requests, counts, self._draw(logits, requests, counts)

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
        if self.conversation is not None and self.conversation.stops is not None:
            for row in np.nonzero(~last & (rows != self.count))[0]:
                place = int(rows[row])
                sampled = self.tokens[place, self.starts[place] : counts[row]]
                last[row] = self.stopped[place] = self.conversation.stops(place, sampled)
        mine = np.nonzero(last & (rows != self.count))[0]
        self.ended += zip(rows[mine].tolist(), mine.tolist(), strict=True)
        rows[last] = self.count
        counts[rows == self.count] = 0

    def _completion(self, index: int) -> Completion:
        part = slice(self.starts[index], self.lengths[index])
        tokens = self.tokens[index, part].copy()
        stopped = self.is_eos[tokens[-1]] or self.stopped[index]
        return Completion(
            tokens=tokens,
            logps=self.logps[index, part].copy(),
            finish_reason="stop" if stopped else "length",
            entropies=None if self.entropies is None else self.entropies[index, part].copy(),
        )
