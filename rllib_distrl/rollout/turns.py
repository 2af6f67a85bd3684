"""Sampling with an environment: the engine asks, the environment answers; in one go or in parts."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

import numpy as np

from distrl_envs.turns import EnvReply, interleaved
from rllib_distrl.engine.conversation import Answer, converse
from rllib_distrl.engine.protocol import Completion, Request, RolloutEngine, SamplingParams

SLOW_REPLIES = 32
"""How many replies of a task that replies slowly are under way at a time."""

_NOTHING = Completion(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32), "paused")


def sample_episodes(
    engine: RolloutEngine,
    requests: Sequence[Request],
    params: SamplingParams,
    env: Any,
    begun: Sequence[Completion | None] = (),
    segment: int = 0,
) -> Iterator[tuple[int, Completion]]:
    """Whole completions with what the environment replied in between, each as soon as it is over.

    With `segment` a row that has sampled so many tokens and is not over is "paused": given as
    `begun` another time, with the same or other weights, it goes on behind its last token. What
    the engine had computed of it is computed again then, with the weights that it has by then. With
    the same weights a completion in segments is the one that is sampled in one go, token for token.

    Args:
        engine: Holds the weights.
        requests: Of the environment's prompts; the key names the randomness of replies too.
        params: How to sample.
        env: The `TokenEnv`. Without turns it only says where stop strings end a completion.
        begun: What was sampled of each request before, "paused"; None or left out: nothing.
        segment: Tokens after which a row pauses; 0: never.

    Yields:
        The place of a request and its completion, with what was begun.

    Raises:
        TaskError: If the task fails.
    """
    rows = [row or _NOTHING for row in begun or [None] * len(requests)]
    if not env.has_turns:
        yield from _single_turns(engine, requests, params, env, rows, segment)
        return
    slow = ThreadPoolExecutor(SLOW_REPLIES) if env.task.replies_slowly else None
    try:
        conversation = _Replies(env, requests, slow, rows, segment)
        asked = [
            _continued(request, row, min(limit, pause))
            for request, row, limit, pause in zip(
                requests, rows, conversation.limits, conversation.pauses, strict=True
            )
        ]
        for place, more in converse(engine, asked, params, conversation):
            completion = _behind(rows[place], more)
            completion.replies = tuple(conversation.replies[place])
            if place in conversation.paused:
                completion.finish_reason = "paused"
            yield place, completion
    finally:
        if slow is not None:
            slow.shutdown(wait=False, cancel_futures=True)


def _single_turns(
    engine: Any,
    requests: Sequence[Request],
    params: SamplingParams,
    env: Any,
    rows: Sequence[Completion],
    segment: int,
) -> Iterator[tuple[int, Completion]]:
    pauses = [len(row.tokens) + (segment or params.max_tokens) for row in rows]
    asked = [_continued(*asked) for asked in zip(requests, rows, pauses, strict=True)]
    stream, stops = getattr(engine, "stream", None), getattr(engine, "stops", False)
    if env.stop and stops:
        ended = engine.stream(asked, params, _Stops(env, asked, rows, params.max_tokens))
    else:
        ended = stream(asked, params) if stream else enumerate(engine.generate(asked, params))
    for place, more in ended:
        completion = _behind(rows[place], more)
        tokens = completion.tokens.tolist()
        if not stops:
            completion = completion.cut(env.length_until_stop(tokens))
        at_limit = completion.finish_reason == "length"
        if at_limit and len(tokens) < params.max_tokens and not env.ends_turn(tokens):
            completion.finish_reason = "paused"
        yield place, completion


def _continued(request: Request, row: Completion, limit: int) -> Request:
    """The request for what comes behind a row, up to so many sampled tokens."""
    prompt = request.prompt_ids
    if len(row.tokens):
        prompt = interleaved(prompt, row.tokens.tolist(), row.replies)
    return replace(request, prompt_ids=prompt, start=len(row.tokens), limit=limit)


def _behind(row: Completion, more: Completion) -> Completion:
    return row.joined(more) if len(row.tokens) else more


class _Stops:
    """A `Conversation` in which nobody answers: rows end at a stop string."""

    def __init__(self, env: Any, asked: Sequence[Request], rows: Sequence[Completion], most: int):
        self.env, self.rows = env, rows
        self.longest = max(len(one.prompt_ids) - one.start + one.last(most) for one in asked)

    def stops(self, place: int, tokens: np.ndarray) -> bool:
        return self.env.ends_turn([*self.rows[place].tokens.tolist(), *tokens.tolist()])

    def ended(self, place: int, tokens: np.ndarray) -> bool:
        return False

    def ready(self, *, wait: bool) -> Sequence[Answer]:
        return ()


class _Replies:
    """A `Conversation` with an environment.

    Replies that come at once are asked for at once, so that a run can be repeated to the bit; slow
    ones are waited for while others sample.

    Attributes:
        replies: What was replied so far, for each request.
        limits: Sampled tokens at which each episode ends at the latest.
        pauses: Sampled tokens at which each row pauses.
        paused: Places of the rows that have.
    """

    def __init__(
        self,
        env: Any,
        requests: Sequence[Request],
        slow: ThreadPoolExecutor | None,
        rows: Sequence[Completion],
        segment: int,
    ):
        self.env, self.requests, self.slow, self.rows = env, requests, slow, rows
        self.longest: int = env.max_context_tokens
        self.stops = self._stops if env.stop else None
        self.replies: list[list[EnvReply]] = [list(row.replies) for row in rows]
        sampled = [len(row.tokens) for row in rows]
        self.limits = [self._limit(place, count) for place, count in enumerate(sampled)]
        self.pauses = [count + (segment or env.max_completion_tokens) for count in sampled]
        self.paused: set[int] = set()
        self._under_way = 0
        self._said: SimpleQueue[tuple[int, int, Future[EnvReply | None]]] = SimpleQueue()
        self._ready: list[Answer] = []

    def ended(self, place: int, tokens: np.ndarray) -> bool:
        sampled = self._all(place, tokens)
        if not self._ends_turn(place, sampled):
            if len(sampled) < self.limits[place]:
                self.paused.add(place)
            return False  # A limit has ended it.
        request = self.requests[place]
        call = (request.key[1], sampled, tuple(self.replies[place]), request.key)
        if self.slow is None:
            self._take(place, len(sampled), self.env.reply_to(*call))
        else:
            future = self.slow.submit(self.env.reply_to, *call)
            future.add_done_callback(lambda it: self._said.put((place, len(sampled), it)))
            self._under_way += 1
        return True

    def ready(self, *, wait: bool) -> Sequence[Answer]:
        self._collect(wait=wait and not self._ready)
        now, self._ready = self._ready, []
        return now

    def _collect(self, *, wait: bool) -> None:
        while self._under_way and (wait or not self._said.empty()):
            place, sampled, reply = self._said.get()
            self._under_way -= 1
            self._take(place, sampled, reply.result())
            wait = False

    def _take(self, place: int, sampled: int, reply: EnvReply | None) -> None:
        if reply is None:
            self._ready.append(Answer(place))
            return
        self.replies[place].append(reply)
        limit = self.limits[place] = self._limit(place, sampled)
        pause = self.pauses[place]
        if not reply.finish and sampled >= pause:
            self.paused.add(place)
        over = bool(reply.finish) or place in self.paused
        self._ready.append(Answer(place, () if over else reply.ids, min(limit, pause)))

    def _limit(self, place: int, sampled: int) -> int:
        prompt = len(self.requests[place].prompt_ids)
        return sampled + self.env.room(prompt, sampled, self.replies[place])

    def _all(self, place: int, tokens: np.ndarray) -> list[int]:
        """With those that were sampled before."""
        return [*self.rows[place].tokens.tolist(), *tokens.tolist()]

    def _stops(self, place: int, tokens: np.ndarray) -> bool:
        return self._ends_turn(place, self._all(place, tokens))

    def _ends_turn(self, place: int, sampled: Sequence[int]) -> bool:
        said = self.replies[place]
        return self.env.ends_turn(sampled, said[-1].at if said else 0)
