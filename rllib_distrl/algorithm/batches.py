"""The batches that runners sample: which prompts, which groups count, and how old they may be."""

import logging
import math
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from rllib_distrl.algorithm.weight_sync import WeightSync
from rllib_distrl.learner.step import NonFiniteError
from rllib_distrl.method.allocators import Allocator, ExploreFilterReplay
from rllib_distrl.method.prompt_samplers import PromptRequest, PromptResult, PromptSampler
from rllib_distrl.rollout.completion_env_runner import Begun
from rllib_distrl.rollout.groups import Group, GroupSampling, SampledGroups

logger = logging.getLogger(__name__)

NUM_SAMPLING_ROUNDS = "num_sampling_rounds"
NUM_DROPPED_GROUPS = "num_dropped_groups"
NUM_STALE_EPISODES = "num_stale_episodes_dropped"
DEAD_GROUP_SHARE = "dead_group_share"
"""Of the batch's groups, those whose returns are all equal."""
NUM_ENV_RUNNERS = "num_env_runners"
"""How many runners have contributed to the batch."""
WEIGHTS_VERSION_LAG = "weights_version_lag"
"""Updates between the oldest weights that sampled and the learner's."""
MEAN_LAG = "weights_version_lag_mean"
"""The same for the weights that sampled each token, mean over tokens."""
NUM_EXPLORED_EPISODES = "num_explored_episodes"
"""Further completions of prompts without a correct one, see `ExploreFilterReplay`."""
NUM_OPEN_PROMPTS = "num_open_prompts"
"""Prompts that were begun and are not learned from yet."""

# Settings of what is under way, which hold until it is over.
_BOUND = ("num_generations", "max_completion_tokens", "temperature", "top_p", "top_k")


class _Ahead(NamedTuple):
    """A batch under way.

    Attributes:
        sampling: what is asked of runners.
        served_before: the prompt sampler as it was before.
        results: what the prompt sampler was told since.
    """

    sampling: GroupSampling
    served_before: dict[str, Any]
    results: list[Sequence[PromptResult]]


class Batches:
    """Serves prompts, has them completed, and hands out one batch per iteration.

    As many batches as ``max_staleness`` says are sampled ahead, while the learner learns (`start`).
    Each is sampled with the weights of the moment at which it is asked for, and they are learned
    from in that order, so that none is older than so many updates then; one that is nevertheless,
    because somebody else has updated too, is sampled again. With ``segment_tokens`` rows that are
    not over go on in the next batch, and are kept here, as plain data, until their group is whole:
    any runner can continue them. Whenever sampling fails, prompt sampler and open rows are as they
    were before, so that a checkpoint that is written then continues with the same prompts.

    Args:
        weight_sync: the runners, and the policy that they sample with.
        prompt_sampler: chooses the prompts.
        allocator: shares the completions out among them.
        config: of the algorithm.
    """

    def __init__(
        self,
        weight_sync: WeightSync,
        prompt_sampler: PromptSampler,
        allocator: Allocator,
        config: Any,
    ):
        self._weight_sync, self._prompt_sampler = weight_sync, prompt_sampler
        self._allocator = allocator
        self._rollout = config.rollout_settings
        self._max_rounds: int = config.max_sampling_rounds
        self._max_failures: int = config.num_consecutive_env_runner_failures_tolerance
        self._wait_s: float = config.env_runner_health_probe_timeout_s
        self._ahead: deque[_Ahead] = deque()
        # With segments: groups that are not whole, and whole ones that no batch had a place for.
        self._open: Begun = {}
        self._waiting: list[Group] = []
        self._unit = _groups_of_a_step(config)

    @property
    def under_way(self) -> Sequence[PromptRequest]:
        """Prompts that runners are completing ahead of `next`."""
        return [prompt for ahead in self._ahead for prompt in ahead.sampling.prompts]

    @property
    def prompts_learned(self) -> dict[str, Any]:
        """The prompt sampler's state without the prompts that are under way."""
        if not self._ahead:
            return self._prompt_sampler.get_state()
        _, before, results = self._ahead[0]
        if not results:
            return before
        now = self._prompt_sampler.get_state()
        self._prompt_sampler.set_state(before)
        for told in results:
            self._prompt_sampler.update(told)
        state = self._prompt_sampler.get_state()
        self._prompt_sampler.set_state(now)
        return state

    def take_results(self, results: Sequence[PromptResult]) -> None:
        """Tells prompt sampler and allocator what became of prompts."""
        self._prompt_sampler.update(results)
        self._allocator.update(results)
        for ahead in self._ahead:
            ahead.results.append(results)

    def start(self) -> None:
        """Lets the runners sample the next batches, as many as may be under way."""
        while len(self._ahead) < self._rollout.max_staleness:
            self._begin(self._rollout.prompts_per_iteration)

    def _begin(self, n_prompts: int) -> None:
        before = self._prompt_sampler.get_state()
        prompts = [*self._open, *self._prompt_sampler.next(n_prompts)]
        self._ahead.append(_Ahead(self._sampling_of(prompts), before, []))

    def _sampling_of(self, prompts: Sequence[PromptRequest]) -> GroupSampling:
        begun = self._open if self._rollout.segment_tokens else None
        sync, sizes = self._weight_sync, self._allocator.allocate(prompts)
        temperature = sync.sampling_temperature()
        sampling = GroupSampling(sync.fleet, sync.local_runner, prompts, sizes, temperature, begun)
        sampling.start()
        return sampling

    def next(
        self, iteration: int, *, explore: bool = True
    ) -> tuple[SampledGroups, dict[str, float]]:
        """The batch to learn from, sampled in rounds (`sample_informative`).

        Args:
            iteration: for messages.
            explore: whether an allocator that explores may ask for more.

        Returns:
            The batch, with the groups that it leaves out as ``dropped``, and counts to log.

        Raises:
            NonFiniteError: for rewards or logps that are not finite.
            RunnersLostError: when the batch could not be completed.
        """
        before = self.prompts_learned, self._open
        try:
            if self._rollout.segment_tokens:
                batch, counts = self._next_segment(iteration)
            else:
                batch, counts = sample_informative(
                    lambda n_prompts: self._young(n_prompts, iteration),
                    self._rollout.prompts_per_iteration,
                    self._max_rounds,
                )
            if explore and isinstance(self._allocator, ExploreFilterReplay):
                batch = self._explored(batch, self._allocator, iteration)
                counts[NUM_EXPLORED_EPISODES] = sum(map(len, batch.explored))
        except Exception:
            self._ahead.clear()
            self._prompt_sampler.set_state(before[0])
            self._open = before[1]
            raise
        return batch, {
            **counts,
            DEAD_GROUP_SHARE: 1.0 - sum(map(is_informative, batch.groups)) / len(batch.groups),
            NUM_STALE_EPISODES: batch.n_stale_episodes,
            NUM_ENV_RUNNERS: len(batch.episodes_per_runner),
            WEIGHTS_VERSION_LAG: self._lag(batch),
            MEAN_LAG: self._weight_sync.version - float(batch.versions().mean()),
        }

    def _explored(
        self, batch: SampledGroups, allocator: ExploreFilterReplay, iteration: int
    ) -> SampledGroups:
        """The batch with further completions of its prompts without a correct one."""
        prompts = allocator.unsolved(batch.prompt_results())
        if not prompts:
            return batch
        sync, sizes = self._weight_sync, [allocator.generations] * len(prompts)
        sampling = GroupSampling(
            sync.fleet, sync.local_runner, prompts, sizes, allocator.temperature
        )
        sampling.start()
        found = self._run(sampling, iteration)
        return _joined([batch, found])._replace(
            groups=batch.groups, dropped=batch.dropped, explored=found.groups
        )

    def _next_segment(self, iteration: int) -> tuple[SampledGroups, dict[str, int]]:
        """All groups that are whole after one more segment of each row; fresh prompts join in.

        Where too few are, there is another segment, with fresh prompts again: rows of equal length
        would otherwise all end in the same iteration, and none would go on in the next.
        """
        waiting, rounds = self._waiting, []
        while len(waiting) < self._unit or not rounds:
            rounds.append(self._run(self._first_under_way(), iteration))
            waiting, self._open = [*waiting, *rounds[-1].groups], rounds[-1].begun
        size = len(waiting) - len(waiting) % self._unit
        whole = _joined(rounds)._replace(groups=waiting[:size])
        self._waiting = waiting[size:]
        return whole, {
            NUM_SAMPLING_ROUNDS: len(rounds),
            NUM_DROPPED_GROUPS: 0,
            NUM_OPEN_PROMPTS: len(self._open) + len(self._waiting),
        }

    def _first_under_way(self, n_prompts: int | None = None) -> GroupSampling:
        """The batch that was asked for first; where none was, so many prompts are now."""
        if not self._ahead:
            self._begin(n_prompts or self._rollout.prompts_per_iteration)
        return self._ahead.popleft().sampling

    def get_state(self) -> dict[str, Any]:
        """What was sampled and is not learned from yet, where rows are sampled in segments."""
        bound = {name: getattr(self._rollout, name) for name in _BOUND}
        return {"open": dict(self._open), "waiting": list(self._waiting), "settings": bound}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on with what `get_state` gave.

        Raises:
            ValueError: where rows are not sampled in segments and there are some to go on with, or
                they were begun with other settings.
        """
        open_groups, waiting = state.get("open", {}), state.get("waiting", [])
        if (open_groups or waiting) and not self._rollout.segment_tokens:
            raise ValueError(
                f"The state has {len(open_groups) + len(waiting)} prompts whose completions are "
                "under way in segments, and [rollout] segment_tokens is 0. Set it as it was."
            )
        for name, saved in state.get("settings", {}).items():
            now = getattr(self._rollout, name)
            if (open_groups or waiting) and now != saved:
                raise ValueError(
                    f"The state has completions under way that were begun with [rollout] {name} = "
                    f"{saved}, and it is {now} now. Set it as it was."
                )
        self._open, self._waiting = open_groups, list(waiting)

    def _young(self, n_prompts: int, iteration: int) -> SampledGroups:
        """Groups of weights that are young enough."""
        sampling = self._first_under_way(n_prompts)
        batch, n_stale = self._run(sampling, iteration), 0
        while self._lag(batch) > self._rollout.max_staleness:
            n_stale += batch.n_episodes()
            logger.warning(
                "%d episodes dropped: sampled with weights version %d, the learner has %d.",
                batch.n_episodes(),
                batch.oldest_version(),
                self._weight_sync.version,
            )
            self._weight_sync.send()
            batch = self._run(self._sampling_of(sampling.prompts), iteration)
        return batch._replace(n_stale_episodes=n_stale)

    def _run(self, sampling: GroupSampling, iteration: int) -> SampledGroups:
        batch = sampling.finish(
            self._weight_sync.latest, max_failures=self._max_failures, wait_s=self._wait_s
        )
        check_finite(batch.groups, iteration=iteration)
        return batch

    def _lag(self, batch: SampledGroups) -> int:
        return self._weight_sync.version - batch.oldest_version()

    def drain(self) -> None:
        """Waits until the runners have nothing more to do for the batches that are under way."""
        for ahead in self._ahead:
            ahead.sampling.drain()

    def drop(self) -> None:
        """Forgets the batches that are under way; their prompts are served again.

        Open rows go on: each token is stamped with the weights that have sampled it.
        """
        if self._ahead:
            self.drain()
            state = self.prompts_learned
            self._ahead.clear()
            self._prompt_sampler.set_state(state)


def is_informative(group: Sequence[SingleAgentEpisode]) -> bool:
    """Says whether a group's returns differ: where they do not, group advantages are zero."""
    returns = [episode.get_return() for episode in group]
    return max(returns) > min(returns)


def sample_informative(
    sample: Callable[[int], SampledGroups], n_groups: int, max_rounds: int
) -> tuple[SampledGroups, dict[str, int]]:
    """Samples fresh prompts in place of uninformative groups until the batch is full.

    Yu et al. 2025 (arXiv 2503.14476, section 3.2), with the task's returns. Each round asks for
    as many groups as are missing (our choice; the paper oversamples). What ``max_rounds`` leave
    open is filled with uninformative groups, so that batches have one size.

    Args:
        sample: completes so many fresh prompts.
        n_groups: groups of a batch.
        max_rounds: bound on the rounds; 1 keeps every group.

    Returns:
        The batch, with the groups that it leaves out as ``dropped``, and counts to log.
    """
    rounds: list[SampledGroups] = []
    kept: list[Group] = []
    dull: list[Group] = []
    while len(kept) < n_groups and len(rounds) < max_rounds:
        rounds.append(sample(n_groups - len(kept)))
        for group in rounds[-1].groups:
            (kept if max_rounds == 1 or is_informative(group) else dull).append(group)
    missing = n_groups - len(kept)
    whole = _joined(rounds)._replace(groups=kept + dull[:missing], dropped=dull[missing:])
    return whole, {NUM_SAMPLING_ROUNDS: len(rounds), NUM_DROPPED_GROUPS: len(whole.dropped)}


def _joined(rounds: Sequence[SampledGroups]) -> SampledGroups:
    """Metrics and counts of several samplings; no groups."""
    return SampledGroups(
        groups=[],
        metrics=[metric for batch in rounds for metric in batch.metrics],
        episodes_per_runner=dict(sum((Counter(b.episodes_per_runner) for b in rounds), Counter())),
        n_stale_episodes=sum(batch.n_stale_episodes for batch in rounds),
    )


def _groups_of_a_step(config: Any) -> int:
    """The fewest groups that divide among the learners, and those of each into minibatches."""
    size = config.rollout_settings.num_generations
    minibatch = config.minibatch_size or 1
    return max(config.num_learners or 0, 1) * (minibatch // math.gcd(minibatch, size))


def check_finite(groups: Sequence[Group], *, iteration: int) -> None:
    """Refuses a batch before anything is learned from it.

    Raises:
        NonFiniteError: naming the column, the episode, its row and the iteration.
    """
    for episode in (episode for group in groups for episode in group):
        columns = {
            Columns.REWARDS: episode.rewards.data,
            Columns.ACTION_LOGP: episode.extra_model_outputs[Columns.ACTION_LOGP].data,
        }
        for name, column in columns.items():
            if not np.isfinite(column).all():
                raise NonFiniteError(
                    f"{name} of episode {episode.id_} (row {episode.infos[0]['row']}) is not "
                    f"finite in iteration {iteration}. Nothing was learned from this batch; "
                    "check the task's rewards and the model."
                )
