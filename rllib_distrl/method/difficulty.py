"""Weights by how hard a prompt is: advantages of prompts that succeed anyway are scaled down."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rllib_distrl.maths.group_calibration import (
    calibrated_edges,
    check_unit_returns,
    leave_one_out_posterior,
    logit_shift,
)
from rllib_distrl.maths.read_outs import best_of_k
from rllib_distrl.maths.statistics import masked_mean
from rllib_distrl.method.batch import SequenceBatch
from rllib_distrl.method.registry import demand, register

SOURCES = ("quantiles", "values", "returns")


def unused_of_group(settings: Mapping[str, Any]) -> set[str]:
    """What of a calibration's settings is not read: without it the source counts for itself."""
    return set() if settings["calibrate"] else {"prior_weight"}


def _needs(settings: Mapping[str, Any]) -> set[str]:
    groups = {"groups"} if settings["calibrate"] else set()
    return groups | {str(settings["source"])} - {"returns"}


def _prior(batch: SequenceBatch, source: str) -> Tensor:
    """(B,), V(s_0) by the critic, or the mean return of all learners' rows without one."""
    if source == "returns":
        rows = torch.ones_like(batch.returns, dtype=torch.bool)
        return masked_mean(batch.returns, rows, batch.all_reduce).expand(len(batch))
    column = batch.column(source)[:, 0]
    return (column.mean(-1) if source == "quantiles" else column).clamp(0.0, 1.0)


def _check(*, k: int, source: str, prior_weight: float, **_: Any) -> None:
    if k < 1 or source not in SOURCES:
        raise ValueError(
            f"shaper 'pass_at_k' takes k >= 1 and source in {SOURCES}; got {k}, {source!r}"
        )
    if not prior_weight >= 0:
        raise ValueError(f"shaper 'pass_at_k' takes prior_weight >= 0; got {prior_weight}")


def _fits(config: Any, *, source: str, calibrate: bool, **_: Any) -> None:
    if calibrate or source == "returns":  # undiscounted ones of whole completions
        demand(config, "shaper 'pass_at_k' on returns", gamma=1.0)


@register("shaper", "pass_at_k", needs=_needs, check=_check, fits=_fits, ignores=unused_of_group)
def pass_at_k(
    batch: SequenceBatch,
    advantages: Tensor,
    *,
    k: int = 4,
    source: str = "quantiles",
    calibrate: bool = True,
    prior_weight: float = 2.0,
) -> Tensor:
    """A · (1 − ρ_{k−1}(s_0)), before whitening; ρ is the expected best of k − 1 at the prompt.

    For binary returns and R − V as advantage it follows the gradient of pass@k, up to a factor.
    Ours; returns in [0, 1]. k = 1 is off, 2 mild, 4 for diversity.

    Args:
        batch: Any, with the source's column.
        advantages: (B, T), A.
        k: ≥ 1.
        source: What is known of the prompt: the critic's "quantiles", its "values", or only the
            "returns" of the batch (no critic: the control).
        calibrate: Whether the group's other returns correct it, leave-one-out.
        prior_weight: n₀, completions that the source counts for.

    Returns:
        (B, T).

    Raises:
        ValueError: For returns outside [0, 1], where they are read.
    """
    if calibrate or source == "returns":
        check_unit_returns(batch.returns, "shaper 'pass_at_k'")
    value = prior = _prior(batch, source)
    if calibrate:
        value = leave_one_out_posterior(prior, batch.returns, batch.group, prior_weight)
    if source == "quantiles":
        quantiles = batch.column("quantiles")[:, 0]
        shift = logit_shift(value, prior) if calibrate else torch.zeros_like(prior)
        best = best_of_k(quantiles, k - 1, calibrated_edges(shift, quantiles.shape[-1]))
    else:
        best = 1.0 - (1.0 - value.clamp(0.0, 1.0)) ** (k - 1)
    weight = (1.0 - best).clamp(min=0.0)
    batch.metrics["pass_at_k_weight_mean"] = float(weight.mean())
    return advantages * weight.unsqueeze(1)
