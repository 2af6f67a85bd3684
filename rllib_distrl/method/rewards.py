"""Reward transforms: (batch, settings) to (B, T), applied in order before the advantage."""

from typing import Any

import torch
from torch import Tensor

from rllib_distrl.maths.group_advantages import gradient_novelty as novelty_of
from rllib_distrl.maths.group_advantages import group_index
from rllib_distrl.maths.losses import check_kl, kl_estimate
from rllib_distrl.maths.statistics import row_mean, zero_padding
from rllib_distrl.method.batch import SequenceBatch
from rllib_distrl.method.registry import register
from rllib_distrl.settings import NotNegative, Positive


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


def _check_perturb(*, sigma_start: float, sigma_end: float, horizon: int) -> None:
    if min(sigma_start, sigma_end) < 0 or horizon < 1:
        raise ValueError(
            "reward 'random_perturb' takes deviations >= 0 and horizon >= 1; got "
            f"{sigma_start}, {sigma_end} and {horizon}"
        )


@register("reward", "random_perturb", check=_check_perturb)
def random_perturb(
    batch: SequenceBatch, *, sigma_start: float = 0.5, sigma_end: float = 0.0, horizon: int = 100
) -> Tensor:
    """R + N(0, σ²), σ going linearly from its start to its end over `horizon` iterations.

    Random reward perturbation (RRP, arXiv 2506.08737); the numbers are our choice.
    """
    done = min(1.0, (batch.k - 1) / horizon)
    sigma = sigma_start + (sigma_end - sigma_start) * done
    device = batch.generator.device if batch.generator is not None else batch.rewards.device
    noise = torch.randn(len(batch), generator=batch.generator, device=device)
    return _add_at_end(batch, sigma * noise.to(batch.rewards))


@register("reward", "neg_entropy", needs=("entropy",))
def neg_entropy(batch: SequenceBatch) -> Tensor:
    """−mean_t H in the place of the task's reward: training without a verifier.

    RENT (arXiv 2505.22660); its penalty for completions without an answer is left out, because
    rewards do not say so here.
    """
    return _add_at_end(batch, -row_mean(batch.column("entropy"), batch.loss_mask) - batch.returns)


@register("reward", "em_sequence")
def em_sequence(batch: SequenceBatch) -> Tensor:
    """Σ_t log π in the place of the task's reward (EM-RL, arXiv 2505.15134, of sequences)."""
    logp = zero_padding(batch.action_logp, batch.loss_mask).sum(1)
    return _add_at_end(batch, logp - batch.returns)


@register("reward", "em_token", needs=("entropy",))
def em_token(batch: SequenceBatch) -> Tensor:
    """−Σ_t H in the place of the task's reward (EM-RL, arXiv 2505.15134, of tokens)."""
    entropy = zero_padding(batch.column("entropy"), batch.loss_mask).sum(1)
    return _add_at_end(batch, -entropy - batch.returns)


def _check_budget(*, pass_rate: float, quantile: float) -> None:
    if not 0.0 < pass_rate <= 1.0 or not 0.0 <= quantile <= 1.0:
        raise ValueError(
            "reward 'length_budget' takes pass_rate in (0, 1] and quantile in [0, 1]; got "
            f"{pass_rate} and {quantile}"
        )


@register("reward", "length_budget", needs=("groups",), check=_check_budget)
def length_budget(
    batch: SequenceBatch, *, pass_rate: float = 0.75, quantile: float = 0.8
) -> Tensor:
    """No reward beyond a prompt's budget of tokens: a quantile of its passed completions' lengths.

    Only for prompts whose group passes at least at this rate (returns above 1/2), the others have
    the length limit. After PALU (arXiv 2510.10168); estimated from the present group, rate and
    quantile are our choice.
    """
    index, sizes = group_index(batch.group)
    passed, lengths = batch.returns > 0.5, batch.lengths.to(batch.rewards.dtype)
    budget = torch.full_like(sizes, torch.iinfo(sizes.dtype).max).to(lengths.dtype)
    for number in range(len(sizes)):
        rows = passed[index == number]
        if float(rows.to(lengths.dtype).mean()) >= pass_rate:
            budget[number] = lengths[(index == number) & passed].quantile(quantile)
    return _add_at_end(batch, torch.where(lengths > budget[index], -batch.returns, 0.0))


@register("reward", "gradient_novelty", needs=("groups", "head_gradient"))
def gradient_novelty(
    batch: SequenceBatch,
    *,
    strength: NotNegative = 0.5,
    cap: Positive = 3.0,
    good_above: float = 0.5,
) -> Tensor:
    """clip(r (1 + λ r ν), ±cap), r = ±1 by the return: what points elsewhere gains, or loses less.

    ν is `maths.group_advantages.gradient_novelty` in the group, of the mean over tokens of the
    gradient by the last hidden state, W_y − Σ_v p_v W_v. It stands in the place of the task's
    reward. G²RL (arXiv 2512.15687); λ is our choice.

    Args:
        batch: With `head_gradient`.
        strength: λ; 0 leaves r.
        cap: Largest reward.
        good_above: Returns above are good, r = 1.

    Returns:
        (B, T).
    """
    r = torch.where(batch.returns > good_above, 1.0, -1.0).to(batch.rewards.dtype)
    novelty = novelty_of(batch.column("head_gradient"), r, batch.group)
    shaped = (r * (1.0 + strength * r * novelty)).clamp(-cap, cap)
    return _add_at_end(batch, shaped - batch.returns)


def _after_others(config: Any) -> None:
    names = [spec.get("name") for spec in config.reward_transforms]
    if names[:1] == ["max_min_groups"]:
        raise ValueError(
            "reward 'max_min_groups' takes the worst of several rewards, the task's and what each "
            "transform before it adds, and there is none before it. Name one first."
        )


@register("reward", "max_min_groups", fits=_after_others)
def max_min_groups(batch: SequenceBatch) -> Tensor:
    """The return of one reward alone: of that whose mean over the batch is least.

    The rewards are the task's and what each transform before this one adds, on whatever scales
    they have. MaxMin-RLHF (Chakraborty et al. 2024), where each is a group of people's; here the
    batch decides anew in every iteration. Writes the metric `max_min_choice`, the reward's number.
    """
    parts = batch.column("reward_parts")
    rows = batch.all_reduce(parts.new_tensor(float(len(batch))))
    worst = int((batch.all_reduce(parts.sum(0)) / rows).argmin())
    batch.metrics["max_min_choice"] = float(worst)
    return _add_at_end(batch, parts[:, worst] - batch.returns)
