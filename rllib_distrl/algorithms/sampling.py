"""Sampling whole groups on all runners, and refusing what unknown weights made."""

import logging
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from rllib_distrl.algorithms.env_runner_fleet import (
    NUM_HUNG_ENV_RUNNERS,
    NUM_LOST_PROMPTS,
    EnvRunnerFleet,
    first_line,
)
from rllib_distrl.env_runners.completion_env_runner import RunnerReport
from rllib_distrl.learners.refusals import NonFiniteError
from rllib_distrl.stages.prompt_samplers import PromptRequest, PromptResult

logger = logging.getLogger(__name__)

# Errors inside of runners, in one batch, that are taken for accidents of their processes.
MAX_ERRORS = 3
_SAMPLE = "sample"
_TICK_S = 0.5  # how soon the end of a runner is noticed while others work


def check_finite(groups: list[list[SingleAgentEpisode]], *, iteration: int) -> None:
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


class RunnersLostError(RuntimeError):
    """A batch could not be completed; the algorithm is as it was before the iteration."""


class SampledGroups(NamedTuple):
    """A batch.

    Attributes:
        groups: one list of episodes per prompt, in the order of the prompts.
        metrics: of the runners.
        episodes_per_runner: how many episodes each runner has contributed, by its number; the
            local one is number 0.
    """

    groups: list[list[SingleAgentEpisode]]
    metrics: list[Any]
    episodes_per_runner: dict[int, int]


def prompt_results(groups: Sequence[Sequence[SingleAgentEpisode]]) -> list[PromptResult]:
    """What the prompt sampler is told of whole groups."""
    return [
        PromptResult(
            PromptRequest(group[0].infos[0]["row"], group[0].infos[0]["visit"]),
            tuple(float(episode.get_return()) for episode in group),
            tuple(episode.infos[-1]["grade"].status for episode in group),
        )
        for group in groups
    ]


def sample_locally(
    runner: Any, prompts: Sequence[PromptRequest], num_generations: int, weights: tuple[int, str]
) -> SampledGroups:
    """Completes every prompt ``num_generations`` times in this process.

    Args:
        runner: the local `CompletionEnvRunner`.
        prompts: rows and visits from the driver's prompt sampler.
        num_generations: completions per prompt.
        weights: version and content hash that it must sample with.

    Returns:
        The batch.

    Raises:
        RuntimeError: for an error inside the runner, or foreign weights.
    """
    report = runner.sample_prompts(prompts, num_generations, weights)
    if report.error is not None:
        raise RuntimeError(f"Sampling failed in the local env runner: {report.error}")
    _check_weights("The local env runner", report, weights)
    groups = _groups(report.episodes, num_generations)
    return SampledGroups(groups, [report.metrics], {0: len(report.episodes)})


def sample_remotely(
    fleet: EnvRunnerFleet,
    prompts: Sequence[PromptRequest],
    num_generations: int,
    *,
    max_failures: int,
    wait_s: float,
) -> SampledGroups:
    """Completes every prompt ``num_generations`` times on the remote runners.

    Prompts are dealt out to the serving runners. What a lost runner held is dealt out again;
    sampling is counter-based, so the result is the same.

    Args:
        fleet: the runners, with the weights that they must sample with.
        prompts: rows and visits from the driver's prompt sampler.
        num_generations: completions per prompt.
        max_failures: rounds in a row that may complete nothing.
        wait_s: how long such a round waits for a runner where there is none.

    Returns:
        The batch.

    Raises:
        RunnersLostError: ``max_failures`` rounds have completed nothing, or there are no
            runners left.
        RuntimeError: for `MAX_ERRORS` errors inside of runners, or foreign weights.
    """
    batch = _Batch(fleet, num_generations)
    failures = 0
    while missing := [prompt for prompt in prompts if prompt not in batch.done]:
        completed = len(batch.done)
        if fleet.wait_for(1, wait_s):
            batch.collect(batch.deal(missing))
        failures = failures + 1 if len(batch.done) == completed else 0
        if failures >= max_failures or not fleet.present():
            raise RunnersLostError(
                f"{len(missing)} of {len(prompts)} prompts could not be completed: "
                f"{fleet.present()} of {fleet.wanted} env runners are left, {len(fleet.serving())} "
                f"of them serve, and {failures} tries in a row completed nothing. Look at their "
                "logs; num_consecutive_env_runner_failures_tolerance and "
                "env_runner_health_probe_timeout_s ([fault_tolerance]) allow for more."
            )
    groups = [batch.done[prompt] for prompt in prompts]
    return SampledGroups(groups, batch.metrics, batch.episodes_per_runner)


class _Batch:
    """What has come in for one batch."""

    def __init__(self, fleet: EnvRunnerFleet, num_generations: int):
        self.fleet = fleet
        self.num_generations = num_generations
        self.done: dict[PromptRequest, list[SingleAgentEpisode]] = {}
        self.metrics: list[Any] = []
        self.episodes_per_runner: dict[int, int] = {}
        self.errors = 0

    def deal(self, prompts: list[PromptRequest]) -> dict[int, list[PromptRequest]]:
        """Sends each serving runner its share."""
        numbers = self.fleet.serving()
        dealt = {number: prompts[i :: len(numbers)] for i, number in enumerate(numbers)}
        shares = {number: share for number, share in dealt.items() if share}
        self.fleet.ask(
            "sample_prompts",
            {
                number: {
                    "prompts": share,
                    "num_generations": self.num_generations,
                    "weights": self.fleet.weights,
                }
                for number, share in shares.items()
            },
        )
        return shares

    def collect(self, shares: dict[int, list[PromptRequest]]) -> None:
        """Takes the answers in until every runner has given one, is lost, or is too late."""
        fleet, started, warned = self.fleet, time.monotonic(), False
        waiting = dict(shares)
        while waiting:
            for number, answer in fleet.answers(_TICK_S):
                self._take(number, waiting.pop(number), answer)
            elapsed = time.monotonic() - started
            if waiting and elapsed > fleet.deadline_s / 2 and not warned:
                warned = True
                names = ", ".join(map(fleet.name, waiting))
                logger.warning(
                    "Waiting for %s since %.0f s; after %g s (sample_timeout_s) a runner counts "
                    "as dead.",
                    names,
                    elapsed,
                    fleet.deadline_s,
                )
            if elapsed > fleet.deadline_s:
                for number, share in waiting.items():
                    fleet.counts[NUM_HUNG_ENV_RUNNERS] += 1
                    fleet.restart(number, f"has not answered in {fleet.deadline_s:g} s")
                    self._lose(share)
                return

    def _take(self, number: int, share: list[PromptRequest], answer: Any) -> None:
        fleet = self.fleet
        if not isinstance(answer, RunnerReport):
            fleet.fail(number, f"was lost while sampling: {first_line(answer)}")
            self._lose(share)
        elif not fleet.is_process(number, answer.process):
            fleet.fail(number, "was restarted before it could sample")
            self._lose(share)
        elif answer.error is not None:
            self.errors += 1
            if self.errors >= MAX_ERRORS:
                raise RuntimeError(f"Sampling failed. {fleet.name(number)}: {answer.error}")
            fleet.restart(number, f"failed: {answer.error}")
            self._lose(share)
        else:
            _check_weights(fleet.name(number), answer, fleet.weights)
            self.metrics.append(answer.metrics)
            groups = _groups(answer.episodes, self.num_generations)
            self.done.update(zip(share, groups, strict=True))
            counts = self.episodes_per_runner
            counts[number] = counts.get(number, 0) + len(answer.episodes)

    def _lose(self, share: list[PromptRequest]) -> None:
        self.fleet.counts[NUM_LOST_PROMPTS] += len(share)


def _groups(
    episodes: list[SingleAgentEpisode], num_generations: int
) -> list[list[SingleAgentEpisode]]:
    starts = range(0, len(episodes), num_generations)
    return [episodes[start : start + num_generations] for start in starts]


def _check_weights(runner: str, report: RunnerReport, weights: tuple[int, str]) -> None:
    got = (report.weights_version, report.weights_hash)
    if got != weights:
        raise RuntimeError(
            f"{runner} has weights it should not have: version {got[0]}, hash "
            f"{got[1][:12]}; expected version {weights[0]}, hash {weights[1][:12]}. "
            "The weight sync did not happen."
        )
