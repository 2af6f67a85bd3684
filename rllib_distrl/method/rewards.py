"""Reward transforms: (batch, settings) to (B, T), applied in order before the advantage."""

from typing import Any

import torch
from torch import Tensor

from rllib_distrl.maths.kl import check_kl, kl_estimate
from rllib_distrl.maths.statistics import zero_padding
from rllib_distrl.method.batch import SequenceBatch
from rllib_distrl.method.registry import register


def _add_at_end(batch: SequenceBatch, per_row: Tensor) -> Tensor:
    """The rewards with (B,) added to each row's last token; empty rows stay as they are."""
    last = torch.arange(batch.loss_mask.shape[1], device=batch.loss_mask.device)
    at_end = last == (batch.lengths - 1).unsqueeze(1)
    return zero_padding(batch.rewards, batch.loss_mask) + at_end * per_row.unsqueeze(1)


def _check_overlong(*, cache_tokens: int | None, penalty: float) -> None:
    if cache_tokens is not None and cache_tokens < 1:
        raise ValueError(f"reward 'overlong' has cache_tokens {cache_tokens}; it must be >= 1.")
    if penalty < 0:
        raise ValueError(f"reward 'overlong' has penalty {penalty}; it must be >= 0.")


def _overlong_fits(config: Any, *, cache_tokens: int | None, penalty: float) -> None:
    limit = config.rollout_settings.max_completion_tokens
    if cache_tokens is not None and cache_tokens > limit:
        raise ValueError(f"reward 'overlong' has cache_tokens {cache_tokens}, but a completion has "
                         f"at most {limit} tokens. Choose cache_tokens <= {limit}.")  # fmt: skip


@register("reward", "overlong", check=_check_overlong, fits=_overlong_fits)
def overlong(
    batch: SequenceBatch, *, cache_tokens: int | None = None, penalty: float = 1.0
) -> Tensor:
    """DAPO's soft penalty: from 0 to −1 over the last `cache_tokens` before the limit.

    arXiv 2503.14476, eq. 13. The limit is `batch.width`.

    Args:
        batch: With `width`, the length limit.
        cache_tokens: L_cache, at most the limit; None: a fifth of the limit, as in the paper.
        penalty: Largest penalty, in units of the reward.

    Returns:
        (B, T).
    """
    assert batch.width is not None
    limit = batch.width
    cache_tokens = max(limit // 5, 1) if cache_tokens is None else cache_tokens
    excess = batch.lengths - (limit - cache_tokens)
    share = (excess.to(batch.rewards.dtype) / cache_tokens).clamp(0.0, 1.0)
    return _add_at_end(batch, -penalty * share)


@register("reward", "kl_penalty", needs=("ref_logp",), check=check_kl)
def kl_penalty(batch: SequenceBatch, *, coeff: float = 1e-3, estimator: str = "k1") -> Tensor:
    """r_t − β KL_t to the reference, of the policy that sampled.

    Args:
        batch: With `ref_logp`.
        coeff: β ≥ 0.
        estimator: "k1", "k2" or "k3".

    Returns:
        (B, T).
    """
    kl = kl_estimate(batch.action_logp, batch.column("ref_logp"), estimator, batch.loss_mask)
    return zero_padding(batch.rewards, batch.loss_mask) - coeff * kl


@register("reward", "noise_backward")
def noise_backward(
    batch: SequenceBatch, *, false_positive_rate: float, false_negative_rate: float
) -> Tensor:
    """(r − ρ0)/(1 − ρ0 − ρ1) on the return: unbiased under a verifier with known error rates.

    arXiv 2510.00915. Changes nothing where advantages are divided by the group's std.

    Args:
        batch: With binary returns.
        false_positive_rate: ρ0.
        false_negative_rate: ρ1.

    Returns:
        (B, T).

    Raises:
        ValueError: For rates that are negative or sum to 1 or more.
    """
    rates = (false_positive_rate, false_negative_rate)
    if min(rates) < 0.0 or sum(rates) >= 1.0:
        raise ValueError(f"noise_backward needs rates >= 0 whose sum is below 1, got {rates}")
    corrected = (batch.returns - false_positive_rate) / (1.0 - sum(rates))
    return _add_at_end(batch, corrected - batch.returns)
