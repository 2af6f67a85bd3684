"""The batch that runners are sampling, perhaps ahead of the learners, and how old it may be."""

import logging
from typing import Any

from rllib_distrl.algorithm.sampling import GroupSampling, SampledGroups, check_finite

logger = logging.getLogger(__name__)


class FreshBatches:
    """Starts batches, finishes them, and samples again what has become too old to learn from."""

    def __init__(self, algo: Any) -> None:
        """Starts with no batch under way.

        Args:
            algo: `DistRL`, whose runners, weights and prompt sampler these are.
        """
        self._algo = algo
        self._sampling: GroupSampling | None = None
        # The prompt sampler as it was before the batch that is under way.
        self._served_before: dict[str, Any] = {}

    @property
    def under_way(self) -> bool:
        """Whether runners are sampling a batch."""
        return self._sampling is not None

    @property
    def prompts_learned(self) -> dict[str, Any]:
        """The prompt sampler's state without the prompts that are under way."""
        return self._served_before if self.under_way else self._algo.prompt_sampler.get_state()

    def lag(self, batch: SampledGroups) -> int:
        """Updates between the oldest weights that sampled and the learner's."""
        return self._algo._version - min(batch.versions())

    def start(self, n_prompts: int) -> None:
        """Lets the runners sample a batch."""
        algo = self._algo
        self._served_before = algo.prompt_sampler.get_state()
        prompts = algo.prompt_sampler.next(n_prompts)
        self._sampling = GroupSampling(
            algo.fleet, algo.env_runner, prompts, algo.config.rollout_settings.num_generations
        )
        self._sampling.start()

    def next(self, n_prompts: int) -> tuple[SampledGroups, int]:
        """A batch of weights that are young enough; older ones are dropped and sampled again.

        Returns:
            The batch, and how many episodes were dropped.

        Raises:
            NonFiniteError: for rewards or logps that are not finite.
            RunnersLostError: when the batch could not be completed.
        """
        algo = self._algo
        batch, n_stale = self._finish(n_prompts), 0
        while self.lag(batch) > algo.config.rollout_settings.max_staleness:
            n_stale += batch.n_episodes()
            logger.warning(
                "%d episodes dropped: sampled with weights version %d, the learner has %d.",
                batch.n_episodes(),
                min(batch.versions()),
                algo._version,
            )
            algo.prompt_sampler.set_state(self._served_before)
            algo._send_weights()
            batch = self._finish(n_prompts)
        return batch, n_stale

    def _finish(self, n_prompts: int) -> SampledGroups:
        if self._sampling is None:
            self.start(n_prompts)
        sampling, self._sampling = self._sampling, None
        assert sampling is not None
        algo = self._algo
        try:
            batch = sampling.finish(
                algo._latest,
                max_failures=algo.config.num_consecutive_env_runner_failures_tolerance,
                wait_s=algo.config.env_runner_health_probe_timeout_s,
            )
            check_finite(batch.groups, iteration=algo.iteration + 1)
            return batch
        except Exception:
            # A checkpoint that is written now continues with these prompts.
            algo.prompt_sampler.set_state(self._served_before)
            raise

    def drain(self) -> None:
        """Waits until the runners have nothing more to do for the batch that is under way."""
        if self._sampling is not None:
            self._sampling.drain()

    def drop(self) -> None:
        """Forgets the batch that is under way, once the runners are done with it."""
        self.drain()
        self._sampling = None
