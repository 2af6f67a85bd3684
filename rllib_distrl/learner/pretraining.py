"""Teaching the critic before the policy moves, from completions of the initial policy."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
import torch
from ray.rllib.core.columns import Columns

from rllib_distrl.learner.distrl_learner import DistRLLearner
from rllib_distrl.learner.minibatches import (
    CRITIC_WEIGHTS,
    ROLLOUTS,
    generator,
    micro_batches,
    minibatch,
)
from rllib_distrl.learner.step import critic_loss
from rllib_distrl.maths.advantages import returns_to_go
from rllib_distrl.maths.calibration import explained_variance
from rllib_distrl.maths.losses import weighted_sum
from rllib_distrl.method.batch import SequenceBatch
from rllib_distrl.method.critic import check_targets
from rllib_distrl.model.sequences import from_columns
from rllib_distrl.settings import PretrainingSettings, micro_batch_budget

LOSS, EXPLAINED_VARIANCE = "critic_pretraining_loss", "critic_pretraining_explained_variance"
TOKENS = "critic_pretraining_tokens"
# One group in so many is kept out, to see what the critic has learned.
_HELD_OUT = 16


def pretrain_critic(
    learner: DistRLLearner, *, shards: Sequence[Any], table: dict[str, Any]
) -> dict[str, float]:
    """Fits the critic's own parameters to observed returns; runs on every learner at once.

    The targets are the returns to go (λ = 1): an untrained critic has nothing to bootstrap from.
    The optimiser is a new one, so that training starts with fresh moments.

    Args:
        learner: before its first update.
        shards: one reference to a list of whole episodes (whole groups) per learner.
        table: of `PretrainingSettings`.

    Returns:
        Mean loss of the last epoch, and the explained variance on the completions kept out.
    """
    settings = PretrainingSettings(**table)
    config, learners = learner.config, max(learner.config.num_learners, 1)
    rank = torch.distributed.get_rank() if learners > 1 else 0
    columns = learner.columns(ray.get(shards[rank]))
    rollouts = learner.batch_pass.looking()(columns, 1).rollouts
    returns = returns_to_go(rollouts.rewards, rollouts.loss_mask, config.gamma)
    rollouts.target_quantiles = returns.unsqueeze(-1)
    check_targets(learner.method.head, rollouts.target_quantiles, rollouts.loss_mask)
    kept_out = rollouts.group % _HELD_OUT == _HELD_OUT - 1
    module = learner.policy_module
    parameters = [p for p in module.critic_parameters() if p.requires_grad]
    lr = settings.lr or config.critic_lr or config.lr
    optimizer = torch.optim.Adam(parameters, lr)
    rows = (~kept_out).nonzero().squeeze(-1)
    steps = _steps(rows, settings, learners)
    losses = []
    for epoch in range(settings.epochs):
        drawn = torch.randperm(len(rows), generator=generator(config.seed or 0, 0, epoch))
        order = rows[drawn.to(rows)]
        for part in np.array_split(np.arange(len(rows)), steps):
            optimizer.param_groups[0]["lr"] = lr * (1 - len(losses) / (steps * settings.epochs))
            chosen = order[torch.from_numpy(part).to(rows)]
            whole = minibatch(columns, rollouts, chosen, learner.method.aggregation)
            optimizer.zero_grad()
            losses.append(_backward(learner, whole))
            if module.sharding is None:
                for parameter in parameters:
                    assert parameter.grad is not None
                    parameter.grad = rollouts.all_reduce(parameter.grad)
            if config.grad_clip:
                torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip)
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    last = rollouts.rewards.new_tensor(losses[-steps:]).mean()
    mean_loss = float(rollouts.all_reduce(last))
    return {LOSS: mean_loss, EXPLAINED_VARIANCE: _explained(module, columns, rollouts, kept_out)}


def _steps(rows: torch.Tensor, settings: PretrainingSettings, learners: int) -> int:
    """Optimiser steps of an epoch, the same on every learner."""
    steps = max(1, round(len(rows) * learners / settings.minibatch_size))
    if learners > 1:
        agreed = torch.tensor(steps, device=rows.device)
        torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MIN)
        steps = int(agreed)
    return steps


def _backward(learner: DistRLLearner, whole: dict[str, Any]) -> float:
    """Adds up the gradient of a minibatch, by micro-batches; returns this learner's loss."""
    module, total = learner.policy_module, 0.0
    # FSDP averages gradients over learners; without it their sum is taken afterwards.
    learners = 1 if module.sharding is None else learner.config.num_learners
    budget = micro_batch_budget(learner.settings.micro_batch_tokens)
    parts = module.micro_batches(from_columns(whole), budget)
    for part, counts in micro_batches(whole, parts):
        compute = functools.partial(_loss_of, learner, part)
        loss = module.differentiable(compute) * counts
        (loss * learners).backward()
        total += float(loss.detach())
    return total


def _loss_of(learner: DistRLLearner, part: dict[str, Any]) -> torch.Tensor:
    """The share of a micro-batch in the critic's loss."""
    module = learner.policy_module
    outputs = module.value_outputs({}, module.critic_states(from_columns(part)))
    losses = critic_loss(learner.method.head, outputs, part[ROLLOUTS])
    return weighted_sum(losses, part[CRITIC_WEIGHTS])


def _explained(
    module: Any,
    columns: dict[str, torch.Tensor],
    rollouts: SequenceBatch,
    kept_out: torch.Tensor,
) -> float:
    """Explained variance over this learner's kept-out rows; NaN where there are none."""
    any_kept = bool(kept_out.any())
    if module.sharding is None and not any_kept:
        return float("nan")
    # Of shards no learner may stay away.
    chosen = kept_out if any_kept else torch.ones_like(kept_out)
    some = {name: column[chosen] for name, column in columns.items()}
    values = module.compute_values(some)
    if not any_kept:
        return float("nan")
    mask = some[Columns.LOSS_MASK]
    return explained_variance(
        values, rollouts.column("target_quantiles")[kept_out].squeeze(-1), mask
    )
