"""The pass before the update: what the models say of a batch, and what the stages make of it."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from torch import Tensor

from rllib_distrl.learner.connector import GROUPS
from rllib_distrl.learner.minibatches import generator, model_inputs
from rllib_distrl.learner.reference import Reference
from rllib_distrl.learner.step import EPISODE
from rllib_distrl.learner.uncertainty import FEATURES, Distance, Uncertainty
from rllib_distrl.maths.advantages import returns_to_go
from rllib_distrl.maths.statistics import AllReduce
from rllib_distrl.method.batch import SequenceBatch
from rllib_distrl.method.pipeline import Method
from rllib_distrl.model.sequences import Sequences, from_columns

# What needs the policy's own hidden states.
_OF_POLICY = {"entropy", "hidden", "prompt_logp"}
MODEL_COLUMNS = frozenset({*_OF_POLICY, "quantiles", "ref_logp"})


@dataclass(frozen=True)
class PassResult:
    """What an update begins with.

    Attributes:
        rollouts: the batch with advantages and the critic's targets.
        forward: outputs of the forward pass with gradients, in the order of the only micro-batch,
            where the update is a single step of it; else None.
    """

    rollouts: SequenceBatch
    forward: dict[str, Any] | None = None


@dataclass(frozen=True)
class BatchPass:
    """From columns of tokens to the batch that optimiser steps learn from.

    Attributes:
        modules: RLlib's module of modules.
        method: the stages.
        reference: of ``ref_logp``, where a stage reads it.
        uncertainty: of the bonus, where it is learned beside the critic.
        gamma: discount.
        init_value: of the critic at the start; None: the batch's mean return.
        width: most tokens of a completion.
        budget: most tokens of a micro-batch of the training pass.
        seed: of the stages' randomness.
        all_reduce: sum over learners.
    """

    modules: Any
    method: Method
    reference: Reference | None
    uncertainty: Uncertainty | None
    gamma: float
    init_value: float | None
    width: int
    budget: int
    seed: int
    all_reduce: AllReduce

    @property
    def _module(self) -> Any:
        return self.modules[DEFAULT_MODULE_ID].unwrapped()

    def __call__(
        self, columns: dict[str, Tensor], k: int, *, single_step: bool = False
    ) -> PassResult:
        """Runs the models that something reads, once, and the stages on the whole batch.

        Args:
            columns: of `SequencesFromEpisodes`.
            k: the training iteration.
            single_step: whether the update is one step on one learner: if it is one micro-batch
                too, its training pass serves as this pass.
        """
        module, method, rollouts = self._module, self.method, self._rollouts(columns, k)
        needs = set(method.needs & MODEL_COLUMNS)
        found: dict[str, Tensor] = {}
        forward = None
        if not module.has_critic:
            needs -= {"quantiles"}
        elif not bool(module.value_initialised):
            found = self._initialise_values(columns, rollouts)
        if single_step:
            forward, told = self._training_forward(columns, needs - found.keys())
            found |= told
        # Made in each micro-batch: the hidden states themselves, (B, T, H) of a whole batch, are
        # kept only for a stage that declares that it reads them.
        features = self.uncertainty.features if isinstance(self.uncertainty, Distance) else None
        needs -= found.keys()
        found |= model_columns(module, self.reference, columns, needs, features)
        if features is not None:
            rollouts.extras[FEATURES] = found.pop(FEATURES)
        rollouts = replace(rollouts, **found)
        if method.importance_correction is not None:
            method.correct_importance(module.compute_logps(columns), rollouts)
        if self.uncertainty is not None:
            statistic = self.uncertainty.statistic(columns, rollouts)
            rollouts.extras[self.uncertainty.name] = statistic
            rollouts.extras.pop(FEATURES, None)
        method.prepare(rollouts)
        return PassResult(rollouts, forward)

    def _rollouts(self, columns: dict[str, Tensor], k: int) -> SequenceBatch:
        return SequenceBatch(
            rewards=columns[Columns.REWARDS],
            loss_mask=columns[Columns.LOSS_MASK],
            action_logp=columns[Columns.ACTION_LOGP],
            group=columns[GROUPS],
            k=k,
            width=self.width,
            generator=generator(self.seed, k),
            all_reduce=self.all_reduce,
            extras={EPISODE: torch.arange(len(columns[GROUPS]), device=columns[GROUPS].device)},
        )

    def _initialise_values(
        self, columns: dict[str, Tensor], rollouts: SequenceBatch
    ) -> dict[str, Tensor]:
        """Starts the critic at ``init_value``, or at what it is to learn: the mean return.

        That is over all learners, after the reward transforms, and discounted.

        Returns:
            The columns of the models that the transforms have read; they need not be made again.
        """
        value = self.init_value
        found: dict[str, Tensor] = {}
        if value is None:
            transforms = self.method.reward_transforms
            needs = {need for stage in transforms for need in stage.needs} & MODEL_COLUMNS
            found = model_columns(self._module, self.reference, columns, needs)
            transformed = replace(rollouts, **found, metrics={})
            self.method.transform_rewards(transformed)
            returns = returns_to_go(transformed.rewards, rollouts.loss_mask, self.gamma)[:, 0]
            total, count = rollouts.all_reduce(
                torch.stack([returns.sum(), returns.new_tensor(len(rollouts))])
            )
            value = float(total / count)
        self._module.initialise_values(value)
        return found

    def _training_forward(
        self, columns: dict[str, Tensor], needs: Collection[str]
    ) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
        """The forward pass, with gradients, of a batch that is a single micro-batch.

        Returns:
            The outputs, with what they tell of ``needs`` in the batch's order; None and nothing
            for several micro-batches.
        """
        sequences = from_columns(columns)
        parts = self._module.micro_batches(sequences, self.budget)
        if len(parts) > 1:
            return None, {}
        inputs = {DEFAULT_MODULE_ID: model_inputs(sequences.rows(parts[0]))}
        outputs = self.modules.forward_train(inputs)[DEFAULT_MODULE_ID]
        found, back = {}, torch.argsort(parts[0])
        with torch.no_grad():
            if "quantiles" in needs:
                embeddings = outputs[Columns.EMBEDDINGS]
                found["quantiles"] = self._module.compute_quantiles({}, embeddings)[back]
            if "entropy" in needs:
                found["entropy"] = outputs[Columns.ACTION_DIST_INPUTS][..., 1].detach()[back]
        return outputs, found


def model_columns(
    module: Any,
    reference: Reference | None,
    columns: dict[str, Tensor],
    needs: Collection[str],
    features: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Runs policy, critic and reference once over a batch, each only if something needs it.

    Args:
        module: `DistRLModule`.
        reference: of ``ref_logp``, else None.
        columns: of `SequencesFromEpisodes`.
        needs: which of `MODEL_COLUMNS`.
        features: makes (B, T, D) of hidden states (B, T, H).

    Returns:
        The columns by the names and shapes of `SequenceBatch`, zeros in the padding, and
        ``features``, if they are asked for.
    """
    if not needs and features is None:
        return {}
    sequences = from_columns(columns)
    rows, steps = sequences.actions.shape
    widths = {"prompt_logp": int(sequences.prompt_lens.max())}
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        for index in module.micro_batches(sequences):
            parts = _read(module, reference, sequences.rows(index), needs, features)
            for name, part in parts.items():
                if name not in found:
                    width = widths.get(name, steps)
                    found[name] = part.new_zeros(rows, width, *part.shape[2:])
                found[name][index, : part.shape[1]] = part
    return found


def _read(
    module: Any,
    reference: Reference | None,
    rows: Sequences,
    needs: Collection[str],
    features: Callable[[Tensor], Tensor] | None,
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    states = None
    if features is not None or not _OF_POLICY.isdisjoint(needs):
        hidden = module.hidden(module.policy, rows)
        states = rows.states(hidden)
        if "prompt_logp" in needs:
            found["prompt_logp"] = _prompt_logp(module, rows, hidden)
        if "hidden" in needs:
            found["hidden"] = states
        if features is not None:
            found[FEATURES] = features(states)
        if "entropy" in needs:
            found["entropy"] = module._sampled_tokens(module.policy, states, rows)[..., 1]
    if "quantiles" in needs:
        found["quantiles"] = module.compute_quantiles({}, module._critic_states(rows, states))
    if reference is not None and "ref_logp" in needs:
        found["ref_logp"] = reference.logp(rows)
    return found


def _prompt_logp(module: Any, rows: Sequences, hidden: Tensor) -> Tensor:
    """(B, P) logps of the prompts' tokens after the first; 0 there and in the padding."""
    width = int(rows.prompt_lens.max())
    position = torch.arange(1, width, device=hidden.device)
    inside = position < rows.prompt_lens.unsqueeze(1)
    logp, _ = module.token_logps(
        module.policy, hidden[:, : width - 1][inside], rows.input_ids[:, 1:width][inside]
    )
    found = logp.new_zeros(len(hidden), width)
    found[:, 1:][inside] = logp
    return found
