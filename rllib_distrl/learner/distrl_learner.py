"""The learner: whole sequences, micro-batched, with a quantile critic."""

import functools
import threading
from typing import Any

import numpy as np
import torch
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from ray.rllib.core.learner.training_data import TrainingData
from ray.rllib.utils.metrics import NUM_ENV_STEPS_SAMPLED_LIFETIME, WEIGHTS_SEQ_NO
from ray.rllib.utils.schedules.scheduler import Scheduler

from rllib_distrl.learner.controllers import Controllers
from rllib_distrl.learner.gradients import (
    accumulate_gradients,
    micro_batch_loss,
    trained_gradients,
)
from rllib_distrl.learner.importance import check_behaviour
from rllib_distrl.learner.losses import Losses
from rllib_distrl.learner.minibatches import ROLLOUTS, minibatches
from rllib_distrl.learner.optimizers import register_optimizers, set_learning_rates
from rllib_distrl.learner.preparation import prepare
from rllib_distrl.learner.reference import Reference
from rllib_distrl.learner.refusals import Refusals
from rllib_distrl.learner.single_step import SingleStep
from rllib_distrl.learner.uncertainty import make_uncertainty
from rllib_distrl.learner.update_metrics import log_update
from rllib_distrl.maths.statistics import logp_mismatch
from rllib_distrl.method.batch import SequenceBatch
from rllib_distrl.method.pipeline import Method

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
    """

    config: Any
    _module: Any
    _params: Any
    _learner_connector: Any

    def __init__(self, **kwargs: Any):
        """Keeps RLlib's arguments for `build`."""
        super().__init__(**kwargs)
        self._turn = threading.RLock()
        self._single_step = SingleStep()

    def build(self) -> None:
        """Builds module and optimisers and resolves the stages."""
        torch.set_num_threads(self.config.rollout_settings.torch_threads)
        super().build()
        # Logps of the first step's tokens: the learner's and the sampler's.
        self._mismatched: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._method = Method.from_config(self.config)
        self._controllers = Controllers(self.config.controllers)
        self._uncertainty = make_uncertainty(self.config, self._policy_module)
        self._entropy_coeff = Scheduler(self.config.entropy_coeff, framework="torch")
        self._coefficients = {"entropy_coeff": float(self._entropy_coeff.update(timestep=0))}
        self._reference: Reference | None = None
        if "ref_logp" in self._method.needs:
            self._reference = Reference(self._policy_module)
        self._refusals = Refusals(self.config.max_nonfinite_steps)

    @property
    def last_refusal(self) -> str:
        """What was not finite in the optimiser step that was refused last; may be empty."""
        return self._refusals.last

    @property
    def weights_stamp(self) -> int:
        """Another number after each change of the weights, whoever has made it."""
        return sum(parameter._version for parameter in self._policy_module.parameters())

    @property
    def _policy_module(self) -> Any:
        return self._module[DEFAULT_MODULE_ID].unwrapped()

    @property
    def _stateful_parts(self) -> dict[str, Any]:
        parts = {
            "controllers": self._controllers,
            "uncertainty": self._uncertainty,
            "reference": self._reference,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        """Adam for the policy, and one of its own for what only the critic uses."""
        register_optimizers(self, module_id, config)

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
        """RLlib's state, and that of our own parts."""
        state = super().get_state(components, not_components=not_components, **kwargs)
        if components is None:
            state.update({name: part.get_state() for name, part in self._stateful_parts.items()})
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
        data = training_data or TrainingData(
            episodes=kwargs.get("episodes"), episodes_refs=kwargs.get("episodes_refs")
        )
        data.validate()
        data.solve_refs()
        episodes: list[Any] = data.episodes or []
        check_behaviour(episodes, self.config)
        columns = self._columns(episodes)
        self._mismatched = []
        alone = self.config.num_learners <= 1
        one_step = num_epochs == 1 and (minibatch_size or len(episodes)) >= len(episodes)
        self._single_step.start(possible=alone and one_step)
        rollouts = self._prepare(columns, timesteps.get(TRAINING_ITERATION, 1))
        self._refusals.start_iteration(episodes)
        self._weights_seq_no += 1
        set_learning_rates(self, DEFAULT_MODULE_ID, self.config, rollouts.k)
        self._warming_up = rollouts.k <= self.config.critic_warmup_iterations
        steps_sampled = timesteps.get(NUM_ENV_STEPS_SAMPLED_LIFETIME, 0)
        self._coefficients = {
            "entropy_coeff": float(self._entropy_coeff.update(timestep=steps_sampled)),
            **self._controllers.update(rollouts),
        }
        if self._uncertainty is not None:
            rollouts.metrics.update(self._uncertainty.learn(columns, rollouts))
        steps = []
        orders = self._orders(rollouts, num_epochs, shuffle_batch_per_epoch)
        for part in minibatches(columns, rollouts, orders, minibatch_size, self.config):
            if self._refusals.exhausted:
                break
            self._first_step = not steps
            self._update({DEFAULT_MODULE_ID: part})
            if not self._refusals.in_a_row:
                steps.append(self._step_losses)
        values = {
            **Losses.mean(steps or [self._step_losses], rollouts.all_reduce),
            **self._mismatch(),
            **self._coefficients,
            **self._refusals.metrics(),
            WEIGHTS_SEQ_NO: self._weights_seq_no,
        }
        log_update(self.metrics, rollouts, values, self.config.gamma)
        self._log_trainable_parameters()  # Ray 2.60 logs them once, and NaN from then on
        self._single_step.start(possible=False)
        self.after_gradient_based_update(timesteps=timesteps)
        return None if _no_metrics_reduce else self.metrics.reduce()

    def _mismatch(self) -> dict[str, float]:
        """Sampler against learner, over all tokens and all learners of the first step."""
        logps = torch.cat([torch.stack(pair, -1) for pair in self._mismatched])
        if self.config.num_learners > 1:
            logps = self._all_gather(logps)
        logp, sampler_logp = logps.unbind(-1)
        everything = torch.ones_like(logp, dtype=torch.bool)
        config = self.config
        return logp_mismatch(
            logp, sampler_logp, everything, config.clip_param, config.clip_param_high
        )

    def _columns(self, episodes: list[Any]) -> dict[str, torch.Tensor]:
        batch = self._learner_connector(
            rl_module=self.module,
            batch={},
            episodes=episodes,
            shared_data={},
            metrics=self.metrics,
        )
        return {name: column.to(self._device) for name, column in batch[DEFAULT_MODULE_ID].items()}

    def _prepare(self, columns: dict[str, torch.Tensor], k: int) -> SequenceBatch:
        """The one pass before the update, and the stages on the whole batch."""
        return prepare(self, columns, k)

    def _orders(self, rollouts: SequenceBatch, epochs: int, shuffle: bool) -> list[torch.Tensor]:
        """The order of the rows in each epoch."""
        n = len(rollouts)
        if not shuffle or self._single_step.possible:
            return [torch.arange(n, device=self._device)] * epochs
        return [
            torch.randperm(n, generator=self._generator(rollouts.k, epoch)).to(self._device)
            for epoch in range(epochs)
        ]

    def _generator(self, *numbers: int) -> torch.Generator:
        """Randomness that depends on the seed and ``numbers`` alone, so that resuming is exact."""
        entropy = np.random.SeedSequence([self.config.seed or 0, *numbers])
        return torch.Generator().manual_seed(int(entropy.generate_state(1)[0]))

    @staticmethod
    def _all_reduce(tensor: torch.Tensor) -> torch.Tensor:
        total = tensor.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def _all_gather(tensor: torch.Tensor) -> torch.Tensor:
        """The rows of all learners, which may have different numbers of them."""
        parts: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, tensor.cpu())
        return torch.cat(parts)

    def _uncompiled_update(self, batch: dict[str, Any], **kwargs: Any) -> tuple[Any, Any, Any]:
        """One optimiser step, accumulated over micro-batches."""
        whole = batch[DEFAULT_MODULE_ID]
        self._step_losses = Losses()
        loss_per_module = accumulate_gradients(self, whole)
        gradients: Any = trained_gradients(self)
        rollouts: SequenceBatch = whole[ROLLOUTS]
        if not self._refusals.refuse(
            self._step_losses, self._policy_module, rollouts.k, rollouts.all_reduce
        ):
            self.apply_gradients(self.postprocess_gradients(gradients))
        return {}, loss_per_module, {}

    def compute_loss_for_module(
        self, *, module_id: str, config: Any, batch: dict[str, Any], fwd_out: dict[str, Any]
    ) -> torch.Tensor:
        """The loss of a micro-batch: its share of the minibatch's loss.

        Args:
            module_id: the module.
            config: `DistRLConfig`.
            batch: sequence columns, ``rollouts``, ``weights`` and ``critic_weights``.
            fwd_out: of `CausalLMModule`.

        Returns:
            A scalar; the sum over micro-batches and learners is the loss.
        """
        return micro_batch_loss(self, self._module[module_id].unwrapped(), batch, fwd_out)
