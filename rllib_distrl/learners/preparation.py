"""From columns of tokens to the batch that optimiser steps learn from."""

from dataclasses import replace
from typing import Any

import torch
from ray.rllib.core.columns import Columns

from rllib_distrl.connectors.sequences_from_episodes import GROUPS
from rllib_distrl.learners.before_update import MODEL_COLUMNS, model_columns
from rllib_distrl.learners.importance import correct_importance
from rllib_distrl.learners.refusals import EPISODE
from rllib_distrl.maths.statistics import identity
from rllib_distrl.stages.batch import SequenceBatch


def prepare(learner: Any, columns: dict[str, torch.Tensor], k: int) -> SequenceBatch:
    """Runs the one pass before the update, and the stages on the whole batch.

    Args:
        learner: `DistRLLearner`.
        columns: of `SequencesFromEpisodes`.
        k: the training iteration.

    Returns:
        The batch with advantages and the critic's targets.
    """
    config = learner.config
    rollouts = SequenceBatch(
        rewards=columns[Columns.REWARDS],
        loss_mask=columns[Columns.LOSS_MASK],
        action_logp=columns[Columns.ACTION_LOGP],
        group=columns[GROUPS],
        k=k,
        width=config.rollout_settings.max_completion_tokens,
        generator=learner._generator(k),
        all_reduce=learner._all_reduce if config.num_learners > 1 else identity,
        extras={EPISODE: torch.arange(len(columns[GROUPS]), device=learner._device)},
    )
    module = learner._policy_module
    needs = learner._method.needs & MODEL_COLUMNS
    if learner._uncertainty is not None:
        needs |= learner._uncertainty.needs
    if not module.has_critic:
        needs -= {"quantiles"}
    elif not bool(module.value_initialised):
        _initialise_values(module, rollouts, config.init_value)
    budget = config.micro_batch_tokens
    found = learner._single_step.columns(learner.module, columns, budget, needs)
    found |= model_columns(module, learner._reference, columns, needs - found.keys())
    rollouts = replace(rollouts, **found)
    correction = config.importance_correction
    if correction != "none":
        logp = module.compute_logps(columns)
        correct_importance(logp, rollouts, correction, config.importance_bound)
    if learner._uncertainty is not None:
        statistic = learner._uncertainty.statistic(columns, rollouts)
        rollouts.extras[config.bonus_stat] = statistic
    learner._method.prepare(rollouts, config)
    return rollouts


def _initialise_values(module: Any, rollouts: SequenceBatch, value: float | None) -> None:
    """Starts the critic at ``value``, or at the mean return over all learners."""
    if value is None:
        returns = rollouts.returns
        total, count = rollouts.all_reduce(
            torch.stack([returns.sum(), returns.new_tensor(len(rollouts))])
        )
        value = float(total / count)
    module.initialise_values(value)
