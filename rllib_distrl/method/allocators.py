"""Allocators: how many completions each prompt of an iteration gets, within one fixed total.

An allocator is a class, built as `allocator(num_generations, seed)` with its settings; the driver
owns it and checkpoints it. The total is `num_generations` per prompt, so that a batch has as many
completions, and about as many tokens, as without one; `explore_filter_replay` alone adds to it,
with the further methods that it has. What they learn of prompts takes prompts that
come back: a data set, or a prompt sampler with a pool.
"""

import heapq
import logging
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Protocol

import numpy as np
from pydantic import Field

from rllib_distrl.method.batch import PROMPTS_REMEMBERED, forget_oldest
from rllib_distrl.method.prompt_samplers import PromptRequest, PromptResult
from rllib_distrl.method.registry import Stage, register
from rllib_distrl.method.shapers import EDGES, bin_of
from rllib_distrl.settings import Count, NotNegative, NotNegativeInt, Positive, Share

EQUAL = "equal"
EXPLORING = 1 << 40
"""Added to a prompt's visit where it is served once more in the same iteration."""

logger = logging.getLogger(__name__)


def warn_of_rows_seen_once(allocator: Stage, sampler: Stage, n_rows: int) -> None:
    """Says so where an allocator learns nothing, because no row returns while it is remembered.

    Args:
        allocator: The stage.
        sampler: Of the prompts.
        n_rows: Of the task.
    """
    rows = min(n_rows, sampler.settings.get("pool") or n_rows)
    if allocator.name != EQUAL and rows > PROMPTS_REMEMBERED:
        logger.warning(
            "allocator %r remembers the last %s prompts, and %s are served one after the other: it "
            "will know none of them. Take a data set, or a prompt_sampler with a pool, such as "
            "{name = 'variance_mix', pool = 1000}.",
            allocator.name, f"{PROMPTS_REMEMBERED:,}", f"{rows:,}",
        )  # fmt: skip


class Allocator(Protocol):
    """What a class registered as `allocator` does.

    Attributes:
        least: Completions that every prompt gets.
    """

    least: int

    def allocate(self, prompts: Sequence[PromptRequest]) -> list[int]:
        """Completions of each prompt; of the same state and prompts always the same ones."""
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


@register("allocator", EQUAL)
class Equal:
    """As many completions of every prompt: `num_generations`."""

    def __init__(self, num_generations: int, seed: int):
        del seed
        self.least = num_generations

    def allocate(self, prompts: Sequence[PromptRequest]) -> list[int]:
        """The same for each."""
        return [self.least] * len(prompts)

    def update(self, results: Sequence[PromptResult]) -> None:
        """Nothing to learn."""

    def get_state(self) -> dict[str, Any]:
        """Nothing to remember."""
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        """Nothing to continue."""


def _fits_exploration(config: Any, *, temperature: float, **_: Any) -> None:
    name = "allocator 'explore_filter_replay'"
    if config.importance_correction == "none":
        raise ValueError(
            f"{name} learns from completions of temperature {temperature:g} and of older weights. "
            "Set importance_correction = 'truncated' or 'masked'."
        )
    if config.critic != "none":
        raise ValueError(
            f"{name} learns again from what is useful, and a critic would learn the law of that "
            f"and not the policy's; critic is {config.critic!r}. Set critic = 'none', with an "
            "advantage of groups such as 'grpo'."
        )
    if config.rollout_settings.max_staleness:
        raise ValueError(
            f"{name} asks again for what a batch has left unsolved, and with [rollout] "
            f"max_staleness = {config.rollout_settings.max_staleness} the next batch is under way "
            "by then. Set max_staleness = 0."
        )


@register("allocator", "explore_filter_replay", fits=_fits_exploration)
class ExploreFilterReplay(Equal):
    """More and hotter completions where all are wrong; useful groups are learned from again.

    EFRame (arXiv 2506.22200), after its authors' code. Every prompt gets `num_generations`
    completions; one of which none is correct gets further ones at a higher temperature, a group of
    its own. Groups with an |A| above `useful_above`, A = (R − mean)/std, are kept, and every few
    iterations all of them are learned from once more. The filter of small |A| is the shaper
    `advantage_filter`. Ours: whole groups are kept, for their advantages are made anew; importance
    weights correct for temperature and age; what is replayed joins the iteration's batch, where it
    is an update of its own there; and of explored groups the small advantages count too, unless
    the shaper takes them, where only |A| > 1 does there.
    """

    def __init__(
        self,
        num_generations: int,
        seed: int,
        *,
        generations: Annotated[int, Field(ge=2)] = 20,
        temperature: Positive = 1.2,
        useful_above: NotNegative = 1.0,
        every: NotNegativeInt = 5,
        capacity: Positive = 2.0,
    ):
        """Starts with nothing kept.

        Args:
            num_generations: Completions of each prompt.
            seed: Not read.
            generations: Further completions of a prompt that has none right.
            temperature: Of these.
            useful_above: |A| that one completion of a group must exceed for it to be kept.
            every: Iterations between replays; 0: never.
            capacity: Completions that are kept, in batches; the oldest groups go first.
        """
        super().__init__(num_generations, seed)
        self.generations, self.temperature = generations, temperature
        self.useful_above, self.every, self.capacity = useful_above, every, capacity
        self._kept: list[Any] = []
        self._iterations = 0

    @property
    def growth(self) -> float:
        """Completions of the largest batch, over those without exploration and replay."""
        return 1.0 + self.generations / self.least + (self.capacity if self.every else 0.0)

    def unsolved(self, results: Sequence[PromptResult]) -> list[PromptRequest]:
        """The prompts without a correct completion, as further visits of their rows."""
        return [
            PromptRequest(result.prompt.row, EXPLORING + result.prompt.visit)
            for result in results
            if not result.correct
        ]

    def is_useful(self, returns: Sequence[float]) -> bool:
        """Whether a group has a completion of |A| above the limit, by the sample std."""
        values = np.asarray(returns, dtype=np.float64)
        if values.min() == values.max():
            return False
        least = self.useful_above * values.std(ddof=1)
        return bool((np.abs(values - values.mean()) > least).any())

    def replay(self, groups: Sequence[Any], batch_size: int) -> list[Any]:
        """Ends an iteration: keeps what is useful of it.

        Args:
            groups: What was sampled in it, lists of episodes.
            batch_size: Completions of an iteration without exploration.

        Returns:
            Groups of earlier iterations to learn from again: all that are kept, in every few
            iterations, if they are a batch at least.
        """
        self._iterations += 1
        due = bool(self.every) and self._iterations % self.every == 0
        again = list(self._kept) if due and _rows(self._kept) >= batch_size else []
        useful = [g for g in groups if self.is_useful([one.get_return() for one in g])]
        self._kept += useful if self.every else []
        while _rows(self._kept) > self.capacity * batch_size:
            self._kept.pop(0)
        return again

    def get_state(self) -> dict[str, Any]:
        """What is kept, and the iteration."""
        return {"kept": list(self._kept), "iterations": self._iterations}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken."""
        self._kept, self._iterations = list(state["kept"]), int(state["iterations"])


def _rows(groups: Sequence[Any]) -> int:
    return sum(map(len, groups))


class _Bounded:
    """Between `least` and `most` completions of each prompt, and what is remembered of prompts."""

    name: str

    def __init__(self, num_generations: int, seed: int, n_min: int, n_max: int | None):
        self.least, self.mean, self.seed = n_min, num_generations, seed
        self.most = 3 * num_generations if n_max is None else n_max
        if not self.least < self.mean < self.most:
            raise ValueError(
                f"allocator {self.name!r} needs n_min < num_generations < n_max, or nothing could "
                f"vary; got {self.least}, {self.mean} and {self.most}. Raise [rollout] "
                "num_generations, or move the bounds."
            )
        self._seen: dict[int, list[float]] = {}

    def _remember(self, results: Sequence[PromptResult], decay: float, told: Any) -> None:
        """Adds to each row's sum of what is told of a result, and to its count."""
        for result in results:
            total, count = self._seen.pop(result.prompt.row, (0.0, 0.0))
            added = len(result.statuses)
            self._seen[result.prompt.row] = [decay * total + told(result), decay * count + added]
        forget_oldest(self._seen)

    def _rate(self, prompt: PromptRequest) -> float | None:
        """The mean of what was told of a row; None where nothing was."""
        total, count = self._seen.get(prompt.row, (0.0, 0.0))
        return total / count if count else None

    def get_state(self) -> dict[str, Any]:
        """Sums and counts of rows."""
        return {"seen": {row: list(counts) for row, counts in self._seen.items()}}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken."""
        self._seen = {int(row): list(counts) for row, counts in state["seen"].items()}


def raised(
    counts: Sequence[int], total: int, most: int, gain: Callable[[int, int], float]
) -> list[int]:
    """Counts raised one by one, each time where one more gains most, until they sum to a total.

    Args:
        counts: Where to start, with a sum of at most the total.
        total: At most `most` each.
        most: Bound of each.
        gain: Of one more, by (place, present count); not rising in the count.
    """
    counts = list(counts)
    waiting = [(-gain(i, n), i) for i, n in enumerate(counts) if n < most]
    heapq.heapify(waiting)
    for _ in range(total - sum(counts)):
        _, place = heapq.heappop(waiting)
        counts[place] += 1
        if counts[place] < most:
            heapq.heappush(waiting, (-gain(place, counts[place]), place))
    return counts


@register("allocator", "rank_budget")
class RankBudget(_Bounded):
    """n = n_min + ⌊(B − Σ n_min) rank/Σ rank⌋, at most n_max; what is left goes to the hardest.

    rank is the share of the iteration's other known prompts whose mean return so far is higher: 1
    for the hardest, and 0 for the easiest and for prompts that were never served. E3 (arXiv
    2505.18573), as its authors' code computes it; there the rank is among all prompts of the
    data, here among those of the iteration, which needs no table of all (our choice).
    """

    name = "rank_budget"

    def __init__(
        self, num_generations: int, seed: int, *, n_min: Count = 2, n_max: Count | None = None
    ):
        """Starts without results.

        Args:
            num_generations: Mean of the completions.
            seed: Not read.
            n_min: Fewest completions of a prompt.
            n_max: Most; None: three times the mean.

        Raises:
            ValueError: For bounds that leave no choice.
        """
        super().__init__(num_generations, seed, n_min, n_max)

    def allocate(self, prompts: Sequence[PromptRequest]) -> list[int]:
        """More for those that have had less return so far."""
        rates = [self._rate(prompt) for prompt in prompts]
        known = [rate for rate in rates if rate is not None]
        ranks = [
            0.0 if rate is None else sum(other > rate for other in known) / max(len(known) - 1, 1)
            for rate in rates
        ]
        total, whole = self.mean * len(prompts), sum(ranks)
        if not whole:
            return [self.mean] * len(prompts)
        spare = total - self.least * len(prompts)
        counts = [min(self.most, self.least + math.floor(spare * rank / whole)) for rank in ranks]
        for place in sorted(range(len(ranks)), key=lambda i: -ranks[i]):
            counts[place] += min(total - sum(counts), self.most - counts[place])
        return counts

    def update(self, results: Sequence[PromptResult]) -> None:
        """Adds up returns."""
        self._remember(results, 1.0, lambda result: sum(result.returns))


@register("allocator", "sqrt_variance")
class SqrtVariance(_Bounded):
    """n ∝ √(p̂ (1 − p̂) + ε): the counts for which Σ (p̂ (1 − p̂) + ε)/n is least.

    p̂ = (s + 1)/(t + 2) for s of t completions right, older visits decayed, so that unknown prompts
    count as 1/2. The allocation of least variance under a fixed total (Neyman's; derived for
    Rollout-GDRO in arXiv 2601.19280); whole numbers by taking the best next completion, which is
    exact. p̂ and ε are our choice.
    """

    name = "sqrt_variance"

    def __init__(
        self,
        num_generations: int,
        seed: int,
        *,
        n_min: Count = 2,
        n_max: Count | None = None,
        epsilon: Positive = 0.01,
        decay: Share = 0.5,
    ):
        """Starts without results.

        Args:
            num_generations: Mean of the completions.
            seed: Not read.
            n_min: Fewest completions of a prompt.
            n_max: Most; None: three times the mean.
            epsilon: Variance that remains where a prompt seems decided.
            decay: What is left of a row's older counts when new ones come.

        Raises:
            ValueError: For bounds that leave no choice.
        """
        super().__init__(num_generations, seed, n_min, n_max)
        self.epsilon, self.decay = epsilon, decay

    def variance(self, prompt: PromptRequest) -> float:
        """p̂ (1 − p̂) + ε."""
        right, seen = self._seen.get(prompt.row, (0.0, 0.0))
        rate = (right + 1.0) / (seen + 2.0)
        return rate * (1.0 - rate) + self.epsilon

    def allocate(self, prompts: Sequence[PromptRequest]) -> list[int]:
        """More for those that are undecided."""
        variances = [self.variance(prompt) for prompt in prompts]
        start = [self.least] * len(prompts)
        return raised(
            start, self.mean * len(prompts), self.most, lambda i, n: variances[i] / (n * (n + 1))
        )

    def update(self, results: Sequence[PromptResult]) -> None:
        """Counts what was correct."""
        self._remember(results, self.decay, lambda result: result.correct)


@register("allocator", "shadow_price")
class ShadowPrice(_Bounded):
    """A bandit per bin of difficulty chooses n at a price μ per completion: Rollout-GDRO.

    Prompts lie in bins of their mean pass rate, the unknown ones in one of their own. In each
    iteration a bin draws n by EXP3 with the gain ĝ = 4 v (1/n_min − 1/n)/(1/n_min − 1/n_max) −
    μ n, where v is the mean p̂ (1 − p̂) of its groups: what n completions take off the variance of a
    group's mean. μ ← max(μ + step (n_used − mean), 0). Rollout-GDRO (arXiv 2601.19280): arms,
    price and its step; the gain, EXP3 for EXP3.P and its rates are our choice, and so is that the
    counts drawn are then moved one by one to the fixed total, in proportion.
    """

    name = "shadow_price"

    def __init__(
        self,
        num_generations: int,
        seed: int,
        *,
        n_min: Count = 2,
        n_max: Count | None = None,
        price_step: NotNegative = 0.05,
        learning_rate: Positive = 0.1,
        exploration: Share = 0.1,
        hysteresis: NotNegative = 0.03,
    ):
        """Starts without results, at a price of 0.

        Args:
            num_generations: Mean of the completions.
            seed: Decides what is drawn.
            n_min: Fewest completions of a prompt.
            n_max: Most; None: three times the mean.
            price_step: Of μ.
            learning_rate: Of the bandits.
            exploration: Share of even draws.
            hysteresis: By which a rate must leave its bin, in units of it.

        Raises:
            ValueError: For bounds that leave no choice.
        """
        super().__init__(num_generations, seed, n_min, n_max)
        self.price_step, self.rate, self.exploration = price_step, learning_rate, exploration
        self.hysteresis = hysteresis
        self.price, self._steps = 0.0, 0
        self._bins: dict[int, int] = {}
        self._scores = np.zeros((len(EDGES) + 2, self.most - self.least + 1))

    def _bin(self, prompt: PromptRequest) -> int:
        return self._bins.get(prompt.row, len(EDGES) + 1)

    def probabilities(self, number: int) -> np.ndarray:
        """(arms,), of n_min … n_max in a bin."""
        raised = np.exp(self._scores[number] - self._scores[number].max())
        return (1.0 - self.exploration) * raised / raised.sum() + self.exploration / len(raised)

    def drawn(self) -> list[int]:
        """What each bin draws in this iteration."""
        rng = np.random.default_rng([self.seed, self._steps])
        arms = np.arange(self.least, self.most + 1)
        return [int(rng.choice(arms, p=self.probabilities(b))) for b in range(len(self._scores))]

    def allocate(self, prompts: Sequence[PromptRequest]) -> list[int]:
        """What the bins draw, moved to the total."""
        drawn = self.drawn()
        wanted = [drawn[self._bin(prompt)] for prompt in prompts]
        total, start = self.mean * len(prompts), wanted
        if sum(wanted) > total:
            start = [self.least] * len(prompts)
        return raised(start, total, self.most, lambda i, n: wanted[i] / (n + 1))

    def update(self, results: Sequence[PromptResult]) -> None:
        """Pays the bins for what they drew, moves the price, and puts prompts into bins."""
        drawn, spread = self.drawn(), 1.0 / self.least - 1.0 / self.most
        gains: dict[int, list[float]] = {}
        for result in results:
            rate = result.correct / len(result.statuses)
            gains.setdefault(self._bin(result.prompt), []).append(rate * (1.0 - rate))
        used = [drawn[self._bin(result.prompt)] for result in results]
        for number, variances in gains.items():
            n, variance = drawn[number], sum(variances) / len(variances)
            gain = 4.0 * variance * (1.0 / self.least - 1.0 / n) / spread - self.price * n
            arm = n - self.least
            self._scores[number, arm] += self.rate * gain / self.probabilities(number)[arm]
        over = sum(used) / max(len(used), 1) - self.mean
        self.price = max(self.price + self.price_step * over, 0.0)
        self._steps += 1
        self._remember(results, 1.0, lambda result: result.correct)
        for result in results:
            rate = self._rate(result.prompt)
            assert rate is not None
            row = result.prompt.row
            self._bins[row] = bin_of(rate, self._bins.pop(row, None), self.hysteresis)
        forget_oldest(self._bins)

    def get_state(self) -> dict[str, Any]:
        """Counts, bins, scores and the price."""
        return {
            **super().get_state(), "bins": dict(self._bins), "scores": self._scores.tolist(),
            "price": self.price, "steps": self._steps,
        }  # fmt: skip

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken.

        Raises:
            ValueError: If it has other arms.
        """
        scores = np.array(state["scores"])
        if scores.shape != self._scores.shape:
            raise ValueError(
                f"The state of shadow_price has {scores.shape[1]} arms, and n_min = {self.least}, "
                f"n_max = {self.most} are {self._scores.shape[1]}. Go on with the bounds that it "
                "was saved with, or start anew."
            )
        super().set_state(state)
        self._bins = {int(row): number for row, number in state["bins"].items()}
        self._scores, self.price, self._steps = scores, state["price"], int(state["steps"])
