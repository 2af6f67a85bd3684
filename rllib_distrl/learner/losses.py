"""The terms of the loss, and their sums over micro-batches and steps."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch

from rllib_distrl.maths.aggregation import weighted_sum
from rllib_distrl.maths.losses import squared_value_loss
from rllib_distrl.maths.quantiles import quantile_huber_loss
from rllib_distrl.maths.statistics import AllReduce, identity
from rllib_distrl.method.batch import SequenceBatch

if TYPE_CHECKING:
    from rllib_distrl.algorithm.distrl_config import DistRLConfig


@dataclass
class Losses:
    """Scalars of a micro-batch, a step or an iteration; the names are RLlib's metric keys."""

    total_loss: torch.Tensor | float = 0.0
    policy_loss: torch.Tensor | float = 0.0
    vf_loss: torch.Tensor | float = 0.0
    entropy: torch.Tensor | float = 0.0
    regularisation: torch.Tensor | float = 0.0

    @property
    def total(self) -> torch.Tensor:
        """What is differentiated."""
        assert isinstance(self.total_loss, torch.Tensor)
        return self.total_loss

    def add(self, other: "Losses") -> None:
        """Adds another micro-batch's share."""
        for field in fields(self):
            value = getattr(other, field.name)
            value = value.detach() if isinstance(value, torch.Tensor) else value
            setattr(self, field.name, getattr(self, field.name) + value)

    @staticmethod
    def mean(steps: list["Losses"], all_reduce: AllReduce = identity) -> dict[str, float]:
        """Means over optimiser steps, by RLlib's keys.

        Args:
            steps: shares of one learner; its weights divide by the tokens of all.
            all_reduce: sum over learners.
        """
        names = [field.name for field in fields(Losses)]
        sums = [sum(float(getattr(step, name)) for step in steps) for name in names]
        device = torch.as_tensor(steps[0].total_loss).device
        total = all_reduce(torch.tensor(sums, dtype=torch.float64, device=device))
        return dict(zip(names, (total / len(steps)).tolist(), strict=True))


def distrl_losses(
    policy_loss: torch.Tensor,
    regularisation: torch.Tensor | float,
    entropy: torch.Tensor,
    quantiles: torch.Tensor | None,
    rollouts: SequenceBatch,
    weights: torch.Tensor,
    critic_weights: torch.Tensor,
    config: "DistRLConfig",
    entropy_coeff: float,
) -> Losses:
    """The loss: surrogate + regularisers + vf_loss_coeff x critic - entropy_coeff x entropy.

    Args:
        policy_loss: (B, T) per token.
        regularisation: (B, T) per token, its coefficients included; 0 without any.
        entropy: (B, T) in nats.
        quantiles: (B, T, N) with gradient, or None without a critic.
        rollouts: with ``target_quantiles``.
        weights: (B, T) of the policy's terms.
        critic_weights: (B, T) of the critic's: a mean over tokens.
        config: coefficients.
        entropy_coeff: of the entropy bonus in this iteration.

    Returns:
        Scalars; policy_loss, vf_loss and entropy are without their coefficients.
    """
    policy = weighted_sum(policy_loss, weights)
    # Without a bonus there is no need to differentiate through the whole vocabulary.
    mean_entropy = weighted_sum(entropy if entropy_coeff > 0 else entropy.detach(), weights)
    vf_loss: torch.Tensor | float = 0.0
    if quantiles is not None:
        vf_loss = weighted_sum(critic_loss(quantiles, rollouts, config), critic_weights)
    regular: torch.Tensor | float = 0.0
    if isinstance(regularisation, torch.Tensor):
        regular = weighted_sum(regularisation, weights)
    total = policy + config.vf_loss_coeff * vf_loss - entropy_coeff * mean_entropy + regular
    return Losses(total, policy, vf_loss, mean_entropy, regular)


def critic_loss(
    quantiles: torch.Tensor, rollouts: SequenceBatch, config: "DistRLConfig"
) -> torch.Tensor:
    """(B, T): quantile Huber loss, or for one quantile RLlib's own clipped squared error."""
    targets = rollouts.column("target_quantiles")
    if config.n_quantiles == 1:
        return squared_value_loss(
            quantiles.squeeze(-1), targets.squeeze(-1), config.vf_clip_param, rollouts.loss_mask
        )
    return quantile_huber_loss(
        quantiles,
        targets,
        config.quantile_huber_kappa,
        config.quantile_loss,
        rollouts.loss_mask,
    )
