"""Sampling groups whose completions branch off from one another at replies."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rllib_distrl.engine.protocol import Completion, Request, RolloutEngine, SamplingParams
from rllib_distrl.rollout.turns import sample_episodes


def sample_branching(
    engine: RolloutEngine,
    requests: Sequence[Request],
    params: SamplingParams,
    env: Any,
    sizes: Sequence[int],
    method: Any,
) -> tuple[list[Completion], list[int]]:
    """Whole completions of groups, some of which share their beginning with another one.

    What branches off is found in completions that are whole already, turn by turn: given its
    beginning, what follows a branch does not depend on what has become of the other completion, so
    nothing needs to wait for anything. A branch goes on with random numbers of its own, those of
    its request; where none branches, the completions are those of `sample_episodes`.

    Args:
        engine: Holds the weights; reports entropies.
        requests: Of all groups, one after the other.
        params: How to sample.
        env: The `TokenEnv`, of a task that replies.
        sizes: Completions of each group.
        method: See `method.branching.Arpo`.

    Returns:
        The completions, and how many tokens each shares with the one that it has branched from.
    """
    groups = _Groups(engine, requests, replace(params, entropy=True), env, method)
    ends = np.cumsum(sizes).tolist()
    for start, end in zip([0, *ends], ends, strict=False):
        groups.free.append(list(range(start + method.initial(end - start), end)))
    waiting = {place for free in groups.free for place in free}
    groups.sample({place: None for place in range(len(requests)) if place not in waiting})
    turn = 0
    while any(groups.free) and any(len(row.replies) > turn for row in groups.rows.values()):
        groups.sample(
            {
                place: beginning
                for free, start, end in zip(groups.free, [0, *ends], ends, strict=False)
                for place, beginning in groups.branches(free, range(start, end), turn)
            }
        )
        turn += 1
    groups.sample({place: None for free in groups.free for place in free})
    places = range(len(requests))
    return [groups.rows[place] for place in places], [groups.shared.get(p, 0) for p in places]


class _Groups:
    """The completions so far.

    Attributes:
        rows: Whole ones, by the place of their request.
        free: Of each group the places that are still to be sampled.
        shared: Tokens that a branch has in common with what it comes from, by place.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        requests: Sequence[Request],
        params: SamplingParams,
        env: Any,
        method: Any,
    ):
        self._engine, self._requests, self._params = engine, requests, params
        self._env, self._method = env, method
        self.rows: dict[int, Completion] = {}
        self.free: list[list[int]] = []
        self.shared: dict[int, int] = {}
        self._own_turn: dict[int, int] = {}  # the first turn that a branch has sampled itself

    def sample(self, asked: dict[int, Completion | None]) -> None:
        """Samples to their ends: from the prompt, or behind what they begin with."""
        places = sorted(asked)
        found = sample_episodes(
            self._engine,
            [self._requests[place] for place in places],
            self._params,
            self._env,
            [asked[place] for place in places],
        )
        for at, completion in found:
            self.rows[places[at]] = completion

    def branches(
        self, free: list[int], group: Sequence[int], turn: int
    ) -> Iterator[tuple[int, Completion]]:
        """Takes free places of a group for what branches off at its replies of a turn."""
        for place in [place for place in group if place in self.rows]:
            row, own = self.rows[place], self._own_turn.get(place, 0)
            # A branch cannot branch again at the reply that it begins with.
            if turn < own or len(row.replies) <= turn or row.replies[turn].finish is not None:
                continue
            entropies = self._entropy(row, turn), self._entropy(row, own)
            draws = np.random.default_rng((*self._requests[place].key, turn))
            for uniform in draws.random(self._method.branches):
                if free and self._method.takes(*entropies, uniform):
                    yield self._branch(free.pop(0), row, turn)

    def _branch(self, place: int, row: Completion, turn: int) -> tuple[int, Completion]:
        at = row.replies[turn].at
        self.shared[place], self._own_turn[place] = at, turn + 1
        beginning = replace(row.cut(at), finish_reason="paused", replies=row.replies[: turn + 1])
        return place, beginning

    def _entropy(self, row: Completion, turn: int) -> float:
        """Of a turn's first tokens together, over the logarithm of the vocabulary."""
        assert row.entropies is not None
        start = row.replies[turn - 1].at if turn else 0
        end = row.replies[turn].at if turn < len(row.replies) else len(row.tokens)
        first = row.entropies[start : min(end, start + self._method.first_tokens)]
        return float(first.sum()) / float(np.log(self._env.vocab_size))
