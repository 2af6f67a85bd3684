"""The method as a list of stages: rewards, advantages, shaping, critic targets."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rllib_distrl.maths.advantages import whiten
from rllib_distrl.maths.read_outs import read_out
from rllib_distrl.maths.targets import TARGETS
from rllib_distrl.method.batch import SequenceBatch
from rllib_distrl.method.registry import Stage, resolve

if TYPE_CHECKING:
    from rllib_distrl.algorithm.distrl_config import DistRLConfig

# Settings of `[training]` that a stage may have: it then takes them from there.
SHARED = frozenset(
    {"gamma", "lambda_", "clip_param", "clip_param_high", "dual_clip", "bonus_coeff", "bonus_stat",
     "bonus_at", "bonus_center", "bonus_schedule", "bonus_horizon", "bonus_max_ratio"}
)  # fmt: skip
OPTIMISM = {"name": "dltv"}


@dataclass(frozen=True)
class Method:
    """The stages of one algorithm, in the order in which they run.

    Attributes:
        needs: Columns that the stages and the critic's targets read, see `stages.registry`.
    """

    reward_transforms: tuple[Stage, ...]
    advantage: Stage
    shapers: tuple[Stage, ...]
    policy_loss: Stage
    regularisers: tuple[Stage, ...]
    needs: frozenset[str]

    @property
    def stages(self) -> tuple[Stage, ...]:
        """All of them."""
        return (
            *self.reward_transforms,
            self.advantage,
            *self.shapers,
            self.policy_loss,
            *self.regularisers,
        )

    @classmethod
    def from_config(cls, config: "DistRLConfig") -> "Method":
        """Resolves the stages that ``config`` names; the optimism bonus comes last."""
        shapers = [*config.shapers, *([OPTIMISM] if config.bonus_coeff > 0 else [])]
        rewards = tuple(_stage("reward", spec, config) for spec in config.reward_transforms)
        advantage = _stage("advantage", config.advantage, config)
        shaped = tuple(_stage("shaper", spec, config) for spec in shapers)
        policy_loss = _stage("policy_loss", config.policy_loss, config)
        regularisers = tuple(_stage("regulariser", spec, config) for spec in config.regularisers)
        stages = (*rewards, advantage, *shaped, policy_loss, *regularisers)
        needs = {need for stage in stages for need in stage.needs}
        needs.update(*(resolve("controller", spec).needs for spec in config.controllers))
        # The critic's targets are made of its quantiles, where there is a critic.
        needs.add("quantiles")
        return cls(rewards, advantage, shaped, policy_loss, regularisers, frozenset(needs))

    def prepare(self, batch: SequenceBatch, config: "DistRLConfig") -> None:
        """Fills ``values``, ``target_quantiles`` and ``advantages`` of a whole batch.

        Args:
            batch: rewards, masks and, with a critic, ``quantiles``; changed in place.
            config: the method's settings.
        """
        self.transform_rewards(batch)
        if batch.quantiles is not None:
            batch.values = read_out(batch.quantiles, **config.read_out)
            batch.target_quantiles = TARGETS[config.target](
                batch.quantiles,
                batch.rewards,
                batch.loss_mask,
                gamma=config.gamma,
                lambda_=config.critic_lambda,
                generator=batch.generator,
            )
        batch.advantages = self._shaped_advantages(batch, config.whiten_advantages)
        self.policy_loss.prepare(batch)

    def transform_rewards(self, batch: SequenceBatch) -> None:
        """Replaces ``rewards`` by what the critic and the actor learn from."""
        for transform in self.reward_transforms:
            batch.rewards = transform(batch)

    def regularisation(self, logp: torch.Tensor, batch: SequenceBatch) -> torch.Tensor | float:
        """(B, T): the sum of all regularisers; 0 without any."""
        return sum(regulariser(logp, batch) for regulariser in self.regularisers)

    def _shaped_advantages(self, batch: SequenceBatch, whitened: bool) -> torch.Tensor:
        advantages = self.advantage(batch)
        for shaper in self.shapers:
            advantages = shaper(batch, advantages)
        if whitened:
            return whiten(advantages, batch.loss_mask, batch.all_reduce)
        return advantages


def _stage(kind: str, spec: dict[str, Any], config: "DistRLConfig") -> Stage:
    method = resolve(kind, spec).method
    taken = {name: getattr(config, name) for name in SHARED & method.settings().keys()}
    if own := method.own_defaults & taken.keys():
        default = type(config)()
        for name in own:
            if taken[name] == getattr(default, name):
                del taken[name]
    return resolve(kind, {**taken, **spec})
