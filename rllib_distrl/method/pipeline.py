"""The method as a list of stages: rewards, advantages, shaping, critic targets, loss."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rllib_distrl.maths.advantages import whiten
from rllib_distrl.maths.statistics import masked_mean, zero_padding
from rllib_distrl.method.batch import SequenceBatch
from rllib_distrl.method.critic import Head, check_targets, make_head
from rllib_distrl.method.registry import Spec, Stage, resolve
from rllib_distrl.settings import TrainingSettings

# Settings of `[training]` that a stage may have: it then takes them from there.
SHARED = frozenset(
    {"gamma", "lambda_", "clip_param", "clip_param_high", "dual_clip", "bonus_coeff", "bonus_stat",
     "bonus_at", "bonus_center", "bonus_schedule", "bonus_horizon", "bonus_max_ratio",
     "critic_lambda", "importance_bound"}
)  # fmt: skip
OPTIMISM = {"name": "dltv"}
# Columns of the batch that a correction for another sampler adds.
IMPORTANCE_WEIGHTS = "importance_weights"
SAMPLER_LOGP = "sampler_logp"


@dataclass(frozen=True)
class Method:
    """The stages of one algorithm, in the order in which they run.

    Attributes:
        target: None without a critic.
        head: What the critic says of a state, and how it learns.
        importance_correction: None where there is none.
        bonus_statistic: What the optimism bonus is made of, also where that is off.
        needs: Columns that the stages read, see `method.registry`.
    """

    reward_transforms: tuple[Stage, ...]
    advantage: Stage
    shapers: tuple[Stage, ...]
    policy_loss: Stage
    regularisers: tuple[Stage, ...]
    aggregation: Stage
    importance_correction: Stage | None
    target: Stage | None
    head: Head
    read_out: Stage
    bonus_statistic: Stage
    controllers: tuple[Stage, ...]
    whitens: bool

    @classmethod
    def from_config(cls, config: Any) -> "Method":
        """Resolves the stages that a configuration names; the optimism bonus comes last.

        Args:
            config: An `AlgorithmConfig` with the fields of `TrainingSettings` as attributes.
        """
        chosen = TrainingSettings.of(config)
        shared = {name: getattr(config, name) for name in SHARED}

        def stage(kind: str, spec: Spec) -> Stage:
            return _stage(kind, spec, shared, type(config))

        def stages(kind: str, specs: list[dict[str, Any]]) -> tuple[Stage, ...]:
            return tuple(stage(kind, spec) for spec in specs)

        correction = stage("importance_correction", chosen.importance_correction)
        optimism = [OPTIMISM] if chosen.bonus_coeff > 0 else []
        return cls(
            reward_transforms=stages("reward", chosen.reward_transforms),
            advantage=stage("advantage", chosen.advantage),
            shapers=stages("shaper", [*chosen.shapers, *optimism]),
            policy_loss=stage("policy_loss", chosen.policy_loss),
            regularisers=stages("regulariser", chosen.regularisers),
            aggregation=stage("aggregation", chosen.aggregation),
            importance_correction=None if correction.name == "none" else correction,
            target=None if chosen.critic == "none" else stage("target", chosen.target),
            head=make_head(chosen.to_dict()),
            read_out=stage("read_out", chosen.read_out),
            bonus_statistic=stage("bonus_statistic", chosen.bonus_stat),
            controllers=stages("controller", chosen.controllers),
            whitens=chosen.whiten_advantages,
        )

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Those that every update runs on the batch; `bonus_statistic` is a part of a shaper."""
        optional = (self.importance_correction, self.target)
        return (
            *self.reward_transforms,
            self.advantage,
            *self.shapers,
            self.policy_loss,
            *self.regularisers,
            self.aggregation,
            *(stage for stage in optional if stage is not None),
        )

    @property
    def needs(self) -> frozenset[str]:
        """What stages, controllers and the actor's value read beyond the basic columns."""
        read_out = [] if self.target is None else [self.read_out]
        stages = (*self.stages, *self.controllers, *read_out)
        shown = {"entropy"} if self.controllers else set()
        return frozenset(shown).union(*(stage.needs for stage in stages))

    @property
    def keeps_groups_whole(self) -> bool:
        """Whether the loss is one of whole groups, which minibatches then hold."""
        return self.policy_loss.method.kind == "group_loss"

    @property
    def imitates(self) -> bool:
        """Whether the loss learns from demonstrations too, see `method.policy_losses`."""
        return "demonstrations" in self.policy_loss.needs

    def prepare(self, batch: SequenceBatch) -> None:
        """Fills ``values``, ``target_quantiles`` and ``advantages`` of a whole batch.

        Args:
            batch: rewards, masks and, with a critic, ``quantiles``; changed in place.
        """
        self.transform_rewards(batch)
        if batch.quantiles is not None and self.target is not None:
            self.read_out.prepare(batch)
            batch.values = self.read_out(batch.law)
            targets = batch.target_quantiles = self.target.of_whole(batch)
            self._check_targets(targets, batch)
        batch.advantages = self._shaped_advantages(batch)
        for stage in (self.policy_loss, *self.regularisers, self.aggregation):
            stage.prepare(batch)

    def _check_targets(self, targets: Tensor, batch: SequenceBatch) -> None:
        if self.head.from_data and batch.support:
            self.head.fit(batch.support[0], batch.support[-1])
        outside = check_targets(self.head, targets, batch.loss_mask)
        if self.head.from_data:
            share = masked_mean(outside.float().mean(-1), batch.loss_mask, batch.all_reduce)
            batch.metrics["critic_targets_clipped"] = float(share)

    def transform_rewards(self, batch: SequenceBatch) -> None:
        """Replaces ``rewards`` by what the critic and the actor learn from."""
        parts, whole = [batch.returns], batch.returns
        for transform in self.reward_transforms:
            batch.reward_parts = torch.stack(parts, dim=1)
            batch.rewards = transform.of_whole(batch)
            before, whole = whole, batch.returns
            parts.append(whole - before)
        batch.reward_parts = torch.stack(parts, dim=1)

    def _shaped_advantages(self, batch: SequenceBatch) -> Tensor:
        advantages = self.advantage.of_whole(batch)
        for shaper in self.shapers:
            advantages = shaper.of_whole(batch, advantages)
        if self.whitens:
            return whiten(advantages, batch.loss_mask, batch.all_reduce)
        return advantages

    def regularisation(self, logp: Tensor, batch: SequenceBatch) -> Tensor | float:
        """(B, T): the sum of all regularisers; 0 without any."""
        return sum(regulariser(logp, batch) for regulariser in self.regularisers)

    def correct_importance(self, logp: Tensor, batch: SequenceBatch) -> None:
        """Weighs each token by learner over sampler; ratios are then to the learner's own logps.

        The decoupled form of truncated importance sampling: the loss clips the policy against
        itself before the update, and what separates that from the sampler is a weight without
        gradient. Tokens that top-p or top-k removed are never seen, which no weight can make up
        for. Where a loss is that of a whole sequence at each of its tokens, the mean of their
        weights is the sequence's.

        Args:
            logp: (B, T), the learner's, before the first step.
            batch: Changed in place: ``action_logp``, and two columns of ``extras``.
        """
        correction, mask, sampler_logp = (
            self.importance_correction,
            batch.loss_mask,
            batch.action_logp,
        )
        assert correction is not None
        correction.prepare(batch)
        weights = correction(logp, batch)
        bounded = weights != zero_padding(logp - sampler_logp, mask).exp()
        batch.metrics["importance_weight_mean"] = float(
            masked_mean(weights, mask, batch.all_reduce)
        )
        batch.metrics["importance_bounded_share"] = float(
            masked_mean(bounded.float(), mask, batch.all_reduce)
        )
        batch.extras[IMPORTANCE_WEIGHTS] = weights
        batch.extras[SAMPLER_LOGP] = sampler_logp
        batch.action_logp = logp


def _stage(kind: str, spec: Spec, shared: Mapping[str, Any], preset: type) -> Stage:
    """A stage with those of the shared settings that it has and its own table does not give."""
    method = resolve(kind, spec).method
    taken = {name: shared[name] for name in shared.keys() & method.settings().keys()}
    if own := method.own_defaults & taken.keys():
        default = preset()
        for name in own:
            if taken[name] == getattr(default, name):
                del taken[name]
    table = {"name": spec} if isinstance(spec, str) else spec
    return resolve(kind, {**taken, **table}, given=table)
