"""The advantage that raises the expected best of k, with a law of returns from the critic."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rllib_distrl.maths import advantages as critic_maths
from rllib_distrl.maths.best_of_k import gain_over_best, law_of_batch
from rllib_distrl.maths.group_calibration import (
    check_unit_returns,
    leave_one_out_posterior,
    logit_shift,
    shifted_edges,
)
from rllib_distrl.maths.statistics import zero_padding
from rllib_distrl.method.batch import SequenceBatch
from rllib_distrl.method.difficulty import SOURCES, unused_of_group
from rllib_distrl.method.registry import demand, register


def _needs(settings: Mapping[str, Any]) -> set[str]:
    groups = {"groups"} if settings["calibrate"] else set()
    return groups | {str(settings["source"])} - {"returns"}


def _check(*, k: int, source: str, prior_weight: float, **_: Any) -> None:
    if k < 1 or k != int(k):
        raise ValueError(f"advantage 'best_of_k' takes a whole number k >= 1; got {k}")
    if source not in SOURCES:
        raise ValueError(f"advantage 'best_of_k' takes source in {SOURCES}; got {source!r}")
    if not prior_weight > 0:
        raise ValueError(f"advantage 'best_of_k' takes prior_weight > 0; got {prior_weight}")


def _fits(config: Any, **_: Any) -> None:
    demand(config, "advantage 'best_of_k'", gamma=1.0)


@register("advantage", "best_of_k", needs=_needs, check=_check, fits=_fits, ignores=unused_of_group)
def best_of_k(
    batch: SequenceBatch,
    *,
    k: int = 4,
    source: str = "quantiles",
    calibrate: bool = True,
    prior_weight: float = 2.0,
    lambda_: float = 1.0,
) -> Tensor:
    """GAE of u(R), what a completion adds to the best of k − 1 others; see `maths.best_of_k`.

    The baseline is E[u(R) | s_t] by the critic's law at s_t, so that tokens are credited with
    what they do to the best of k, not to the mean. Ours; returns in [0, 1] and undiscounted.
    k = 1 is GAE on group-calibrated values. Works for groups smaller than k, and of one without
    calibration.

    Args:
        batch: Any, with the source's column.
        k: ≥ 1.
        source: Whose law: the critic's "quantiles"; its scalar "values", around which returns
            are spread as in the whole batch (proportional odds; Bernoulli(V) for 0/1 returns);
            or "returns" of the batch alone (no critic: the control, one baseline per prompt).
        calibrate: Whether the group's other returns shift the law, leave-one-out.
        prior_weight: n₀, completions that the source counts for.
        lambda_: λ.

    Returns:
        (B, T).

    Raises:
        ValueError: For returns outside [0, 1].
    """
    total = batch.returns
    check_unit_returns(total, "advantage 'best_of_k'")
    atoms, edges = _law(batch, source)
    prior = (atoms * edges.diff(dim=-1)).sum(-1)[:, 0].clamp(0.0, 1.0)
    if calibrate:
        posterior = leave_one_out_posterior(prior, total, batch.group, prior_weight)
        edges = shifted_edges(edges, logit_shift(posterior, prior).unsqueeze(1))
    at_prompt = atoms[:, 0], edges[:, 0]
    value = (gain_over_best(atoms, *at_prompt, k) * edges.diff(dim=-1)).sum(-1)
    gain = gain_over_best(total, *at_prompt, k)
    batch.metrics["best_of_k_gain_mean"] = float(gain.mean())
    steps = torch.arange(batch.loss_mask.shape[1], device=gain.device)
    at_end = torch.where(steps == batch.lengths.unsqueeze(1) - 1, gain.unsqueeze(1), 0.0)
    value = value.expand_as(at_end)
    return critic_maths.gae(value, at_end, batch.loss_mask, 1.0, lambda_)


def _law(batch: SequenceBatch, source: str) -> tuple[Tensor, Tensor]:
    """The law of the whole return, given each state: atoms (B, T, N) and edges (B, T, N + 1).

    T is 1 where they are the same at every token.
    """
    rewards = zero_padding(batch.rewards, batch.loss_mask)
    so_far = rewards.cumsum(1) - rewards
    if source == "quantiles":
        quantiles = zero_padding(batch.column("quantiles"), batch.loss_mask)
        n = quantiles.shape[-1]
        edges = torch.linspace(0, 1, n + 1, dtype=quantiles.dtype, device=quantiles.device)
        return quantiles + so_far.unsqueeze(-1), edges.expand(len(batch), 1, -1)
    atoms, edges = law_of_batch(batch.returns, batch.all_reduce)
    mean = (atoms * edges.diff()).sum()
    atoms = atoms.expand(len(batch), 1, -1)
    if source == "returns":
        return atoms, edges.expand(len(batch), 1, -1)
    values = (zero_padding(batch.column("values"), batch.loss_mask) + so_far).clamp(0.0, 1.0)
    return atoms, shifted_edges(edges, logit_shift(values, mean))
