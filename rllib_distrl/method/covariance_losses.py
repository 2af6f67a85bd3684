"""Policy losses that treat tokens apart whose probability and advantage rise together.

Both from arXiv 2505.22617. cov = (A − mean A)(logπ − mean logπ) over the whole batch, with the
log-probabilities that sampled, so that the selected tokens do not depend on how the batch is cut
(our choice; the authors recompute it in each micro-batch, which agrees before the first step).
"""

import torch
from torch import Tensor

from rllib_distrl.maths import losses
from rllib_distrl.maths.statistics import bounded_log_ratio, masked_mean, zero_padding
from rllib_distrl.method.batch import SequenceBatch
from rllib_distrl.method.registry import register


def covariance(batch: SequenceBatch) -> Tensor:
    """The covariance of each token.

    Args:
        batch: With `advantages`.

    Returns:
        (B, T), 0 in the padding.
    """
    advantages, mask = batch.column("advantages"), batch.loss_mask
    centred = advantages - masked_mean(advantages, mask, batch.all_reduce)
    surprise = batch.action_logp - masked_mean(batch.action_logp, mask, batch.all_reduce)
    return zero_padding(centred * surprise, mask)


def _select(score: Tensor, allowed: Tensor, count: int) -> Tensor:
    """(B, T), bool: the `count` allowed tokens of highest score, or all of them if fewer."""
    score = torch.where(allowed, score, float("-inf")).flatten()
    chosen = torch.zeros_like(score, dtype=torch.bool)
    chosen[score.topk(min(count, score.numel())).indices] = True
    return chosen.view_as(allowed) & allowed


def _count(batch: SequenceBatch, token_share: float) -> int:
    return max(1, int(token_share * int(batch.loss_mask.sum())))


def _prepare_clip_cov(
    batch: SequenceBatch, *, token_share: float = 2e-4, cov_low: float = 1.0,
    cov_high: float = 5.0, **settings: float,
) -> None:  # fmt: skip
    del settings
    cov = covariance(batch)
    device = batch.generator.device if batch.generator is not None else cov.device
    lots = torch.rand(cov.shape, generator=batch.generator, device=device).to(cov.device)
    band = batch.loss_mask & (cov > cov_low) & (cov < cov_high)
    batch.extras["clip_cov"] = _select(lots, band, _count(batch, token_share))


def _prepare_kl_cov(batch: SequenceBatch, *, token_share: float = 2e-4, **settings: float) -> None:
    del settings
    batch.extras["kl_cov"] = _select(covariance(batch), batch.loss_mask, _count(batch, token_share))


@register("policy_loss", "clip_cov", prepare=_prepare_clip_cov)
def clip_cov(
    logp: Tensor,
    batch: SequenceBatch,
    *,
    clip_param: float = 0.2,
    clip_param_high: float | None = None,
    token_share: float = 2e-4,
    cov_low: float = 1.0,
    cov_high: float = 5.0,
) -> Tensor:
    """The clipped surrogate without a random few of the tokens of high covariance.

    Args:
        logp: (B, T).
        batch: With `advantages`, prepared.
        clip_param: ε.
        clip_param_high: ε above 1; None: ε.
        token_share: Share of all tokens that is dropped.
        cov_low: Tokens with a covariance above this …
        cov_high: … and below this may be dropped.

    Returns:
        (B, T).
    """
    del token_share, cov_low, cov_high
    loss = losses.clipped_surrogate(
        logp,
        batch.action_logp,
        batch.column("advantages"),
        clip_param=clip_param,
        clip_param_high=clip_param_high,
        loss_mask=batch.loss_mask,
    )
    return torch.where(batch.column("clip_cov"), 0.0, loss)


@register("policy_loss", "kl_cov", prepare=_prepare_kl_cov)
def kl_cov(
    logp: Tensor, batch: SequenceBatch, *, token_share: float = 2e-4, penalty: float = 1.0
) -> Tensor:
    """−A ρ, without a clip, and a penalty on moving the tokens of highest covariance.

    Args:
        logp: (B, T).
        batch: With `advantages`, prepared.
        token_share: Share of all tokens that is held back.
        penalty: Weight of |logp − action_logp| there.

    Returns:
        (B, T).
    """
    del token_share
    log_ratio = bounded_log_ratio(logp, batch.action_logp, batch.loss_mask)
    advantages = zero_padding(batch.column("advantages"), batch.loss_mask)
    held = torch.where(batch.column("kl_cov"), log_ratio.abs(), 0.0)
    return -advantages * log_ratio.exp() + penalty * held
