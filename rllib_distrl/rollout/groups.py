"""Sampling whole groups on the runners; refusing what unknown weights made."""

import itertools
import logging
import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import ray
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.metrics import WEIGHTS_SEQ_NO

from rllib_distrl.engine.protocol import Completion
from rllib_distrl.method.prompt_samplers import PromptRequest, PromptResult
from rllib_distrl.rollout.completion_env_runner import Begun, RunnerReport
from rllib_distrl.rollout.fleet import (
    NUM_HUNG_ENV_RUNNERS,
    NUM_LOST_PROMPTS,
    EnvRunnerFleet,
    first_line,
)

logger = logging.getLogger(__name__)

# Errors inside of runners, in one batch, that are taken for accidents of their processes.
MAX_ERRORS = 3
Group = list[SingleAgentEpisode]
"""The episodes of one prompt."""


class _Asked(NamedTuple):
    """What a runner was asked for, in which process, and when it is too late for an answer."""

    number: int
    process: str | None
    share: list[PromptRequest]
    weights: tuple[int, str]
    due: float


_NONE_BEGUN: Begun = {}
_TICK_S = 0.5  # how soon the end of a runner is noticed while others work


class RunnersLostError(RuntimeError):
    """A batch could not be completed; the algorithm is as it was before the iteration."""


class SamplingError(RuntimeError):
    """Sampling failed inside of a runner; the algorithm is as it was before the iteration."""


class SampledGroups(NamedTuple):
    """A batch.

    Attributes:
        groups: one list of episodes per prompt, in the order of the prompts.
        metrics: of the runners.
        episodes_per_runner: how many episodes each runner has contributed, by its number; the
            local one is number 0.
        dropped: groups that were sampled and are not learned from.
        n_stale_episodes: episodes that were sampled before, with weights that are too old.
        begun: groups that are not whole yet.
        explored: further groups of the same prompts, at another temperature: they are learned
            from, and the prompt sampler is not told of them.
    """

    groups: list[Group]
    metrics: list[Any]
    episodes_per_runner: dict[int, int]
    dropped: Sequence[Group] = ()
    n_stale_episodes: int = 0
    begun: Begun = _NONE_BEGUN
    explored: Sequence[Group] = ()

    def versions(self) -> np.ndarray:
        """Of the weights that sampled, of each token of all groups."""
        episodes = (episode for group in self.groups for episode in group)
        columns = [np.asarray(one.extra_model_outputs[WEIGHTS_SEQ_NO].data) for one in episodes]
        return np.concatenate(columns)

    def oldest_version(self) -> int:
        """Of the weights that sampled."""
        return int(self.versions().min())

    def n_episodes(self) -> int:
        """Episodes of all groups."""
        return sum(map(len, self.groups))

    def prompt_results(self) -> list[PromptResult]:
        """What the prompt sampler is told of all groups, the dropped ones included."""
        return [
            PromptResult(
                PromptRequest(group[0].infos[0]["row"], group[0].infos[0]["visit"]),
                tuple(float(episode.get_return()) for episode in group),
                tuple(episode.infos[-1]["grade"].status for episode in group),
            )
            for group in (*self.groups, *self.dropped)
        ]


def shards_of(groups: Sequence[Group], learners: int) -> list[ray.ObjectRef]:
    """One reference per learner: learner r gets the groups r, r + learners, r + 2 learners …."""
    return [
        ray.put([episode for group in groups[rank::learners] for episode in group])
        for rank in range(learners)
    ]


class GroupSampling:
    """One batch: every prompt completed as often as asked, whole groups.

    Prompts are dealt out to the serving remote runners, or go to the local one where no remote
    ones are wanted. What a lost runner held is dealt out again; sampling is counter-based, so
    the result is the same.

    Args:
        fleet: the remote runners, with the weights that they must sample with.
        local_runner: samples where no remote runners are wanted.
        prompts: rows and visits from the driver's prompt sampler.
        sizes: completions of each prompt.
        temperature: of the sampling; None: the recipe's.
        begun: samples a segment of each row, behind what it has of some prompts here; None: whole
            completions.
    """

    def __init__(
        self,
        fleet: EnvRunnerFleet,
        local_runner: Any,
        prompts: Sequence[PromptRequest],
        sizes: Sequence[int],
        temperature: float | None = None,
        begun: Begun | None = None,
    ):
        self.fleet, self.local_runner = fleet, local_runner
        self.prompts, self.sizes = prompts, dict(zip(prompts, sizes, strict=True))
        self.temperature, self.begun = temperature, begun
        self.done: dict[PromptRequest, Group] = {}
        self.not_whole: dict[PromptRequest, Sequence[Completion]] = {}
        self.metrics: list[Any] = []
        self.episodes_per_runner: dict[int, int] = {}
        self.errors = 0
        self._waiting: dict[ray.ObjectRef, _Asked] = {}

    @property
    def missing(self) -> list[PromptRequest]:
        """Prompts of which nobody has sampled what was asked for yet."""
        had = self.done.keys() | self.not_whole.keys()
        return [prompt for prompt in self.prompts if prompt not in had]

    def start(self) -> None:
        """Sends each serving remote runner its share of what is missing; does not wait."""
        fleet = self.fleet
        numbers, missing = fleet.serving(), self.missing
        for first, number in enumerate(numbers[: len(missing)]):
            share = missing[first :: len(numbers)]
            call, due = fleet.ask(
                number,
                prompts=share,
                num_generations=[self.sizes[prompt] for prompt in share],
                temperature=self.temperature,
                begun=self._begun_of(share),
            )
            asked = _Asked(number, fleet.process(number), share, fleet.weights, due)
            self._waiting[call] = asked

    def _begun_of(self, share: Sequence[PromptRequest]) -> Begun | None:
        if self.begun is None:
            return None
        return {prompt: self.begun[prompt] for prompt in share if prompt in self.begun}

    def drain(self) -> None:
        """Takes the answers in until every runner has given one, is lost, or is too late."""
        fleet, warned = self.fleet, False
        while self._waiting:
            for asked, answer in fleet.answers(self._waiting, _TICK_S):
                self._take(asked, answer)
            left = min((asked.due for asked in self._waiting.values()), default=math.inf)
            left -= time.monotonic()
            if left < fleet.deadline_s / 2 and not warned:
                warned = True
                names = ", ".join(fleet.name(asked.number) for asked in self._waiting.values())
                logger.warning(
                    "Waiting for %s since %.0f s; after %g s (sample_timeout_s) a runner counts "
                    "as dead.",
                    names,
                    fleet.deadline_s - left,
                    fleet.deadline_s,
                )
            if left < 0:
                self._give_up_waiting()

    def _give_up_waiting(self) -> None:
        """Restarts the runners whose answers are too late."""
        fleet, now = self.fleet, time.monotonic()
        for call, asked in list(self._waiting.items()):
            if asked.due < now:
                del self._waiting[call]
                if fleet.serves(asked.number, asked.process):
                    fleet.counts[NUM_HUNG_ENV_RUNNERS] += 1
                    why = f"has not answered in {fleet.deadline_s:g} s"
                    fleet.restart(asked.number, why)
                self._lose(asked.share)

    def finish(
        self, latest: tuple[dict[str, Any], tuple[int, str]], *, max_failures: int, wait_s: float
    ) -> SampledGroups:
        """Waits until the batch is complete.

        Args:
            latest: the learner's weights, for runners that come into service because no other
                is left.
            max_failures: rounds in a row that may complete nothing.
            wait_s: how long such a round waits for a runner where there is none.

        Returns:
            The batch.

        Raises:
            RunnersLostError: ``max_failures`` rounds have completed nothing, or there are no
                runners left.
            SamplingError: for an error inside the local runner, one in the user's code, or
                `MAX_ERRORS` others inside of remote runners.
            RuntimeError: for foreign weights.
        """
        self.drain()
        if not self.fleet.wanted:
            self._sample_locally(latest[1])
        failures = 0
        while missing := self.missing:
            before = len(missing)
            if not self.fleet.serving():
                self.fleet.set_weights(*latest)
            if self.fleet.wait_for(1, wait_s):
                self.start()
                self.drain()
            failures = failures + 1 if len(self.missing) == before else 0
            if failures >= max_failures or not self.fleet.present():
                self._give_up(len(missing), failures)
        groups = [self.done[prompt] for prompt in self.prompts if prompt in self.done]
        begun = {p: self.not_whole[p] for p in self.prompts if p in self.not_whole}
        return SampledGroups(groups, self.metrics, self.episodes_per_runner, begun=begun)

    def _give_up(self, n_missing: int, failures: int) -> None:
        fleet = self.fleet
        raise RunnersLostError(
            f"{n_missing} of {len(self.prompts)} prompts could not be completed: "
            f"{fleet.present()} of {fleet.wanted} env runners are left, {len(fleet.serving())} "
            f"of them serve, and {failures} tries in a row completed nothing. Look at their "
            "logs; num_consecutive_env_runner_failures_tolerance and "
            "env_runner_health_probe_timeout_s ([fault_tolerance]) allow for more."
        )

    def _sample_locally(self, weights: tuple[int, str]) -> None:
        share = self.missing
        sizes = [self.sizes[prompt] for prompt in share]
        report = self.local_runner.sample_prompts(
            share, sizes, weights, self.temperature, self._begun_of(share)
        )
        if report.error is not None:
            raise SamplingError(f"Sampling failed in the local env runner: {report.error.text}")
        check_weights(
            "The local env runner", (report.weights_version, report.weights_hash), weights
        )
        self._keep(0, share, report)

    def _take(self, asked: _Asked, answer: Any) -> None:
        fleet, number = self.fleet, asked.number
        # Of several calls that a runner is lost with, the first one says so.
        news = fleet.serves(number, asked.process)
        if not isinstance(answer, RunnerReport):
            if news:
                fleet.fail(number, f"was lost while sampling: {first_line(answer)}")
            self._lose(asked.share)
        elif answer.process != asked.process:
            if news:
                fleet.fail(number, "was restarted before it could sample")
            self._lose(asked.share)
        elif answer.error is not None:
            self.errors += 1
            if answer.error.users or self.errors >= MAX_ERRORS:
                text = answer.error.text
                raise SamplingError(f"Sampling failed. {fleet.name(number)}: {text}")
            if news:
                fleet.restart(number, f"failed: {answer.error.text}")
            self._lose(asked.share)
        else:
            held = (answer.weights_version, answer.weights_hash)
            check_weights(fleet.name(number), held, asked.weights)
            self._keep(number, asked.share, answer)

    def _keep(self, number: int, share: list[PromptRequest], report: RunnerReport) -> None:
        self.metrics.append(report.metrics)
        episodes = iter(report.episodes)
        for prompt in share:
            if prompt not in report.begun:
                self.done[prompt] = list(itertools.islice(episodes, self.sizes[prompt]))
        self.not_whole.update(report.begun)
        counts = self.episodes_per_runner
        counts[number] = counts.get(number, 0) + len(report.episodes)

    def _lose(self, share: list[PromptRequest]) -> None:
        self.fleet.counts[NUM_LOST_PROMPTS] += len(share)


def check_weights(runner: str, held: tuple[int, str], expected: tuple[int, str]) -> None:
    """Compares versions and hashes.

    Raises:
        RuntimeError: if they differ.
    """
    if held != expected:
        raise RuntimeError(
            f"{runner} has weights it should not have: version {held[0]}, hash {held[1][:12]}; "
            f"expected version {expected[0]}, hash {expected[1][:12]}. "
            "The weight sync did not happen."
        )
