"""From columns of tokens to the batch that optimiser steps learn from."""

from dataclasses import replace
from typing import Any

import torch
from ray.rllib.core.columns import Columns

from rllib_distrl.learner.before_update import FEATURES, MODEL_COLUMNS, model_columns
from rllib_distrl.learner.connector import GROUPS
from rllib_distrl.learner.importance import correct_importance
from rllib_distrl.learner.refusals import EPISODE
from rllib_distrl.maths.advantages import returns_to_go
from rllib_distrl.maths.statistics import identity
from rllib_distrl.method.batch import SequenceBatch


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
    found: dict[str, torch.Tensor] = {}
    if not module.has_critic:
        needs -= {"quantiles"}
    elif not bool(module.value_initialised):
        found = _initialise_values(learner, columns, rollouts)
    budget = config.micro_batch_tokens
    found |= learner._single_step.columns(learner.module, columns, budget, needs - found.keys())
    features = getattr(learner._uncertainty, FEATURES, None)
    needs -= found.keys()
    found |= model_columns(module, learner._reference, columns, needs, features)
    if features is not None:
        rollouts.extras[FEATURES] = found.pop(FEATURES)
    rollouts = replace(rollouts, **found)
    correction = config.importance_correction
    if correction != "none":
        logp = module.compute_logps(columns)
        correct_importance(logp, rollouts, correction, config.importance_bound)
    if learner._uncertainty is not None:
        statistic = learner._uncertainty.statistic(columns, rollouts)
        rollouts.extras[config.bonus_stat] = statistic
        rollouts.extras.pop(FEATURES, None)
    learner._method.prepare(rollouts, config)
    return rollouts


def _initialise_values(
    learner: Any, columns: dict[str, torch.Tensor], rollouts: SequenceBatch
) -> dict[str, torch.Tensor]:
    """Starts the critic at ``init_value``, or at what it is to learn: the mean return.

    That is over all learners, after the reward transforms, and discounted.

    Returns:
        The columns of the models that the transforms have read; they need not be made again.
    """
    module, value = learner._policy_module, learner.config.init_value
    found: dict[str, torch.Tensor] = {}
    if value is None:
        transforms = learner._method.reward_transforms
        needs = {need for stage in transforms for need in stage.needs} & MODEL_COLUMNS
        found = model_columns(module, learner._reference, columns, needs)
        transformed = replace(rollouts, **found, metrics={})
        learner._method.transform_rewards(transformed)
        returns = returns_to_go(transformed.rewards, rollouts.loss_mask, learner.config.gamma)[:, 0]
        total, count = rollouts.all_reduce(
            torch.stack([returns.sum(), returns.new_tensor(len(rollouts))])
        )
        value = float(total / count)
    module.initialise_values(value)
    return found
