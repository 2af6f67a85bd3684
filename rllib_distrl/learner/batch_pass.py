"""The pass before the update: what the models say of a batch, and what the stages make of it."""

from collections.abc import Callable, Collection
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from torch import Tensor

from rllib_distrl.learner.connector import FIRST_ROW, GROUPS, PROMPTS, shown_columns
from rllib_distrl.learner.minibatches import EPISODE, SHOWN_ROW, generator, model_inputs
from rllib_distrl.learner.reference import Reference
from rllib_distrl.learner.uncertainty import FEATURES, Distance, Uncertainty
from rllib_distrl.maths.advantages import returns_to_go
from rllib_distrl.maths.statistics import AllReduce
from rllib_distrl.method.batch import SequenceBatch
from rllib_distrl.method.pipeline import Method
from rllib_distrl.method.registry import LOGP_AT
from rllib_distrl.model.sequences import Sequences, from_columns

# What needs the policy's own hidden states.
_OF_POLICY = {"entropy", "hidden", "prompt_logp", "head_gradient"}
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
        all_gather: rows of all learners.
        memory: what stages keep between iterations; a checkpoint holds it.
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
    all_gather: AllReduce
    memory: dict[str, Any] = field(default_factory=dict)

    def looking(self) -> "BatchPass":
        """The same pass for a batch that is not learned from: stages remember nothing of it."""
        return replace(self, memory=deepcopy(self.memory))

    def get_state(self) -> dict[str, Any]:
        """What a checkpoint must hold: the stages' memory."""
        return deepcopy(self.memory)

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from ``state``."""
        self.memory.clear()
        self.memory.update(deepcopy(state))

    @property
    def _module(self) -> Any:
        return self.modules[DEFAULT_MODULE_ID].unwrapped()

    @property
    def _support(self) -> tuple[float, ...]:
        return self._module.head.support

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
        needs = read_from_models(method.needs)
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
        rollouts.extras.update({name: found.pop(name) for name in _extra(found)})
        rollouts = replace(rollouts, **found, support=self._support if "probs" in found else ())
        if method.importance_correction is not None:
            method.correct_importance(module.compute_logps(columns), rollouts)
        if self.uncertainty is not None:
            statistic = self.uncertainty.statistic(columns, rollouts)
            rollouts.extras[self.uncertainty.name] = statistic
            rollouts.extras.pop(FEATURES, None)
        if method.imitates:
            rollouts.demonstrations = self._demonstrations(shown_columns(columns), rollouts)
        method.prepare(rollouts)
        return PassResult(rollouts, forward)

    def _rollouts(self, columns: dict[str, Tensor], k: int) -> SequenceBatch:
        return SequenceBatch(
            rewards=columns[Columns.REWARDS],
            loss_mask=columns[Columns.LOSS_MASK],
            action_logp=columns[Columns.ACTION_LOGP],
            group=columns[GROUPS],
            prompt=columns[PROMPTS],
            k=k,
            width=self.width,
            generator=generator(self.seed, k),
            all_reduce=self.all_reduce,
            all_gather=self.all_gather,
            memory=self.memory,
            extras={EPISODE: torch.arange(len(columns[GROUPS]), device=columns[GROUPS].device)},
        )

    def _demonstrations(
        self, columns: dict[str, Tensor], rollouts: SequenceBatch
    ) -> SequenceBatch | None:
        """What was shown, with the policy's entropy where the loss reads it; None without any."""
        if not columns:
            return None
        needs = self.method.policy_loss.needs & {"entropy"}
        first, mask = columns[FIRST_ROW], columns[Columns.LOSS_MASK]
        nothing = torch.zeros(mask.shape, device=mask.device)
        return SequenceBatch(
            rewards=nothing,
            loss_mask=mask,
            action_logp=nothing,
            group=rollouts.group[first],
            k=rollouts.k,
            width=self.width,
            all_reduce=self.all_reduce,
            all_gather=self.all_gather,
            extras={EPISODE: first, SHOWN_ROW: torch.arange(len(first), device=first.device)},
            shown=True,
            **model_columns(self._module, None, columns, needs),  # type: ignore[arg-type]
        )

    def _initialise_values(
        self, columns: dict[str, Tensor], rollouts: SequenceBatch
    ) -> dict[str, Tensor]:
        """Starts the critic at ``init_value``, or at what it is to learn: the mean return.

        That is over all learners, after the reward transforms, and discounted. A head that takes
        its range from data takes it from the same returns, at all tokens.

        Returns:
            The columns of the models that the transforms have read; they need not be made again.
        """
        module, value = self._module, self.init_value
        found: dict[str, Tensor] = {}
        if value is None or module.head.from_data:
            transforms = self.method.reward_transforms
            needs = read_from_models({need for stage in transforms for need in stage.needs})
            found = model_columns(module, self.reference, columns, needs)
            named = {name: found[name] for name in found.keys() - _extra(found)}
            extras = {**rollouts.extras, **{name: found[name] for name in _extra(found)}}
            transformed = replace(
                rollouts, **named, extras=extras, metrics={}, memory=deepcopy(self.memory)
            )
            self.method.transform_rewards(transformed)
            returns = returns_to_go(transformed.rewards, rollouts.loss_mask, self.gamma)
            if module.head.from_data:
                counted = returns[rollouts.loss_mask]
                ends = rollouts.all_gather(torch.stack([counted.min(), counted.max()]).unsqueeze(0))
                module.fit_head(float(ends[:, 0].min()), float(ends[:, 1].max()))
            if value is None:
                total, count = rollouts.all_reduce(
                    torch.stack([returns[:, 0].sum(), returns.new_tensor(len(rollouts))])
                )
                value = float(total / count)
        module.initialise_values(value)
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
                law = _law(self._module, embeddings)
                found |= {name: column[back] for name, column in law.items()}
            if "entropy" in needs:
                found["entropy"] = outputs[Columns.ACTION_DIST_INPUTS][..., 1].detach()[back]
        return outputs, found


def read_from_models(needs: Collection[str]) -> set[str]:
    """Those of a method's needs that `model_columns` answers."""
    return {need for need in needs if need in MODEL_COLUMNS or need.startswith(LOGP_AT)}


def _extra(names: Collection[str]) -> set[str]:
    """Columns that have no field of their own in `SequenceBatch`."""
    return {name for name in names if name.startswith(LOGP_AT)}


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
        needs: of `read_from_models`.
        features: makes (B, T, D) of hidden states (B, T, H).

    Returns:
        The columns by the names and shapes of `SequenceBatch`, zeros in the padding, and
        ``features``, if they are asked for.
    """
    if not needs and features is None:
        return {}
    sequences = from_columns(columns)
    rows, steps = sequences.actions.shape
    widths = {
        "prompt_logp": int(sequences.prompt_lens.max()),
        "head_gradient": module.policy.get_output_embeddings().weight.shape[1],
    }
    found: dict[str, Tensor] = {}
    with torch.no_grad(), module.gathered():
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
    factors = {need: float(need.removeprefix(LOGP_AT)) for need in _extra(needs)}
    if features is not None or factors or not _OF_POLICY.isdisjoint(needs):
        hidden = module.hidden(module.policy, rows)
        states = rows.states(hidden)
        if "prompt_logp" in needs:
            found["prompt_logp"] = _prompt_logp(module, rows, hidden)
        if "head_gradient" in needs:
            found["head_gradient"] = module.head_gradient(states, rows)
        if "hidden" in needs:
            found["hidden"] = states
        if features is not None:
            found[FEATURES] = features(states)
        if "entropy" in needs:
            found["entropy"] = module.sampled_tokens(module.policy, states, rows)[..., 1]
        for need, factor in factors.items():
            found[need] = module.sampled_tokens(module.policy, states, rows, factor)[..., 0]
    if "quantiles" in needs:
        found |= _law(module, module.critic_states(rows, states))
    if reference is not None and "ref_logp" in needs:
        found["ref_logp"] = reference.logp(rows)
    return found


def _law(module: Any, embeddings: Tensor) -> dict[str, Tensor]:
    """The critic's law as columns: its quantiles, and the probabilities of fixed atoms."""
    law = module.compute_law({}, embeddings)
    found = {"quantiles": law.quantiles(int(module.model_config["n_quantiles"]))}
    return found if law.probs is None else {**found, "probs": law.probs}


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
