"""Sampling where an environment replies: the engine asks, the environment answers."""

from collections.abc import Iterator, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np

from distrl_envs.turns import EnvReply
from rllib_distrl.engine.conversation import Answer, converse
from rllib_distrl.engine.protocol import Completion, Request, RolloutEngine, SamplingParams

SLOW_REPLIES = 32
"""How many replies of a task that replies slowly are under way at a time."""


def sample_episodes(
    engine: RolloutEngine, requests: Sequence[Request], params: SamplingParams, env: Any
) -> Iterator[tuple[int, Completion]]:
    """Whole completions with what the environment replied in between, each as soon as it is over.

    Args:
        engine: Holds the weights.
        requests: Of the environment's prompts; the key names the randomness of replies too.
        params: How to sample.
        env: The `TokenEnv`. Without turns it only says where stop strings end a completion.

    Yields:
        The place of a request and its completion.

    Raises:
        TaskError: If the task fails.
    """
    if not env.has_turns:
        stream = getattr(engine, "stream", None)
        ended = stream(requests, params) if stream else enumerate(engine.generate(requests, params))
        for place, completion in ended:
            yield place, completion.cut(env.length_until_stop(completion.tokens.tolist()))
        return
    slow = ThreadPoolExecutor(SLOW_REPLIES) if env.task.replies_slowly else None
    try:
        conversation = _Replies(env, requests, slow)
        asked = [
            replace(request, limit=env.room(len(request.prompt_ids), 0)) for request in requests
        ]
        for place, completion in converse(engine, asked, params, conversation):
            completion.replies = tuple(conversation.replies[place])
            yield place, completion
    finally:
        if slow is not None:
            slow.shutdown(wait=False, cancel_futures=True)


class _Replies:
    """A `Conversation` with an environment.

    Replies that come at once are asked for at once, so that a run can be repeated to the bit; slow
    ones are waited for while others sample.
    """

    def __init__(self, env: Any, requests: Sequence[Request], slow: ThreadPoolExecutor | None):
        self.env, self.requests, self.slow = env, requests, slow
        self.longest: int = env.max_context_tokens
        self.stops = self._ends_turn if env.stop else None
        self.replies: list[list[EnvReply]] = [[] for _ in requests]
        self._asked: dict[Future[EnvReply | None], tuple[int, int]] = {}
        self._ready: list[Answer] = []

    def ended(self, place: int, tokens: np.ndarray) -> bool:
        if not self._ends_turn(place, tokens):
            return False  # A limit has ended it.
        request = self.requests[place]
        known = tuple(self.replies[place])
        call = (request.key[1], tokens.tolist(), known, request.key)
        if self.slow is None:
            self._take(place, len(tokens), self.env.reply_to(*call))
        else:
            future = self.slow.submit(self.env.reply_to, *call)
            self._asked[future] = (place, len(tokens))
        return True

    def ready(self, *, wait: bool) -> Sequence[Answer]:
        self._collect(wait=wait and not self._ready)
        now, self._ready = self._ready, []
        return now

    def _collect(self, *, wait: bool) -> None:
        patience = None if wait else 0
        done, _ = futures.wait(self._asked, patience, return_when=futures.FIRST_COMPLETED)
        for future in done:
            self._take(*self._asked.pop(future), future.result())

    def _take(self, place: int, sampled: int, reply: EnvReply | None) -> None:
        if reply is None:
            self._ready.append(Answer(place))
            return
        self.replies[place].append(reply)
        prompt = len(self.requests[place].prompt_ids)
        limit = sampled + self.env.room(prompt, sampled, self.replies[place])
        self._ready.append(Answer(place, () if reply.finish else reply.ids, limit))

    def _ends_turn(self, place: int, tokens: np.ndarray) -> bool:
        said = self.replies[place]
        return self.env.ends_turn(tokens.tolist(), said[-1].at if said else 0)
