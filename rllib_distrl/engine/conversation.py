"""Completions of several turns: between them somebody else has the word."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import numpy as np

from rllib_distrl.engine.protocol import Completion, Request, RolloutEngine, SamplingParams


class Answer(NamedTuple):
    """What follows a turn.

    Attributes:
        place: Of the request that is answered.
        ids: Tokens that stand behind the turn, and after which the model goes on; none: the
            completion is over.
        limit: Sampled tokens, those of all turns, at which the completion ends at the latest, as
            `Request.limit`.
    """

    place: int
    ids: Sequence[int] = ()
    limit: int = 0


class Conversation(Protocol):
    """Who answers the turns of a call's requests."""

    longest: int
    """Most tokens of a row: prompt, sampled tokens and answers together."""
    stops: Callable[[int, np.ndarray], bool] | None
    """Whether the turn of a place ends with the last of its sampled tokens (T,), counted as in
    `ended`, which is no EOS; None: never."""

    def ended(self, place: int, tokens: np.ndarray) -> bool:
        """Told that a row samples no further; whether an answer will come.

        Args:
            place: Of the request.
            tokens: (T,) sampled tokens of all its turns, from the request's `start` on.
        """
        ...

    def ready(self, *, wait: bool) -> Sequence[Answer]:
        """Answers that have come since; with `wait` at least one."""
        ...


def converse(
    engine: RolloutEngine,
    requests: Sequence[Request],
    params: SamplingParams,
    conversation: Conversation,
) -> Iterator[tuple[int, Completion]]:
    """Samples completions of several turns, each as soon as it is over.

    An engine that says `resumes` keeps what it has computed of a row while that waits; with others
    all rows take their turns together, and their past is computed again (or found in the engine's
    cache).

    Yields:
        The place of a request, and its sampled tokens of all turns, from the request's `start` on,
        as one completion.
    """
    if getattr(engine, "resumes", False):
        yield from engine.stream(requests, params, conversation)  # pyright: ignore
        return
    rows = list(requests)
    whole: list[Completion | None] = [None] * len(rows)
    asked = list(range(len(rows)))
    while asked:
        waiting = 0
        for place, more in zip(
            asked, engine.generate([rows[i] for i in asked], params), strict=True
        ):
            turn = more.cut(_until_stop(place, whole[place], more, conversation))
            before = whole[place]
            now = whole[place] = turn if before is None else before.joined(turn)
            prompt = [*rows[place].prompt_ids, *turn.tokens.tolist()]
            start = requests[place].start + len(now.tokens)
            rows[place] = replace(rows[place], prompt_ids=prompt, start=start)
            if conversation.ended(place, now.tokens):
                waiting += 1
            else:
                yield place, now
        asked = []
        while waiting:
            for answer in conversation.ready(wait=True):
                waiting -= 1
                row, now = rows[answer.place], whole[answer.place]
                assert now is not None
                if not answer.ids:
                    yield answer.place, now
                    continue
                prompt = [*row.prompt_ids, *answer.ids]
                rows[answer.place] = replace(row, prompt_ids=prompt, limit=answer.limit)
                asked.append(answer.place)
        asked.sort()


def _until_stop(
    place: int, before: Completion | None, turn: Completion, conversation: Conversation
) -> int:
    """Tokens of a turn up to its first stop string."""
    stops = conversation.stops
    if stops is None:
        return len(turn.tokens)
    tokens = turn.tokens if before is None else np.concatenate((before.tokens, turn.tokens))
    done = len(tokens) - len(turn.tokens)
    lengths = range(1, len(turn.tokens))
    return next((n for n in lengths if stops(place, tokens[: done + n])), len(turn.tokens))
