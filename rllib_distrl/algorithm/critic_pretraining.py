"""Completions for the critic's pre-training: sampled now, or read from a file of samples."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.env.env_context import EnvContext
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.metrics import (
    ENV_RUNNER_RESULTS,
    LEARNER_RESULTS,
    NUM_ENV_STEPS_SAMPLED_LIFETIME,
)
from ray.rllib.utils.metrics.metrics_logger import MetricsLogger

from rllib_distrl.algorithm.batches import Batches
from rllib_distrl.engine.protocol import Completion, Request
from rllib_distrl.learner.pretraining import TOKENS, pretrain_critic
from rllib_distrl.rollout.episodes import Played, build_episode
from rllib_distrl.rollout.groups import Group, shards_of
from rllib_distrl.settings import PretrainingSettings

_COLUMNS = ("row", "key", "sample", "token_ids", "finish_reason", "score")


def pretrain(algo: Any, batches: Batches) -> None:
    """Teaches the critic of a `DistRL`; tokens count as sampled, wherever they come from.

    Runs of an equal budget would not be equal otherwise.

    Args:
        algo: before its first iteration.
        batches: its own.

    Raises:
        ValueError: for samples that do not fit the task.
    """
    table = algo.config.critic_pretraining
    settings = PretrainingSettings(**table)
    if settings.samples is None:
        groups = _sampled(algo, batches, settings.rollouts)
    else:
        groups = read_groups(algo, settings.samples)
    tokens = sum(len(episode) for group in groups for episode in group)
    if settings.samples is not None:
        _count(algo, tokens)
    learners = max(algo.config.num_learners, 1)
    if len(groups) < learners:
        raise ValueError(f"critic_pretraining has {len(groups)} prompts for {learners} learners.")
    shards = shards_of(groups, learners)
    results = algo.learner_group.foreach_learner(pretrain_critic, shards=shards, table=table)
    found = {TOKENS: tokens, **results.result_or_errors[0].get()}
    for name, value in found.items():
        algo.metrics.log_value((LEARNER_RESULTS, DEFAULT_MODULE_ID, name), value, window=1)


def _count(algo: Any, tokens: int) -> None:
    """Adds to RLlib's counter as a runner does: its key takes no direct logging (Ray 2.60)."""
    logger = MetricsLogger()
    logger.log_value(
        NUM_ENV_STEPS_SAMPLED_LIFETIME, tokens, reduce="lifetime_sum", with_throughput=True
    )
    algo.metrics.aggregate([logger.reduce()], key=ENV_RUNNER_RESULTS)


def _sampled(algo: Any, batches: Batches, rollouts: int) -> list[Group]:
    """Whole groups of the next prompts, an iteration's worth at a time."""
    groups: list[Group] = []
    for _ in range(rollouts // algo.config.rollout_settings.episodes_per_iteration):
        batch, _ = batches.next(algo.iteration + 1, explore=False)
        algo.metrics.aggregate(batch.metrics, key=ENV_RUNNER_RESULTS)
        batches.take_results(batch.prompt_results())
        groups += batch.groups
    return groups


def read_groups(algo: Any, path: str) -> list[Group]:
    """Saved completions as episodes, grouped by problem.

    Args:
        algo: whose env and model they must fit.
        path: Parquet with the columns of `evaluation.result.SCHEMA`: a file, or a folder of them.

    Raises:
        ValueError: no such file, a file without token ids, or problems of another task or split.
    """
    if not Path(path).exists():
        raise ValueError(f"critic_pretraining.samples is {path!r}, which is no file or folder.")
    dataset = pq.ParquetDataset(path)
    if missing := sorted(set(_COLUMNS) - set(dataset.schema.names)):
        raise ValueError(
            f"{path} has no column {missing[0]!r}: it is not a file of samples, or an older "
            "version wrote it. Write it with `distrl eval RECIPE eval.split=train --out DIR`."
        )
    samples = dataset.read(columns=list(_COLUMNS)).to_pylist()
    env: Any = algo.env_creator(EnvContext(algo.config.env_config, worker_index=0))
    try:
        if env.unwrapped.has_turns:
            raise ValueError(
                f"The task {env.unwrapped.task.name!r} replies between turns; a critic is "
                "pretrained on single completions. Leave the pretraining out."
            )
        groups: dict[int, list[SingleAgentEpisode]] = {}
        for record in samples:
            groups.setdefault(record["row"], []).append(_episode(env, record, path))
    finally:
        env.close()
    return list(groups.values())


def _episode(env: Any, record: dict[str, Any], path: str) -> SingleAgentEpisode:
    row, tokens = record["row"], np.asarray(record["token_ids"], dtype=np.int64)
    observation, info = env.reset(options={"row": row})
    if info["problem"].key != record["key"]:
        raise ValueError(
            f"{path} holds completions of other problems: row {row} is {record['key']!r} there "
            f"and {info['problem'].key!r} in the split {env.unwrapped.task.split!r} that is "
            "trained on. Sample that split: eval.split=train."
        )
    if len(tokens) > env.unwrapped.max_completion_tokens:
        raise ValueError(
            f"{path} holds a completion of {len(tokens)} tokens; max_completion_tokens is "
            f"{env.unwrapped.max_completion_tokens}."
        )
    request = Request(info["prompt_ids"], (0, row, record["sample"], 0))
    # The policy does not learn from these: how they were sampled, and its logps, are not asked.
    unknown = np.zeros(len(tokens))
    completion = Completion(tokens, unknown, record["finish_reason"], versions=unknown)
    rewards = [0.0] * (len(tokens) - 1) + [record["score"]]
    observations = [observation, *tokens.tolist()]
    infos = [info, *[{}] * (len(tokens) - 1), {"finish_reason": record["finish_reason"]}]
    played = Played(observations, rewards, infos, terminated=True, truncated=False)
    return build_episode(env, request, completion, played, {})
