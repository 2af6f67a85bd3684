"""Loss and gradients of one optimiser step, accumulated over its micro-batches."""

import contextlib
from typing import Any

import torch
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns

from rllib_distrl.learner.importance import IMPORTANCE_WEIGHTS, SAMPLER_LOGP
from rllib_distrl.learner.losses import distrl_losses
from rllib_distrl.learner.minibatches import CRITIC_WEIGHTS, ROLLOUTS, WEIGHTS, micro_batch
from rllib_distrl.method.batch import SequenceBatch
from rllib_distrl.model.sequences import from_columns


def accumulate_gradients(learner: Any, whole: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Runs a minibatch forward and backward, micro-batch by micro-batch.

    Args:
        learner: `DistRLLearner`.
        whole: of `minibatch`.

    Returns:
        The last micro-batch's loss, by module.
    """
    for optimizer in learner._optimizer_parameters:
        optimizer.zero_grad(set_to_none=True)
    learners = max(learner.config.num_learners, 1)
    budget = learner.config.micro_batch_tokens
    parts = learner._policy_module.micro_batches(from_columns(whole), budget)
    loss_per_module: dict[str, torch.Tensor] = {}
    for number, rows in enumerate(parts):
        part = {DEFAULT_MODULE_ID: micro_batch(whole, rows)}
        with _gradient_sync(learner, last=number == len(parts) - 1):
            fwd_out = learner._single_step.take() or learner.module.forward_train(part)
            loss_per_module = learner.compute_losses(fwd_out=fwd_out, batch=part)
            # DDP averages gradients; the weights already divide by all learners' tokens.
            (loss_per_module[DEFAULT_MODULE_ID] * learners).backward()
    return loss_per_module


def _gradient_sync(learner: Any, *, last: bool) -> contextlib.AbstractContextManager[Any]:
    if learner.config.num_learners > 1 and not last:
        return learner._module[DEFAULT_MODULE_ID].no_sync()
    return contextlib.nullcontext()


def trained_gradients(learner: Any) -> dict[Any, torch.Tensor]:
    """The gradients by RLlib's keys; while the critic warms up, its own alone."""
    if learner._warming_up:
        critic = {id(parameter) for parameter in learner._policy_module.critic_parameters()}
        for parameter in learner._params.values():
            if id(parameter) not in critic:
                parameter.grad = None
    return {ref: p.grad for ref, p in learner._params.items() if p.grad is not None}


def micro_batch_loss(
    learner: Any, module: Any, batch: dict[str, Any], fwd_out: dict[str, Any]
) -> torch.Tensor:
    """The share of a micro-batch in its minibatch's loss; remembers the terms for the metrics.

    Args:
        learner: `DistRLLearner`.
        module: `DistRLModule`.
        batch: of `micro_batch`.
        fwd_out: of the module.
    """
    logp, entropy = fwd_out[Columns.ACTION_DIST_INPUTS].unbind(-1)
    quantiles = None
    if module.has_critic:
        quantiles = module.compute_quantiles(batch, fwd_out[Columns.EMBEDDINGS])
    rollouts: SequenceBatch = batch[ROLLOUTS]
    policy_loss = learner._method.policy_loss(logp, rollouts)
    if IMPORTANCE_WEIGHTS in rollouts.extras:
        policy_loss = policy_loss * rollouts.extras[IMPORTANCE_WEIGHTS]
    penalty = learner._method.regularisation(logp, rollouts)
    losses = distrl_losses(
        policy_loss,
        penalty,
        entropy,
        quantiles,
        rollouts,
        batch[WEIGHTS],
        batch[CRITIC_WEIGHTS],
        learner.config,
        learner._coefficients["entropy_coeff"],
    )
    learner._step_losses.add(losses)
    learner._refusals.watch(
        rollouts,
        policy_loss=policy_loss,
        regularisation=penalty,
        entropy=entropy,
        quantiles=quantiles,
    )
    if learner._first_step:
        sampler_logp = rollouts.extras.get(SAMPLER_LOGP, rollouts.action_logp)
        mask = rollouts.loss_mask
        learner._mismatched.append((logp.detach()[mask], sampler_logp[mask]))
    return losses.total
