"""One optimiser step: its optimisers, its loss, the sums over micro-batches, and refusals.

A step whose loss or gradient is not finite is refused, counted, and named.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from ray.rllib.core.columns import Columns
from ray.rllib.core.learner.learner import DEFAULT_OPTIMIZER
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from rllib_distrl.learner.minibatches import CRITIC_WEIGHTS, EPISODE, ROLLOUTS, STEP, WEIGHTS
from rllib_distrl.maths.losses import weighted_sum
from rllib_distrl.maths.statistics import AllReduce, identity
from rllib_distrl.method.batch import SequenceBatch
from rllib_distrl.method.critic import Head
from rllib_distrl.method.pipeline import IMPORTANCE_WEIGHTS, SAMPLER_LOGP, Method
from rllib_distrl.model.sharding import local
from rllib_distrl.settings import TrainingSettings


def lr_factor(
    k: int,
    schedule: str = "constant",
    *,
    warmup_iterations: int = 0,
    decay_iterations: int | None = None,
    min_ratio: float = 0.0,
) -> float:
    """What the learning rate is multiplied by in iteration k.

    Warm-up over w iterations: k/w. Then `constant`: 1. `cosine`: m + (1 − m)(1 + cos πp)/2 with
    p = (k − w)/(K − w), 1 at k = w (or at k = 1 without warm-up) and m from k = K on (Loshchilov
    & Hutter 2017, eq. 5, without restarts).

    Args:
        k: Training iteration, from 1.
        schedule: "constant" or "cosine".
        warmup_iterations: w ≥ 0.
        decay_iterations: K > w, needed for "cosine".
        min_ratio: m in [0, 1].

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: For an unknown schedule, or "cosine" without a K above w.
    """
    if schedule not in ("constant", "cosine"):
        raise ValueError(f"lr_schedule is {schedule!r}; it must be one of constant, cosine.")
    if k < warmup_iterations:
        return k / warmup_iterations
    if schedule == "constant":
        return 1.0
    top = max(warmup_iterations, 1)
    if decay_iterations is None or decay_iterations <= top:
        raise ValueError(
            f"lr_schedule='cosine' needs lr_decay_iterations above {top} (the warm-up's end), "
            f"got {decay_iterations}: the number of iterations is usual."
        )
    progress = min((k - top) / (decay_iterations - top), 1.0)
    return min_ratio + (1.0 - min_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))


CRITIC_OPTIMIZER = "critic"
Rate = float | list[list[float]]
"""A number, or RLlib's schedule of (env step, number)."""


class Owned(NamedTuple):
    """An optimiser, with what RLlib is to know of it.

    Attributes:
        name: for RLlib.
        optimizer: Adam.
        parameters: that it owns.
        schedule: RLlib's, in whose hands it stays; None: `set_learning_rates` sets a number anew
            for each iteration.
    """

    name: str
    optimizer: Optimizer
    parameters: list[nn.Parameter]
    schedule: Rate | None


def learning_rates(lr: Rate, critic_lr: float | None) -> dict[str, Rate]:
    """By the optimisers' names."""
    return {DEFAULT_OPTIMIZER: lr, CRITIC_OPTIMIZER: lr if critic_lr is None else critic_lr}


def make_optimizers(module: Any, rates: Mapping[str, Rate]) -> list[Owned]:
    """Adam for the policy and, where there is a critic, one of its own.

    Args:
        module: `CausalLMModule`.
        rates: of `learning_rates`.
    """
    critic = module.critic_parameters()
    own = {id(parameter) for parameter in critic}
    policy = [p for p in module.parameters() if id(p) not in own and p.requires_grad]
    critic = [p for p in critic if p.requires_grad]
    found = []
    for name, parameters in ((DEFAULT_OPTIMIZER, policy), (CRITIC_OPTIMIZER, critic)):
        rate = rates[name]
        if parameters:
            number = rate if isinstance(rate, (int, float)) else 0.0
            schedule = None if isinstance(rate, (int, float)) else rate
            found.append(Owned(name, Adam(parameters, lr=number), parameters, schedule))
    return found


def set_learning_rates(
    optimizers: Iterable[tuple[str, Optimizer]], rates: Mapping[str, Rate], factor: float
) -> None:
    """Sets the learning rates that are numbers, times ``factor``."""
    for name, optimizer in optimizers:
        rate = rates[name]
        if isinstance(rate, (int, float)):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor


def lr_schedule_settings(settings: TrainingSettings) -> dict[str, Any]:
    """The arguments of `lr_factor` that ``settings`` give."""
    return {
        "schedule": settings.lr_schedule,
        "warmup_iterations": settings.lr_warmup_iterations,
        "decay_iterations": settings.lr_decay_iterations,
        "min_ratio": settings.lr_min_ratio,
    }


_INPUTS = ("advantages", "target_quantiles")
# Columns that a loss of whole groups leaves in the `extras` of its minibatch.
GROUP_GRADIENT, GROUP_LOSS = "group_loss_gradient", "group_loss"


@dataclass
class Losses:
    """Scalars of a micro-batch, a step or an iteration; the names are RLlib's metric keys."""

    total_loss: Tensor | float = 0.0
    policy_loss: Tensor | float = 0.0
    vf_loss: Tensor | float = 0.0
    entropy: Tensor | float = 0.0
    regularisation: Tensor | float = 0.0

    @property
    def total(self) -> Tensor:
        """What is differentiated."""
        assert isinstance(self.total_loss, Tensor)
        return self.total_loss

    def add(self, other: "Losses") -> None:
        """Adds another micro-batch's share."""
        for each in fields(self):
            value = getattr(other, each.name)
            value = value.detach() if isinstance(value, Tensor) else value
            setattr(self, each.name, getattr(self, each.name) + value)

    @staticmethod
    def mean(steps: list["Losses"], all_reduce: AllReduce = identity) -> dict[str, float]:
        """Means over optimiser steps, by RLlib's keys.

        Args:
            steps: shares of one learner; its weights divide by the tokens of all.
            all_reduce: sum over learners.
        """
        names = [each.name for each in fields(Losses)]
        sums = [sum(float(getattr(step, name)) for step in steps) for name in names]
        device = torch.as_tensor(steps[0].total_loss).device
        total = all_reduce(torch.tensor(sums, dtype=torch.float64, device=device))
        return dict(zip(names, (total / len(steps)).tolist(), strict=True))


@dataclass
class Step:
    """What an optimiser step is told, and what comes of it; travels in its micro-batches.

    Attributes:
        coefficients: of the loss in this iteration, by the names of `[training]`.
        critic_only: whether the policy stays, because the critic warms up.
        first: whether the weights are those before the update.
        forward: outputs of the only micro-batch, where they are there already.
        losses: sums over the micro-batches so far.
        logps: of each micro-batch's tokens (M,), the learner's and the sampler's; of first steps.
        suspects: numbers by name and their rows, for the message if the step is refused.
    """

    coefficients: Mapping[str, float]
    critic_only: bool = False
    first: bool = False
    forward: dict[str, Any] | None = None
    losses: Losses = field(default_factory=Losses)
    logps: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    suspects: list[tuple[str, Tensor, SequenceBatch]] = field(default_factory=list)

    def watch(self, rollouts: SequenceBatch, **outputs: Tensor | float | None) -> None:
        """Remembers the numbers of a micro-batch, in case its step is refused.

        Args:
            rollouts: Its rows, with advantages and targets.
            **outputs: (B, T) or (B, T, N) by name; padding does not count.
        """
        inputs = {name: getattr(rollouts, name) for name in _INPUTS}
        for name, column in {**inputs, **outputs}.items():
            if isinstance(column, Tensor):
                self.suspects.append((name, column.detach(), rollouts))


@dataclass(frozen=True)
class Objective:
    """The loss of an update: the method's terms, weighed as `[training]` says."""

    method: Method
    settings: TrainingSettings

    def of_micro_batch(self, module: Any, batch: dict[str, Any], fwd_out: dict[str, Any]) -> Tensor:
        """The share of a micro-batch in its minibatch's loss; notes the terms in its `Step`.

        Args:
            module: `DistRLModule`.
            batch: of `micro_batch`, with ``step``.
            fwd_out: of the module.
        """
        step: Step = batch[STEP]
        rollouts: SequenceBatch = batch[ROLLOUTS]
        logp, entropy = fwd_out[Columns.ACTION_DIST_INPUTS].unbind(-1)
        outputs = value_losses = None
        if module.has_critic:
            outputs = module.value_outputs(batch, fwd_out[Columns.EMBEDDINGS])
            value_losses = critic_loss(self.method.head, outputs, rollouts)
        policy_loss = self._policy_loss(logp, rollouts, step.coefficients)
        weights, whole_groups = batch[WEIGHTS], self.method.keeps_groups_whole
        penalty = self.method.regularisation(logp, rollouts)
        losses = distrl_losses(
            policy_loss,
            penalty,
            entropy,
            value_losses,
            weights,
            batch[CRITIC_WEIGHTS],
            self.settings,
            step.coefficients["entropy_coeff"],
            policy_weights=rollouts.loss_mask.to(weights.dtype) if whole_groups else weights,
        )
        step.losses.add(losses)
        step.watch(
            rollouts,
            policy_loss=policy_loss,
            regularisation=penalty,
            entropy=entropy,
            critic=outputs,
        )
        if step.first:
            sampler_logp = rollouts.extras.get(SAMPLER_LOGP, rollouts.action_logp)
            mask = rollouts.loss_mask
            step.logps.append((logp.detach()[mask], sampler_logp[mask]))
        return losses.total

    def of_demonstrations(self, module: Any, batch: dict[str, Any]) -> Tensor:
        """The share of a micro-batch of demonstrations: the policy loss alone, without a critic.

        Args:
            module: `DistRLModule`.
            batch: of `micro_batch`, with ``step``, which counts it as policy loss.
        """
        step: Step = batch[STEP]
        rollouts: SequenceBatch = batch[ROLLOUTS]
        logp = module.of_policy(batch)[..., 0]
        policy_loss = self.method.policy_loss.moved(step.coefficients)(logp, rollouts)
        loss = weighted_sum(policy_loss, batch[WEIGHTS])
        step.losses.add(Losses(loss, loss))
        step.watch(rollouts, policy_loss_of_demonstration=policy_loss)
        return loss

    def _policy_loss(
        self, logp: Tensor, rollouts: SequenceBatch, coefficients: Mapping[str, float]
    ) -> Tensor:
        """(B, T); of a loss on whole groups what `linearise` has left of it."""
        if self.method.keeps_groups_whole:
            gradient, value = rollouts.column(GROUP_GRADIENT), rollouts.column(GROUP_LOSS)
            return gradient * (logp - logp.detach()) + value
        policy_loss = self.method.policy_loss.moved(coefficients)(logp, rollouts)
        if IMPORTANCE_WEIGHTS in rollouts.extras:
            policy_loss = policy_loss * rollouts.extras[IMPORTANCE_WEIGHTS]
        return policy_loss

    def linearise(self, module: Any, whole: dict[str, Any]) -> None:
        """Prepares a loss on whole groups for micro-batches, which may cut groups.

        A pass without gradients gives the minibatch's logps, and autograd the loss's gradient by
        each of them. The sum of gradient times logp then has the loss's gradient by the weights,
        in whatever parts it is summed (Gao et al. 2021, arXiv 2101.06983, for contrastive losses).

        Args:
            module: `DistRLModule`.
            whole: of `minibatch`; its rollouts get two columns (b, T), the gradient and the
                loss, spread over each row's tokens. Their sums are the mean over all learners'
                rows.
        """
        rollouts: SequenceBatch = whole[ROLLOUTS]
        steps = rollouts.loss_mask.shape[1]
        logp = rollouts.action_logp.new_zeros(rollouts.loss_mask.shape)
        found = module.compute_logps(whole)
        logp[:, : found.shape[1]] = found[:, :steps]
        logp.requires_grad_()
        with torch.enable_grad():
            per_row = self.method.policy_loss(logp, rollouts)
            count = rollouts.all_reduce(per_row.new_tensor(float(len(rollouts))))
            (gradient,) = torch.autograd.grad(per_row.sum() / count, logp)
        value = per_row.detach() / count / rollouts.lengths.clamp(min=1)
        rollouts.extras[GROUP_GRADIENT] = gradient
        rollouts.extras[GROUP_LOSS] = rollouts.at_tokens(value)


def distrl_losses(
    policy_loss: Tensor,
    regularisation: Tensor | float,
    entropy: Tensor,
    value_losses: Tensor | None,
    weights: Tensor,
    critic_weights: Tensor,
    settings: TrainingSettings,
    entropy_coeff: float,
    policy_weights: Tensor | None = None,
) -> Losses:
    """The loss: surrogate + regularisers + vf_loss_coeff x critic - entropy_coeff x entropy.

    Args:
        policy_loss: (B, T) per token.
        regularisation: (B, T) per token, its coefficients included; 0 without any.
        entropy: (B, T) in nats.
        value_losses: (B, T) of `critic_loss`, or None without a critic.
        weights: (B, T) of the policy's terms.
        critic_weights: (B, T) of the critic's: a mean over tokens.
        settings: coefficients.
        entropy_coeff: of the entropy bonus in this iteration.
        policy_weights: (B, T) of ``policy_loss`` alone; None: ``weights``.

    Returns:
        Scalars; policy_loss, vf_loss and entropy are without their coefficients.
    """
    policy = weighted_sum(policy_loss, weights if policy_weights is None else policy_weights)
    # Without a bonus there is no need to differentiate through the whole vocabulary.
    mean_entropy = weighted_sum(entropy if entropy_coeff > 0 else entropy.detach(), weights)
    vf_loss: Tensor | float = 0.0
    if value_losses is not None:
        vf_loss = weighted_sum(value_losses, critic_weights)
    regular: Tensor | float = 0.0
    if isinstance(regularisation, Tensor):
        regular = weighted_sum(regularisation, weights)
    total = policy + settings.vf_loss_coeff * vf_loss - entropy_coeff * mean_entropy + regular
    return Losses(total, policy, vf_loss, mean_entropy, regular)


def critic_loss(head: Head, outputs: Tensor, rollouts: SequenceBatch) -> Tensor:
    """(B, T), the head's loss of its raw outputs (B, T, K) to ``target_quantiles``."""
    return head.loss(outputs, rollouts.column("target_quantiles"), rollouts.loss_mask)


REFUSED_STEPS = "nonfinite_steps"
REFUSED_IN_A_ROW = "nonfinite_steps_in_a_row"


class NonFiniteError(ValueError):
    """Training stopped at numbers that are not finite; the weights are the last good ones."""


class Refusals:
    """Decides about each step, and remembers why the last one was refused.

    A step is taken by all learners or by none. What is refused changes neither weights nor
    the optimiser's state.

    Attributes:
        last: What was not finite in the step that was refused last, and where.
        in_a_row: Steps refused since one was last taken.
    """

    def __init__(self, limit: int) -> None:
        """Starts counting.

        Args:
            limit: So many steps in a row, and no more are tried.
        """
        self._limit = limit
        self._refused = 0
        self._names: list[str] = []
        self.in_a_row = 0
        self.last = ""

    @property
    def exhausted(self) -> bool:
        """Whether the limit is reached."""
        return self.in_a_row >= self._limit

    def start_iteration(self, episodes: Sequence[SingleAgentEpisode]) -> None:
        """Starts the iteration's count; the episodes are the rows of its batch."""
        self._refused = 0
        self._names = [f"episode {e.id_} (row {e.infos[0]['row']})" for e in episodes]

    def refuse(self, step: Step, module: torch.nn.Module, k: int, all_reduce: AllReduce) -> bool:
        """Says whether the step must not be taken; called once per step, by every learner.

        Args:
            step: With the numbers of all its micro-batches.
            module: With the step's gradients.
            k: The iteration.
            all_reduce: Sum over learners.
        """
        total = torch.as_tensor(step.losses.total_loss).detach()
        gradients = [local(p.grad) for p in module.parameters() if p.grad is not None]
        # One number that is not finite makes the norm of its tensor so; so do finite ones whose
        # squares are not, which would stay in Adam's second moments for ever.
        finite = torch.isfinite(torch.stack([total, *(g.norm() for g in gradients)])).all()
        if not bool(all_reduce((~finite).float())):
            self.in_a_row = 0
            return False
        if bool(finite):
            self.last = f"a gradient of another learner (iteration {k})"
        else:
            self.last = f"{self._where(step, module)} (iteration {k})"
        self._refused += 1
        self.in_a_row += 1
        return True

    def _where(self, step: Step, module: torch.nn.Module) -> str:
        for name, column, rollouts in step.suspects:
            finite = torch.isfinite(column)
            finite = finite if finite.dim() == 2 else finite.all(-1)
            finite_rows = (finite | ~rollouts.loss_mask).all(-1)
            if not bool(finite_rows.all()):
                row = int(rollouts.column(EPISODE)[~finite_rows][0])
                return f"{name} of {self._names[row]}"
        for name, parameter in module.named_parameters():
            gradient = None if parameter.grad is None else local(parameter.grad)
            if gradient is not None and not bool(torch.isfinite(gradient).all()):
                return f"the gradient of {name}"
        return f"the loss {float(step.losses.total_loss)}"

    def metrics(self) -> dict[str, int]:
        """The iteration's count, and how many in a row there were at its end."""
        return {REFUSED_STEPS: self._refused, REFUSED_IN_A_ROW: self.in_a_row}
