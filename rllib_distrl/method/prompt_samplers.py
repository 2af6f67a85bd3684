"""Prompt samplers: which prompts an iteration serves, owned by the driver and checkpointed.

A sampler is a class, built as `sampler(n_rows, seed)` with its settings. What it serves depends on
seed, settings, state and the results it has seen, never on the number of runners.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from rllib_distrl.method.registry import register

CORRECT = "correct"
LARGEST_LISTED_TASK = 10_000_000
"""A task with more rows generates them; nothing is kept for each of so many rows."""


class PromptRequest(NamedTuple):
    """A prompt to complete.

    Attributes:
        row: Its row in the task.
        visit: Tells the times apart at which a row is served; part of the random numbers' address.
    """

    row: int
    visit: int


@dataclass(frozen=True)
class PromptResult:
    """What became of a prompt.

    Attributes:
        prompt: The request.
        returns: (G,) return of each completion.
        statuses: (G,) status of each grade.
    """

    prompt: PromptRequest
    returns: tuple[float, ...]
    statuses: tuple[str, ...]

    @property
    def correct(self) -> int:
        """How many completions are correct."""
        return self.statuses.count(CORRECT)


class PromptSampler(Protocol):
    """What a class registered as `prompt_sampler` does."""

    def next(self, n: int) -> list[PromptRequest]:
        """The next n prompts, no two of them equal in row and visit."""
        ...

    def update(self, results: Sequence[PromptResult]) -> None:
        """Takes the results of the prompts served last."""
        ...

    def get_state(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken."""
        ...


class _Serving:
    """Prompts one after another from a cursor; no result changes what is served."""

    def __init__(self, n_rows: int, seed: int):
        self.n_rows, self.seed = n_rows, seed
        self.cursor = 0

    def next(self, n: int) -> list[PromptRequest]:
        """The next n prompts."""
        first, self.cursor = self.cursor, self.cursor + n
        return [self.prompt_at(position) for position in range(first, self.cursor)]

    def prompt_at(self, position: int) -> PromptRequest:
        """The prompt that is served after `position` others."""
        raise NotImplementedError

    def update(self, results: Sequence[PromptResult]) -> None:
        """Nothing to learn."""

    def get_state(self) -> dict[str, Any]:
        """The cursor: prompts served so far."""
        return {"cursor": self.cursor}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken; raises ValueError for another sampler's."""
        _check_same_sampler(self, state)
        self.cursor = int(state["cursor"])


@register("prompt_sampler", "without_replacement")
class WithoutReplacement(_Serving):
    """Every row once per epoch, in an order drawn anew for each epoch; a visit is an epoch.

    Rows of tasks that generate their problems never run out in practice; those are served in
    order, which is already random. The order is a function of (seed, epoch) alone (our choice).
    """

    def __init__(self, n_rows: int, seed: int):
        super().__init__(n_rows, seed)
        self._order: tuple[int, np.ndarray] | None = None

    def prompt_at(self, position: int) -> PromptRequest:
        """The prompt that is served after `position` others."""
        epoch, index = divmod(position, self.n_rows)
        if self.n_rows > LARGEST_LISTED_TASK:
            return PromptRequest(index, epoch)
        if self._order is None or self._order[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.n_rows)
            self._order = (epoch, order)
        return PromptRequest(int(self._order[1][index]), epoch)


@register("prompt_sampler", "uniform")
class Uniform(_Serving):
    """Any row with equal probability, again and again; a visit is the number of prompts before."""

    def prompt_at(self, position: int) -> PromptRequest:
        """The prompt that is served after `position` others."""
        row = np.random.default_rng([self.seed, position]).integers(self.n_rows)
        return PromptRequest(int(row), position)


class _Counting:
    """Keeps how many completions of each row were correct, and of how many."""

    name: str

    def __init__(self, n_rows: int, seed: int, pool: int | None):
        if pool is not None and pool < 1:
            raise ValueError(f"{self.name} needs pool >= 1, got pool={pool}.")
        rows = min(n_rows, pool or n_rows)
        if rows > LARGEST_LISTED_TASK:
            raise ValueError(
                f"{self.name} keeps counts of every row, and the task has {n_rows:,}. Set its "
                "pool, the number of rows to serve, for example to 10_000."
            )
        self.seed = seed
        self._served = 0
        self._correct: np.ndarray = np.zeros(rows)
        self._seen: np.ndarray = np.zeros(rows)

    def _requests(self, rows: Sequence[int]) -> list[PromptRequest]:
        first, self._served = self._served, self._served + len(rows)
        return [PromptRequest(row, first + place) for place, row in enumerate(rows)]

    def _count(self, results: Sequence[PromptResult], decay: float) -> None:
        """Takes results in; what rows among them counted before is decayed once."""
        rows = [result.prompt.row for result in results]
        served = list(set(rows))
        self._correct[served] *= decay
        self._seen[served] *= decay
        for row, result in zip(rows, results, strict=True):
            self._correct[row] += result.correct
            self._seen[row] += len(result.statuses)

    def get_state(self) -> dict[str, Any]:
        """Counts and cursors."""
        return {
            "served": self._served, "correct": self._correct.copy(), "seen": self._seen.copy(),
        }  # fmt: skip

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken.

        Raises:
            ValueError: If it counts other rows, or is another sampler's.
        """
        _check_same_sampler(self, state)
        counted, rows = len(state["seen"]), len(self._seen)
        if counted != rows:
            raise ValueError(
                f"The state of {self.name} has counts of {counted} rows and the task "
                f"now serves {rows}, so they would be taken for other problems. Go on with the "
                "data, pool, max_prompt_tokens and on_long_prompt that it was saved with, or "
                "start anew."
            )
        self._served = int(state["served"])
        self._correct, self._seen = np.array(state["correct"]), np.array(state["seen"])


@register("prompt_sampler", "variance_mix")
class VarianceMix(_Counting):
    """A curriculum: part of the prompts by the variance p(1 - p) of being right, the rest evenly.

    A prompt that always or never succeeds teaches little; variance-aware sampling (MMR1,
    2025) therefore mixes prompts drawn in proportion to the variance with others drawn
    without replacement. We estimate p from training itself: p = (s + 1) / (t + 2) for s of t
    completions correct, so that unseen prompts (p = 1/2) come first; what a row's earlier visits
    counted is halved at each new one, because the policy moves (our choices).
    """

    name = "variance_mix"

    def __init__(
        self,
        n_rows: int,
        seed: int,
        *,
        share: float = 0.5,
        decay: float = 0.5,
        pool: int | None = None,
    ):
        """Starts without results.

        Args:
            n_rows: Rows of the task.
            seed: Decides what is drawn.
            share: Part of an iteration's prompts that is drawn by variance.
            decay: What is left of a row's older counts when new ones come.
            pool: Only the first so many rows are served; all where None.

        Raises:
            ValueError: For settings out of bounds, or too many rows to keep counts of.
        """
        if not 0.0 < share <= 1.0 or not 0.0 <= decay <= 1.0:
            raise ValueError(
                f"variance_mix needs 0 < share <= 1 and 0 <= decay <= 1, got share={share}, "
                f"decay={decay}."
            )
        super().__init__(n_rows, seed, pool)
        self.share, self.decay = share, decay
        self._even = WithoutReplacement(len(self._seen), seed)

    @property
    def weights(self) -> np.ndarray:
        """(rows,), p (1 - p) of each."""
        rate = (self._correct + 1.0) / (self._seen + 2.0)
        return rate * (1.0 - rate)

    def next(self, n: int) -> list[PromptRequest]:
        """N prompts, round(share n) of them by variance."""
        weights, drawn = self.weights, round(self.share * n)
        rng = np.random.default_rng([self.seed, self._served])
        rows = rng.choice(len(weights), size=drawn, p=weights / weights.sum()).tolist()
        return self._requests(rows + [prompt.row for prompt in self._even.next(n - drawn)])

    def update(self, results: Sequence[PromptResult]) -> None:
        """Counts what was correct."""
        self._count(results, self.decay)

    def get_state(self) -> dict[str, Any]:
        """Counts and cursors."""
        return {**super().get_state(), "even": self._even.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken; raises ValueError as the counts do."""
        super().set_state(state)
        self._even.set_state(state["even"])


@register("prompt_sampler", "beta_thompson")
class BetaThompson(_Counting):
    """Thompson sampling of the variance: the rows with the largest p̃ (1 − p̃), p̃ ~ Beta(a, b).

    a and b are 1 and what was right or wrong so far; both fade towards 1, a little at every
    iteration and more for rows that are served, because the policy moves. Rows that were never
    served are therefore tried, and those that are neither too easy nor too hard come back (VADE,
    arXiv 2511.18902; the rates of fading are our choice).
    """

    name = "beta_thompson"

    def __init__(
        self,
        n_rows: int,
        seed: int,
        *,
        decay: float = 0.9,
        fading: float = 0.99,
        pool: int | None = None,
    ):
        """Starts without results.

        Args:
            n_rows: Rows of the task.
            seed: Decides what is drawn.
            decay: What is left of a served row's older counts.
            fading: What is left of all counts after each iteration.
            pool: Only the first so many rows are served; all where None.

        Raises:
            ValueError: For settings out of bounds, or too many rows to keep counts of.
        """
        if not 0.0 <= decay <= 1.0 or not 0.0 <= fading <= 1.0:
            raise ValueError(
                "beta_thompson needs decay and fading in [0, 1], got "
                f"decay={decay}, fading={fading}."
            )
        super().__init__(n_rows, seed, pool)
        self.decay, self.fading = decay, fading

    @property
    def beta(self) -> tuple[np.ndarray, np.ndarray]:
        """(rows,) each, a and b."""
        return self._correct + 1.0, self._seen - self._correct + 1.0

    def next(self, n: int) -> list[PromptRequest]:
        """N prompts, no row a second time before every row was served once."""
        rng = np.random.default_rng([self.seed, self._served])
        rows: list[int] = []
        while len(rows) < n:
            drawn = rng.beta(*self.beta)
            rows += np.argsort(-drawn * (1.0 - drawn), kind="stable")[: n - len(rows)].tolist()
        return self._requests(rows)

    def update(self, results: Sequence[PromptResult]) -> None:
        """Counts what was correct, and lets all counts fade."""
        self._correct *= self.fading
        self._seen *= self.fading
        self._count(results, self.decay)


@register("prompt_sampler", "beta_counts")
class BetaCounts(_Counting):
    """Rows in proportion to √(v (1 − v)) + a floor, v = a/(a + b) by decayed counts.

    a ← ρ a + r and b ← ρ b + 1 − r for each completion of a visit, ρ once per visit, from a = b
    at the prior. SPO (Single-stream Policy Optimization, arXiv 2509.13232), which ties ρ to how far
    the policy has moved; here it is fixed (our choice). No row twice in an iteration before all
    are served.
    """

    name = "beta_counts"

    def __init__(
        self,
        n_rows: int,
        seed: int,
        *,
        decay: float = 0.9,
        prior: float = 1.0,
        floor: float = 0.05,
        pool: int | None = None,
    ):
        """Starts without results.

        Args:
            n_rows: Rows of the task.
            seed: Decides what is drawn.
            decay: ρ, what is left of a served row's older counts, the prior's included.
            prior: a and b at the start.
            floor: Added to the standard deviation, so that no row is given up.
            pool: Only the first so many rows are served; all where None.

        Raises:
            ValueError: For settings out of bounds, or too many rows to keep counts of.
        """
        if not 0.0 <= decay <= 1.0 or prior <= 0.0 or floor <= 0.0:
            raise ValueError(
                "beta_counts needs 0 <= decay <= 1, prior > 0 and floor > 0, got "
                f"decay={decay}, prior={prior}, floor={floor}."
            )
        super().__init__(n_rows, seed, pool)
        self.decay, self.floor = decay, floor
        self._correct += prior
        self._seen += 2.0 * prior

    @property
    def weights(self) -> np.ndarray:
        """(rows,), what each is drawn in proportion to."""
        v = self._correct / self._seen
        return np.sqrt(np.clip(v * (1.0 - v), 0.0, None)) + self.floor

    def next(self, n: int) -> list[PromptRequest]:
        """N prompts."""
        rng = np.random.default_rng([self.seed, self._served])
        share, rows = self.weights / self.weights.sum(), []
        while len(rows) < n:
            count = min(n - len(rows), len(share))
            rows += rng.choice(len(share), size=count, replace=False, p=share).tolist()
        return self._requests(rows)

    def update(self, results: Sequence[PromptResult]) -> None:
        """Counts what was correct."""
        self._count(results, self.decay)


@register("prompt_sampler", "ucb_source")
class UcbSource:
    """Sources of data as arms: drawn by softmax of mean |A| + √(2 ln(N + 1)/(n + 1)), over τ.

    The mean is over a source's last completions, n counts all of its, N those of all sources; A is
    the standardised return of the group. Sources that teach, or were hardly tried, come more often
    (DUMP, arXiv 2504.09710, as its authors' code computes it). Rows of a source are served without
    replacement. Sources lie one after another in the data.
    """

    def __init__(
        self,
        n_rows: int,
        seed: int,
        *,
        sources: int | list[int] = 2,
        window: int = 300,
        temperature: float = 0.1,
    ):
        """Starts without results.

        Args:
            n_rows: Rows of the task.
            seed: Decides what is drawn.
            sources: Rows of each source, in order, or a number of sources of equal size.
            window: Completions that count in a source's mean.
            temperature: τ > 0.

        Raises:
            ValueError: For settings out of bounds.
        """
        sizes = [1] * sources if isinstance(sources, int) else sources
        if len(sizes) < 2 or min(sizes) < 1 or window < 1 or temperature <= 0.0:
            raise ValueError(
                "ucb_source needs two or more sources of at least one row, window >= 1 and "
                f"temperature > 0, got sources={sources}, window={window}, "
                f"temperature={temperature}."
            )
        self.seed, self.window, self.temperature = seed, window, temperature
        self._n_rows, self._given = n_rows, sources
        if isinstance(sources, int):
            ends = [n_rows * (i + 1) // sources for i in range(sources)]
        else:
            ends = np.cumsum(sizes).tolist()
        self._starts = [0, *ends[:-1]]
        self._ends = ends
        self._rows = [
            WithoutReplacement(max(1, end - start), seed)
            for start, end in zip(self._starts, ends, strict=True)
        ]
        self._served = 0
        self._gains: list[list[float]] = [[] for _ in ends]
        self._counts = [0] * len(ends)

    @property
    def shares(self) -> np.ndarray:
        """(sources,), the probability of each."""
        means = np.array([sum(gains) / len(gains) if gains else 0.0 for gains in self._gains])
        counts = np.array(self._counts)
        scores = means + np.sqrt(2.0 * np.log(counts.sum() + 1) / (counts + 1))
        raised = np.exp((scores - scores.max()) / self.temperature)
        return raised / raised.sum()

    def next(self, n: int) -> list[PromptRequest]:
        """N prompts.

        Raises:
            ValueError: If the sources are not the task's rows.
        """
        empty = any(a >= b for a, b in zip(self._starts, self._ends, strict=True))
        if self._ends[-1] != self._n_rows or empty:
            raise ValueError(
                f"ucb_source has sources={self._given}, and the task serves {self._n_rows:,} rows. "
                "Give the rows of each source, in order; on_long_prompt = 'skip' leaves some out."
            )
        rng = np.random.default_rng([self.seed, self._served])
        arms = rng.choice(len(self._ends), size=n, p=self.shares).tolist()
        first, self._served = self._served, self._served + n
        rows = [self._starts[arm] + self._rows[arm].next(1)[0].row for arm in arms]
        return [PromptRequest(row, first + place) for place, row in enumerate(rows)]

    def update(self, results: Sequence[PromptResult]) -> None:
        """Takes in how far returns were apart."""
        for result in results:
            arm = int(np.searchsorted(self._ends, result.prompt.row, side="right"))
            returns = np.array(result.returns)
            spread = returns.std(ddof=1) if len(returns) > 1 else 0.0
            gains = self._gains[arm]
            gains += np.abs((returns - returns.mean()) / (spread + 1e-6)).tolist()
            del gains[: -self.window]
            self._counts[arm] += len(returns)

    def get_state(self) -> dict[str, Any]:
        """Counts, gains and cursors."""
        return {
            "served": self._served, "counts": list(self._counts),
            "gains": [list(gains) for gains in self._gains],
            "cursors": [rows.cursor for rows in self._rows],
        }  # fmt: skip

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken.

        Raises:
            ValueError: If it has other sources, or is another sampler's.
        """
        _check_same_sampler(self, state)
        if len(state["counts"]) != len(self._counts):
            raise ValueError(
                f"The state of ucb_source has {len(state['counts'])} sources, and there are "
                f"{len(self._counts)} now. Go on with those that it was saved with, or start anew."
            )
        self._served, self._counts = int(state["served"]), list(state["counts"])
        self._gains = [list(gains) for gains in state["gains"]]
        for rows, cursor in zip(self._rows, state["cursors"], strict=True):
            rows.cursor = int(cursor)


def _check_same_sampler(sampler: Any, state: dict[str, Any]) -> None:
    present = sampler.get_state()
    if state.keys() != present.keys():
        raise ValueError(
            f"The state holds {', '.join(state)}, and {type(sampler).__name__} has "
            f"{', '.join(present)}: it is another prompt_sampler's. Go on with the one that it was "
            "saved with."
        )
