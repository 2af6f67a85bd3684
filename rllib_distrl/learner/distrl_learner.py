"""The learner: whole sequences, micro-batched, with a quantile critic."""

import contextlib
import functools
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from ray.rllib.core.learner.training_data import TrainingData
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.metrics import NUM_ENV_STEPS_SAMPLED_LIFETIME, WEIGHTS_SEQ_NO
from ray.rllib.utils.schedules.scheduler import Scheduler
from torch import Tensor

from rllib_distrl.learner.batch_pass import BatchPass
from rllib_distrl.learner.connector import check_behaviour
from rllib_distrl.learner.metrics import log_update, sampler_mismatch
from rllib_distrl.learner.minibatches import (
    DEMONSTRATIONS,
    ROLLOUTS,
    STEP,
    micro_batch,
    micro_batches,
    minibatches,
    row_orders,
)
from rllib_distrl.learner.reference import Reference
from rllib_distrl.learner.step import (
    Losses,
    Objective,
    Refusals,
    Step,
    learning_rates,
    lr_factor,
    lr_schedule_settings,
    make_optimizers,
    set_learning_rates,
)
from rllib_distrl.learner.uncertainty import make_uncertainty
from rllib_distrl.maths.statistics import identity
from rllib_distrl.method.batch import SequenceBatch
from rllib_distrl.method.loss_terms import Controllers
from rllib_distrl.method.pipeline import Method
from rllib_distrl.model.sequences import from_columns
from rllib_distrl.model.sharding import optimizer_shares, whole_optimizer_state
from rllib_distrl.rllib_traps import leave_memory_unfilled
from rllib_distrl.settings import TrainingSettings, micro_batch_budget

TRAINING_ITERATION = "training_iteration"


def _one_at_a_time(method: Any) -> Any:
    """Lets a method wait for the other thread: one trains while another asks for weights."""

    @functools.wraps(method)
    def waiting(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._turn:
            return method(self, *args, **kwargs)

    return waiting


class DistRLLearner(TorchLearner):
    """Updates policy and quantile critic from finished episodes.

    One pass without gradients gives the old quantiles; the stages turn them into targets
    and advantages on the whole batch; then minibatches of whole sequences, each cut into
    micro-batches of at most ``micro_batch_tokens``, give the optimiser steps. Where the whole
    batch is one step and one micro-batch, that step's forward pass is the pass before it too.

    Attributes:
        settings: of the method.
        method: its stages.
        batch_pass: from columns to the batch that steps learn from.
        reference: the policy that KL terms refer to, where something reads it.
        uncertainty: of the optimism bonus, where it is learned.
    """

    config: Any
    _module: Any
    _params: Any
    _learner_connector: Any

    def __init__(self, **kwargs: Any):
        """Keeps RLlib's arguments for `build`."""
        super().__init__(**kwargs)
        self._turn = threading.RLock()

    def build(self) -> None:
        """Builds module and optimisers and resolves the stages."""
        config, rollout = self.config, self.config.rollout_settings
        torch.set_num_threads(rollout.torch_threads)
        leave_memory_unfilled()
        super().build()
        self.policy_module.lends_weights = config.lends_weights
        self.settings, self.method = TrainingSettings.of(config), Method.from_config(config)
        seed, self._alone = config.seed or 0, config.num_learners <= 1
        self.reference = Reference(self.policy_module) if "ref_logp" in self.method.needs else None
        self.uncertainty = make_uncertainty(
            self.method.bonus_statistic.name,
            self.policy_module,
            self.settings,
            gamma=config.gamma,
            minibatch_size=config.minibatch_size,
            seed=seed,
        )
        self.batch_pass = BatchPass(
            self.module,
            self.method,
            self.reference,
            self.uncertainty,
            gamma=config.gamma,
            init_value=self.settings.init_value,
            width=rollout.max_completion_tokens,
            budget=micro_batch_budget(self.settings.micro_batch_tokens),
            seed=seed,
            all_reduce=identity if self._alone else _all_reduce,
            all_gather=identity if self._alone else _all_gather,
        )
        self._objective = Objective(self.method, self.settings)
        self._controllers = Controllers(self.method.controllers)
        self._entropy_coeff = Scheduler(self.settings.entropy_coeff, framework="torch")
        self._refusals = Refusals(self.settings.max_nonfinite_steps)

    @property
    def last_refusal(self) -> str:
        """What was not finite in the optimiser step that was refused last; may be empty."""
        return self._refusals.last

    @property
    def sampling_temperature(self) -> float | None:
        """At which a controller wants the next batch; None: as `[rollout]` says."""
        return self._controllers.temperature

    @property
    def weights_stamp(self) -> int:
        """Another number after each change of the weights, whoever has made it."""
        return sum(parameter._version for parameter in self.policy_module.parameters())

    @property
    def policy_module(self) -> Any:
        """The `DistRLModule`, without RLlib's wrapper for several learners."""
        return self._module[DEFAULT_MODULE_ID].unwrapped()

    @property
    def _stateful_parts(self) -> dict[str, Any]:
        parts = {
            "controllers": self._controllers,
            "uncertainty": self.uncertainty,
            "reference": self.reference,
            "memory": self.batch_pass,
        }
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def _rates(self) -> dict[str, Any]:
        return learning_rates(self.config.lr, self.config.critic_lr)

    @property
    def _sharded(self) -> bool:
        return self.config.sharding != "none"

    def _map_module_to_device(self, module: Any) -> None:
        if self._sharded:
            module[DEFAULT_MODULE_ID].shard(self._device)
        super()._map_module_to_device(module)

    def _make_modules_ddp_if_necessary(self) -> None:
        if not self._sharded:
            super()._make_modules_ddp_if_necessary()

    def _set_optimizer_state(self, state: dict[str, Any]) -> None:
        if self._sharded:
            state = {
                name: {
                    **each,
                    "state": optimizer_shares(self._named_optimizers[name], each["state"]),
                }
                for name, each in state.items()
            }
        super()._set_optimizer_state(state)

    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        """Adam for the policy, and one of its own for what only the critic uses."""
        for owned in make_optimizers(self.module[module_id], self._rates):
            self.register_optimizer(
                module_id=module_id,
                optimizer_name=owned.name,
                optimizer=owned.optimizer,
                params=owned.parameters,
                lr_or_lr_schedule=owned.schedule,
            )
            if self._sharded:
                owned.optimizer.register_state_dict_post_hook(whole_optimizer_state)

    def set_state(self, state: dict[str, Any]) -> None:
        """Takes over ``state``, also one that is older than the present weights.

        Ray 2.60 keeps the newer weights in that case (core/learner/learner.py, set_state).
        """
        version, self._weights_seq_no = self._weights_seq_no, 0
        super().set_state(state)
        if WEIGHTS_SEQ_NO not in state:  # Weights alone.
            self._weights_seq_no = version
        self._refusals.in_a_row = 0
        for name, part in self._stateful_parts.items():
            if name in state:
                part.set_state(state[name])

    @_one_at_a_time
    def get_state(
        self, components: Any = None, *, not_components: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """RLlib's state, and that of our own parts.

        With ``sharding`` all learners are asked at once, and only the first one has an answer.
        """
        state = super().get_state(components, not_components=not_components, **kwargs)
        if components is None:
            state.update({name: part.get_state() for name, part in self._stateful_parts.items()})
        if self._sharded and torch.distributed.get_rank():
            return {}  # The first learner has it.
        return state

    @_one_at_a_time
    def update(
        self,
        *,
        training_data: TrainingData | None = None,
        timesteps: dict[str, Any] | None = None,
        num_epochs: int = 1,
        minibatch_size: int | None = None,
        shuffle_batch_per_epoch: bool = True,
        _no_metrics_reduce: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Learns from ``training_data``: episodes, or references to them.

        Args:
            training_data: whole episodes, whole groups.
            timesteps: RLlib's counters, and ``training_iteration``.
            num_epochs: passes over the batch.
            minibatch_size: sequences per optimiser step; None: all.
            shuffle_batch_per_epoch: whether minibatches are drawn at random.
            **kwargs: ``episodes`` or ``episodes_refs`` in place of ``training_data``.

        Returns:
            RLlib's metrics.
        """
        timesteps = timesteps or {}
        self.before_gradient_based_update(timesteps=timesteps)
        episodes = self._episodes(training_data, kwargs)
        with self.policy_module.at_temperature(self._sampled_at(episodes)):
            self._learn(episodes, timesteps, num_epochs, minibatch_size, shuffle_batch_per_epoch)
        self.after_gradient_based_update(timesteps=timesteps)
        return None if _no_metrics_reduce else self.metrics.reduce()

    def _learn(
        self,
        episodes: list[SingleAgentEpisode],
        timesteps: dict[str, Any],
        num_epochs: int,
        minibatch_size: int | None,
        shuffle: bool,
    ) -> None:
        columns = self.columns(episodes)
        epochs = max(self.settings.critic_epochs or 1, num_epochs)
        one_step = epochs == 1 and (minibatch_size or len(episodes)) >= len(episodes)
        single_step = one_step and self._alone
        k = timesteps.get(TRAINING_ITERATION, 1)
        found = self.batch_pass(columns, k, single_step=single_step)
        rollouts = found.rollouts
        if self.method.imitates and rollouts.demonstrations is None:
            raise ValueError(
                f"policy_loss {self.method.policy_loss.name!r} imitates, but the episodes show no "
                "solutions. Sample them with env_config = {demonstrations = true}, as our "
                "algorithms do by themselves; wrappers must keep the info of reset()."
            )
        self._refusals.start_iteration(episodes)
        self._weights_seq_no += 1
        self._set_learning_rates(k)
        coefficients = self._coefficients(rollouts, timesteps)
        if self.uncertainty is not None:
            rollouts.metrics.update(self.uncertainty.learn(columns, rollouts))
        orders = row_orders(
            rollouts,
            epochs,
            self.config.seed or 0,
            shuffle=shuffle and not single_step,
            whole_groups=self.method.keeps_groups_whole,
        )
        of_both, of_critic = (
            minibatches(columns, rollouts, some, minibatch_size, self.method.aggregation)
            for some in (orders[:num_epochs], orders[num_epochs:])
        )
        steps = self._take_steps(of_both, coefficients, found.forward)
        self._take_steps(of_critic, coefficients, None, critic_only=True)
        self._report(rollouts, steps, coefficients)

    def _episodes(
        self, training_data: TrainingData | None, given: dict[str, Any]
    ) -> list[SingleAgentEpisode]:
        """Finished episodes of the learner's own distribution, or of one that is corrected for."""
        data = training_data or TrainingData(
            episodes=given.get("episodes"), episodes_refs=given.get("episodes_refs")
        )
        data.validate()
        data.solve_refs()
        episodes: list[Any] = data.episodes or []
        corrected = self.method.importance_correction is not None
        check_behaviour(episodes, self._sampled_at(episodes), corrected)
        return episodes

    def _sampled_at(self, episodes: Sequence[SingleAgentEpisode]) -> float:
        """Temperature of the distribution that learns: a controller's, or the recipe's."""
        if self._controllers.moves_temperature and episodes:
            return float(episodes[0].infos[0]["sampling"]["temperature"])
        return self.config.rollout_settings.temperature

    def columns(self, episodes: Sequence[SingleAgentEpisode]) -> dict[str, Tensor]:
        """What the learner connector makes of episodes, on the learner's device."""
        batch = self._learner_connector(
            rl_module=self.module,
            batch={},
            episodes=episodes,
            shared_data={},
            metrics=self.metrics,
        )
        return {name: column.to(self._device) for name, column in batch[DEFAULT_MODULE_ID].items()}

    def _set_learning_rates(self, k: int) -> None:
        factor = lr_factor(k, **lr_schedule_settings(self.settings))
        set_learning_rates(self.get_optimizers_for_module(DEFAULT_MODULE_ID), self._rates, factor)

    def _coefficients(self, rollouts: SequenceBatch, timesteps: dict[str, Any]) -> dict[str, float]:
        """Those of the loss in this iteration: scheduled, or moved by controllers."""
        steps_sampled = timesteps.get(NUM_ENV_STEPS_SAMPLED_LIFETIME, 0)
        scheduled = float(self._entropy_coeff.update(timestep=steps_sampled))
        module = self.policy_module
        moved = self._controllers.update(
            rollouts, module.temperature, module.policy.get_output_embeddings().weight.shape[0]
        )
        return {"entropy_coeff": scheduled, **moved}

    def _take_steps(
        self,
        parts: Iterable[dict[str, Any]],
        coefficients: dict[str, float],
        forward: dict[str, Any] | None,
        *,
        critic_only: bool = False,
    ) -> list[tuple[Step, bool]]:
        """One optimiser step per minibatch, and whether it was taken."""
        steps: list[tuple[Step, bool]] = []
        for part in parts:
            if self._refusals.exhausted:
                break
            rollouts: SequenceBatch = part[ROLLOUTS]
            step = Step(
                coefficients,
                critic_only=critic_only or rollouts.k <= self.settings.critic_warmup_iterations,
                first=not critic_only and not any(taken for _, taken in steps),
                forward=forward,
            )
            self._update({DEFAULT_MODULE_ID: {**part, STEP: step}})
            steps.append((step, not self._refusals.in_a_row))
            step.forward = forward = None  # The weights have moved.
            step.suspects.clear()
        return steps

    def _report(
        self,
        rollouts: SequenceBatch,
        steps: list[tuple[Step, bool]],
        coefficients: dict[str, float],
    ) -> None:
        taken = [step.losses for step, was_taken in steps if was_taken]
        gather = identity if self._alone else _all_gather
        values = {
            **Losses.mean(taken or [steps[-1][0].losses], rollouts.all_reduce),
            **sampler_mismatch([step for step, _ in steps], self.settings, gather),
            **coefficients,
            **self._refusals.metrics(),
            WEIGHTS_SEQ_NO: self._weights_seq_no,
        }
        log_update(self.metrics, rollouts, values, self.config.gamma)
        self._log_trainable_parameters()  # Ray 2.60 logs them once, and NaN from then on

    def _uncompiled_update(self, batch: dict[str, Any], **kwargs: Any) -> tuple[Any, Any, Any]:
        """One optimiser step, accumulated over micro-batches."""
        whole = batch[DEFAULT_MODULE_ID]
        step: Step = whole[STEP]
        rollouts: SequenceBatch = whole[ROLLOUTS]
        if self.method.keeps_groups_whole:
            self._objective.linearise(self.policy_module, whole)
        loss_per_module = self._accumulate_gradients(whole, step)
        gradients: Any = self._trained_gradients(step.critic_only)
        if not self._refusals.refuse(step, self.policy_module, rollouts.k, rollouts.all_reduce):
            self.apply_gradients(self.postprocess_gradients(gradients))
        return {}, loss_per_module, {}

    def _accumulate_gradients(self, whole: dict[str, Any], step: Step) -> dict[str, Tensor]:
        """Runs a minibatch forward and backward, micro-batch by micro-batch."""
        for optimizer in self._optimizer_parameters:
            optimizer.zero_grad(set_to_none=True)
        learners = max(self.config.num_learners, 1)
        budget = micro_batch_budget(self.settings.micro_batch_tokens)
        parts = self.policy_module.micro_batches(from_columns(whole), budget)
        if DEMONSTRATIONS in whole and not step.critic_only:
            self._accumulate_demonstrations({**whole[DEMONSTRATIONS], STEP: step}, budget)
        for number, (part, counts) in enumerate(micro_batches(whole, parts)):
            if not counts:  # Its metrics go nowhere.
                part[STEP] = Step(step.coefficients, critic_only=step.critic_only)
            with self._gradient_sync(last=number == len(parts) - 1):
                loss = self.policy_module.differentiable(functools.partial(self._loss_of, part))
                # DDP and FSDP average gradients; weights already divide by all learners' tokens.
                (loss * (learners * counts)).backward()
        return {DEFAULT_MODULE_ID: loss}

    def _loss_of(self, part: dict[str, Any]) -> Tensor:
        """The share of a micro-batch in its minibatch's loss."""
        batch = {DEFAULT_MODULE_ID: part}
        forward = part[STEP].forward
        if forward is None:
            fwd_out = self.module.forward_train(batch)
        else:
            fwd_out = {DEFAULT_MODULE_ID: forward}
        return self.compute_losses(fwd_out=fwd_out, batch=batch)[DEFAULT_MODULE_ID]

    def _accumulate_demonstrations(self, shown: dict[str, Any], budget: int) -> None:
        """Before the sampled rows: the last backward pass is then one that every learner has."""
        module = self.policy_module
        for rows in module.micro_batches(from_columns(shown), budget):
            with self._gradient_sync(last=False):
                loss = self._objective.of_demonstrations(module, micro_batch(shown, rows))
                (loss * max(self.config.num_learners, 1)).backward()

    def _gradient_sync(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        if self._alone or self._sharded or last:
            return contextlib.nullcontext()
        return self._module[DEFAULT_MODULE_ID].no_sync()

    def _trained_gradients(self, critic_only: bool) -> dict[Any, Tensor]:
        """The gradients by RLlib's keys; while the critic warms up, its own alone."""
        if critic_only:
            critic = {id(parameter) for parameter in self.policy_module.critic_parameters()}
            for parameter in self._params.values():
                if id(parameter) not in critic:
                    parameter.grad = None
        return {ref: p.grad for ref, p in self._params.items() if p.grad is not None}

    def compute_loss_for_module(
        self, *, module_id: str, config: Any, batch: dict[str, Any], fwd_out: dict[str, Any]
    ) -> Tensor:
        """The loss of a micro-batch: its share of the minibatch's loss.

        Args:
            module_id: the module.
            config: `DistRLConfig`.
            batch: sequence columns, ``rollouts``, ``weights``, ``critic_weights`` and ``step``.
            fwd_out: of `CausalLMModule`.

        Returns:
            A scalar; the sum over micro-batches and learners is the loss.
        """
        return self._objective.of_micro_batch(self._module[module_id].unwrapped(), batch, fwd_out)


def _all_reduce(tensor: Tensor) -> Tensor:
    """The sum over all learners."""
    total = tensor.clone()
    torch.distributed.all_reduce(total)
    return total


def _all_gather(tensor: Tensor) -> Tensor:
    """The rows of all learners, which may have different numbers of them."""
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, tensor.cpu())
    return torch.cat(parts)
