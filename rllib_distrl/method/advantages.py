"""Advantage estimators: (batch, settings) to (B, T), on whole groups, 0 in the padding."""

from typing import Any

import torch
from torch import Tensor

from rllib_distrl.maths import advantages as critic_maths
from rllib_distrl.maths import group_advantages as group_maths
from rllib_distrl.method.batch import SequenceBatch
from rllib_distrl.method.registry import demand, register


def _spread(per_row: Tensor, batch: SequenceBatch) -> Tensor:
    """(B,) to (B, T): the row's number at each of its tokens."""
    return torch.where(batch.loss_mask, per_row.unsqueeze(1), 0.0)


@register("advantage", "gae", needs=("values",))
def gae(batch: SequenceBatch, *, gamma: float = 1.0, lambda_: float = 0.95) -> Tensor:
    """Generalised advantage estimation on the critic's values.

    Args:
        batch: With `values`.
        gamma: γ.
        lambda_: λ.

    Returns:
        (B, T).
    """
    values = batch.column("values")
    return critic_maths.gae(values, batch.rewards, batch.loss_mask, gamma, lambda_)


def _zero_fits(config: Any) -> None:
    if config.bonus_coeff > 0 and config.bonus_max_ratio is not None:
        raise ValueError(
            f"advantage 'zero' leaves bonus_max_ratio = {config.bonus_max_ratio} nothing to be a "
            "share of: the bonus would be 0 too. Set bonus_max_ratio = None ('none' in a recipe), "
            "or bonus_coeff = 0."
        )


@register("advantage", "zero", fits=_zero_fits)
def zero(batch: SequenceBatch) -> Tensor:
    """No advantage at all: what remains is the bonus and the regularisers (an ablation).

    The bonus then needs `bonus_max_ratio` off: its cap is a share of the advantages' std.

    Args:
        batch: Any.

    Returns:
        (B, T), zeros.
    """
    return torch.zeros_like(batch.action_logp)


@register("advantage", "grpo", needs=("groups",))
def grpo(batch: SequenceBatch, *, scale_by_std: bool = True, std_epsilon: float = 1e-6) -> Tensor:
    """(R − group mean) / (group std + ε).

    Args:
        batch: Any.
        scale_by_std: Whether to divide by the std.
        std_epsilon: ε.

    Returns:
        (B, T).
    """
    per_row = group_maths.grpo(
        batch.returns, batch.group, scale_by_std=scale_by_std, std_epsilon=std_epsilon
    )
    return _spread(per_row, batch)


@register("advantage", "dr_grpo", needs=("groups",))
def dr_grpo(batch: SequenceBatch) -> Tensor:
    """R − group mean; belongs with the `constant` aggregation.

    Args:
        batch: Any.

    Returns:
        (B, T).
    """
    return _spread(group_maths.grpo(batch.returns, batch.group, scale_by_std=False), batch)


@register("advantage", "rloo", needs=("groups",))
def rloo(batch: SequenceBatch) -> Tensor:
    """R − mean of the group's others.

    Args:
        batch: Any.

    Returns:
        (B, T).
    """
    return _spread(group_maths.leave_one_out(batch.returns, batch.group), batch)


@register("advantage", "reinforce_pp")
def reinforce_pp(batch: SequenceBatch, *, gamma: float = 1.0) -> Tensor:
    """Reward to go, whitened over the batch; the KL is subtracted by the reward stage.

    REINFORCE++ (Hu 2025).

    Args:
        batch: Any.
        gamma: γ.

    Returns:
        (B, T).
    """
    to_go = critic_maths.returns_to_go(batch.rewards, batch.loss_mask, gamma)
    return critic_maths.whiten(to_go, batch.loss_mask, batch.all_reduce)


def _opo_fits(config: Any) -> None:
    demand(config, "advantage 'opo'", whiten_advantages=False, num_epochs=1, entropy_coeff=0.0)


@register("advantage", "opo", needs=("groups",), fits=_opo_fits)
def opo(batch: SequenceBatch) -> Tensor:
    """R − the group's length-weighted mean.

    Args:
        batch: Any.

    Returns:
        (B, T).
    """
    return _spread(group_maths.opo(batch.returns, batch.lengths, batch.group), batch)


def _maxk_fits(config: Any, *, k: int) -> None:
    demand(config, "advantage 'maxk'", whiten_advantages=False)
    group = config.rollout_settings.num_generations
    if not 1 <= k <= group:
        raise ValueError(f"advantage 'maxk' has k = {k}, but a group has {group} completions. "
                         "Choose 1 <= k <= num_generations.")  # fmt: skip


@register("advantage", "maxk", needs=("groups",), fits=_maxk_fits)
def maxk(batch: SequenceBatch, *, k: int) -> Tensor:
    """Gradient weight of the expected best of k.

    Args:
        batch: Any.
        k: At most the group's size.

    Returns:
        (B, T).
    """
    return _spread(group_maths.maxk(batch.returns, batch.group, k=k), batch)


def _bnpo_fits(config: Any, *, return_min: float, return_max: float) -> None:
    demand(config, "advantage 'bnpo'", whiten_advantages=False)
    if not return_min < return_max:
        raise ValueError(f"advantage 'bnpo' needs return_min < return_max, got {return_min} and "
                         f"{return_max}.")  # fmt: skip


@register("advantage", "bnpo", needs=("groups",), fits=_bnpo_fits)
def bnpo(batch: SequenceBatch, *, return_min: float = 0.0, return_max: float = 1.0) -> Tensor:
    """R − group mean over a Beta density fitted to the batch's group means.

    Args:
        batch: Any.
        return_min: Smallest return a task gives, mapped to 0.
        return_max: Largest, mapped to 1.

    Returns:
        (B, T).
    """
    returns = (batch.returns - return_min) / (return_max - return_min)
    return _spread(group_maths.bnpo(returns, batch.group, batch.all_reduce), batch)
