"""The batch that runners are sampling: which prompts, which groups count, and how old it may be."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from rllib_distrl.algorithm.weight_sync import WeightSync
from rllib_distrl.learner.step import NonFiniteError
from rllib_distrl.method.allocators import Allocator
from rllib_distrl.method.prompt_samplers import PromptRequest, PromptSampler
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


class Batches:
    """Serves prompts, has them completed, and hands out one batch per iteration.

    A batch may be sampled ahead, while the learner learns (`start`); one that has become too old is
    sampled again. Whenever that fails, the prompt sampler is as it was before, so that a checkpoint
    that is written then continues with the same prompts.

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
        self._sampling: GroupSampling | None = None
        # The prompt sampler as it was before the batch that is under way.
        self._served_before: dict[str, Any] = {}

    @property
    def under_way(self) -> Sequence[PromptRequest]:
        """Prompts that runners are completing ahead of `next`."""
        return self._sampling.prompts if self._sampling else ()

    @property
    def prompts_learned(self) -> dict[str, Any]:
        """The prompt sampler's state without the prompts that are under way."""
        return self._served_before if self.under_way else self._prompt_sampler.get_state()

    def start(self, n_prompts: int | None = None) -> None:
        """Lets the runners sample a batch, by default one of a whole iteration."""
        self._served_before = self._prompt_sampler.get_state()
        prompts = self._prompt_sampler.next(n_prompts or self._rollout.prompts_per_iteration)
        sync = self._weight_sync
        self._sampling = GroupSampling(
            sync.fleet,
            sync.local_runner,
            prompts,
            self._allocator.allocate(prompts),
            sync.sampling_temperature(),
        )
        self._sampling.start()

    def next(self, iteration: int) -> tuple[SampledGroups, dict[str, int]]:
        """The batch to learn from, sampled in rounds (`sample_informative`).

        Args:
            iteration: for messages.

        Returns:
            The batch, with the groups that it leaves out as ``dropped``, and counts to log.

        Raises:
            NonFiniteError: for rewards or logps that are not finite.
            RunnersLostError: when the batch could not be completed.
        """
        before = self.prompts_learned
        try:
            batch, counts = sample_informative(
                lambda n_prompts: self._young(n_prompts, iteration),
                self._rollout.prompts_per_iteration,
                self._max_rounds,
            )
        except Exception:
            self._prompt_sampler.set_state(before)
            raise
        return batch, {
            **counts,
            DEAD_GROUP_SHARE: 1.0 - sum(map(is_informative, batch.groups)) / len(batch.groups),
            NUM_STALE_EPISODES: batch.n_stale_episodes,
            NUM_ENV_RUNNERS: len(batch.episodes_per_runner),
            WEIGHTS_VERSION_LAG: self._lag(batch),
        }

    def _young(self, n_prompts: int, iteration: int) -> SampledGroups:
        """Groups of weights that are young enough."""
        batch, n_stale = self._finish(n_prompts, iteration), 0
        while self._lag(batch) > self._rollout.max_staleness:
            n_stale += batch.n_episodes()
            logger.warning(
                "%d episodes dropped: sampled with weights version %d, the learner has %d.",
                batch.n_episodes(),
                batch.oldest_version(),
                self._weight_sync.version,
            )
            self._prompt_sampler.set_state(self._served_before)
            self._weight_sync.send()
            batch = self._finish(n_prompts, iteration)
        return batch._replace(n_stale_episodes=n_stale)

    def _finish(self, n_prompts: int, iteration: int) -> SampledGroups:
        if self._sampling is None:
            self.start(n_prompts)
        sampling, self._sampling = self._sampling, None
        assert sampling is not None
        batch = sampling.finish(
            self._weight_sync.latest, max_failures=self._max_failures, wait_s=self._wait_s
        )
        check_finite(batch.groups, iteration=iteration)
        return batch

    def _lag(self, batch: SampledGroups) -> int:
        return self._weight_sync.version - batch.oldest_version()

    def drain(self) -> None:
        """Waits until the runners have nothing more to do for the batch that is under way."""
        if self._sampling is not None:
            self._sampling.drain()

    def drop(self) -> None:
        """Forgets the batch that is under way; its prompts are served again."""
        if self._sampling is not None:
            self._sampling.drain()
            self._sampling = None
            self._prompt_sampler.set_state(self._served_before)


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
    whole = SampledGroups(
        groups=kept + dull[:missing],
        metrics=[metric for batch in rounds for metric in batch.metrics],
        episodes_per_runner=dict(sum((Counter(b.episodes_per_runner) for b in rounds), Counter())),
        dropped=dull[missing:],
        n_stale_episodes=sum(batch.n_stale_episodes for batch in rounds),
    )
    return whole, {NUM_SAMPLING_ROUNDS: len(rounds), NUM_DROPPED_GROUPS: len(whole.dropped)}


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
