"""Policy losses: (logp (B, T) with gradient, batch, settings) to per-token losses (B, T).

And losses of whole groups, which stand in their place and give one number per row (B,).

Those that imitate need ``demonstrations``: the environment then tells learners a worked solution of
each prompt, and the loss is also asked for the losses of a batch of these (`SequenceBatch.shown`),
whose mean over tokens is added to that of the sampled rows.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rllib_distrl.maths import group_losses, imitation, losses, weighted_losses
from rllib_distrl.maths.statistics import bounded_log_ratio, masked_mean, zero_padding
from rllib_distrl.method.batch import SequenceBatch, of_batch, takes_settings_of
from rllib_distrl.method.registry import demand, register
from rllib_distrl.settings import NotNegative, NotNegativeInt, Positive

clip = register("policy_loss", "clip")(
    of_batch(losses.clipped_surrogate, given=("logp",), without=("ratio_level",))
)


def _gspo_fits(config: Any, **settings: Any) -> None:
    demand(config, "policy_loss 'gspo'", aggregation="sequence_mean")


register("policy_loss", "gspo", fits=_gspo_fits, own_defaults=("clip_param", "clip_param_high"))(
    of_batch(losses.gspo, given=("logp",))
)


def _one_step(config: Any, method: str, otherwise: str) -> None:
    """Refuses several optimiser steps on a batch."""
    rows = config.rollout_settings.episodes_per_iteration // max(config.num_learners or 0, 1)
    steps = config.num_epochs * (rows // (config.minibatch_size or rows))
    if config.rollout_settings.segment_tokens and config.minibatch_size:
        raise ValueError(
            f"{method} is defined for one optimiser step per batch, but with [rollout] "
            "segment_tokens batches vary in size: minibatch_size would cut some of them. Leave "
            f"minibatch_size out, or set segment_tokens = 0. {otherwise}"
        )
    if steps > 1:
        raise ValueError(
            f"{method} is defined for one optimiser step per batch, where the ratio is 1; after "
            f"it a sequence's product of ratios explodes. Here are {steps}: num_epochs = "
            f"{config.num_epochs}, minibatch_size = {config.minibatch_size} of {rows} sequences. "
            f"Set num_epochs = 1 and leave minibatch_size out. {otherwise}"
        )


def _lad_fits(config: Any, *, ratio_level: str, **settings: Any) -> None:
    demand(config, "policy_loss 'lad'", whiten_advantages=False, entropy_coeff=0.0)
    if ratio_level == "sequence":
        demand(config, "policy_loss 'lad' of sequences", aggregation="sequence_mean")
        _one_step(config, "policy_loss 'lad' of sequences", "Or set ratio_level = 'token' in it.")


def _check_lad(*, divergence: str, inverse_eta: float, ratio_level: str) -> None:
    if divergence not in losses.LAD_DIVERGENCES:
        raise ValueError(f"policy_loss 'lad' has divergence {divergence!r}; it must be one of "
                         f"{', '.join(losses.LAD_DIVERGENCES)}.")  # fmt: skip
    if ratio_level not in losses.RATIO_LEVELS:
        raise ValueError(f"policy_loss 'lad' has ratio_level {ratio_level!r}; it must be one of "
                         f"{', '.join(losses.RATIO_LEVELS)}.")  # fmt: skip
    if inverse_eta <= 0:
        raise ValueError(f"policy_loss 'lad' has inverse_eta {inverse_eta}; it must be above 0.")


register("policy_loss", "lad", check=_check_lad, fits=_lad_fits)(
    of_batch(losses.lad, given=("logp",))
)


def _check_copg(*, beta: float) -> None:
    if beta < 0:
        raise ValueError(f"policy_loss 'copg' has beta {beta}; it must be >= 0.")


register("group_loss", "copg", check=_check_copg)(of_batch(group_losses.copg, given=("logp",)))


def _check_fdpg(*, divergence: str, beta: float) -> None:
    if divergence not in group_losses.DPG_DIVERGENCES:
        raise ValueError(f"policy_loss 'fdpg' has divergence {divergence!r}; it must be one of "
                         f"{', '.join(group_losses.DPG_DIVERGENCES)}.")  # fmt: skip
    if beta <= 0:
        raise ValueError(f"policy_loss 'fdpg' has beta {beta}; it must be above 0.")


def _fdpg_fits(config: Any, **settings: Any) -> None:
    _one_step(config, "policy_loss 'fdpg'", "Or use 'copg', which needs no ratio.")


register("group_loss", "fdpg", check=_check_fdpg, fits=_fdpg_fits)(
    of_batch(group_losses.fdpg, given=("logp",))
)
register("group_loss", "disco")(of_batch(group_losses.disco, given=("logp",)))
register("group_loss", "pairwise_bt")(of_batch(group_losses.pairwise_bt, given=("logp",)))


# In these the ratio weighs or gates a token instead of being clipped.


def _of_sequences(name: str) -> Callable[..., None]:
    def fits(config: Any, **settings: Any) -> None:
        demand(config, f"policy_loss {name!r}", aggregation="sequence_mean")

    return fits


_CLIPS = ("clip_param", "clip_param_high")
register("policy_loss", "cispo", own_defaults=_CLIPS)(
    of_batch(weighted_losses.cispo, given=("logp",))
)
register("policy_loss", "double_sided", own_defaults=_CLIPS)(
    of_batch(weighted_losses.double_sided, given=("logp",))
)
register("policy_loss", "rapid")(of_batch(weighted_losses.truncated_importance, given=("logp",)))
register("policy_loss", "sapo", fits=_of_sequences("sapo"))(
    of_batch(weighted_losses.sapo, given=("logp",))
)
register("policy_loss", "gmpo", fits=_of_sequences("gmpo"))(
    of_batch(weighted_losses.gmpo, given=("logp",))
)
register("policy_loss", "dppo")(of_batch(weighted_losses.dppo, given=("logp",)))
register("policy_loss", "rpg", own_defaults=_CLIPS)(of_batch(weighted_losses.rpg, given=("logp",)))


# Two losses that treat tokens apart whose probability and advantage rise together, both from arXiv
# 2505.22617. cov = (A − mean A)(logπ − mean logπ) over the whole batch, with the log-probabilities
# that sampled, so that the selected tokens do not depend on how the batch is cut (our choice; the
# authors recompute it in each micro-batch, which agrees before the first step).


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
    batch: SequenceBatch, *, token_share: float, cov_low: float, cov_high: float, **settings: Any
) -> None:
    cov = covariance(batch)
    device = batch.generator.device if batch.generator is not None else cov.device
    lots = torch.rand(cov.shape, generator=batch.generator, device=device).to(cov.device)
    band = batch.loss_mask & (cov > cov_low) & (cov < cov_high)
    batch.extras["clip_cov"] = _select(lots, band, _count(batch, token_share))


def _prepare_kl_cov(batch: SequenceBatch, *, token_share: float, **settings: Any) -> None:
    batch.extras["kl_cov"] = _select(covariance(batch), batch.loss_mask, _count(batch, token_share))


@register("policy_loss", "clip_cov", prepare=_prepare_clip_cov)
@takes_settings_of(losses.clipped_surrogate, without=("dual_clip", "ratio_level"))
def clip_cov(
    logp: Tensor,
    batch: SequenceBatch,
    *,
    token_share: float = 2e-4,
    cov_low: float = 1.0,
    cov_high: float = 5.0,
    **bounds: Any,
) -> Tensor:
    """The clipped surrogate without a random few of the tokens of high covariance.

    Args:
        logp: (B, T).
        batch: With `advantages`, prepared.
        token_share: Share of all tokens that is dropped.
        cov_low: Tokens with a covariance above this …
        cov_high: … and below this may be dropped.
        **bounds: `clip_param` and `clip_param_high`.

    Returns:
        (B, T).
    """
    del token_share, cov_low, cov_high
    return torch.where(batch.column("clip_cov"), 0.0, clip(logp, batch, **bounds))


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


_IMITATED, _RIGHT = "imitated", "right"


def _task_returns(batch: SequenceBatch) -> Tensor:
    """(B,), before any reward transform: what says whether a completion is right."""
    return batch.returns if batch.reward_parts is None else batch.reward_parts[:, 0]


def _prepare_hpt(batch: SequenceBatch, *, gate: int, good_above: float, **settings: Any) -> None:
    imitated = imitation.few_right(_task_returns(batch) > good_above, batch.group, gate)
    batch.extras[_IMITATED] = imitated
    if batch.demonstrations is None:
        return
    shown = batch.demonstrations
    chosen = torch.isin(shown.group, batch.group[imitated])
    share = masked_mean(chosen.float(), torch.ones_like(chosen), batch.all_reduce)
    batch.metrics["imitated_share"] = float(share)
    batch.demonstrations = shown[chosen]


def _hpt_fits(config: Any, **settings: Any) -> None:
    demand(config, "policy_loss 'hpt', which imitates where all completions are wrong,",
           max_sampling_rounds=1)  # fmt: skip


@register("policy_loss", "hpt", needs=("demonstrations",), prepare=_prepare_hpt, fits=_hpt_fits)
@takes_settings_of(losses.clipped_surrogate, without=("ratio_level",))
def hpt(
    logp: Tensor,
    batch: SequenceBatch,
    *,
    gate: NotNegativeInt = 0,
    supervised_coeff: NotNegative = 1.0,
    good_above: float = 0.5,
    **bounds: Any,
) -> Tensor:
    """HPT: −c log π of a shown solution where at most `gate` completions are right; else `clip`.

    Hybrid Post-Training (arXiv 2509.04419) with its hard switch, as its authors' code has it: the
    sampled completions of such a prompt teach the policy nothing, and the imitation is a mean over
    the tokens of all solutions that are shown, however few; in the paper it is a mean over prompts.
    The authors take gates of 0 and 2 of 8, c = 1 (0.3 for a model of 1.5B), the advantage of
    Dr. GRPO, a constant divisor and no clip; a critic, where there is one, learns from all sampled
    completions (our choice).

    Args:
        logp: (B, T).
        batch: Of sampled rows, prepared; or `shown`.
        gate: Right completions of a prompt up to which it is imitated.
        supervised_coeff: c.
        good_above: Returns of the task above are right.
        **bounds: `clip_param`, `clip_param_high` and `dual_clip` of `clip`.

    Returns:
        (B, T).
    """
    del gate, good_above
    if batch.shown:
        return supervised_coeff * imitation.supervised(logp, loss_mask=batch.loss_mask)
    imitated = batch.column(_IMITATED).unsqueeze(1)
    return torch.where(imitated, 0.0, clip(logp, batch, **bounds))


def _prepare_srft(
    batch: SequenceBatch, *, good_above: float, shown_return: float, **settings: Any
) -> None:
    returns = _task_returns(batch)
    batch.extras[_RIGHT] = returns > good_above
    if (shown := batch.demonstrations) is not None:
        advantages = imitation.shown_advantage(returns, batch.group, shown.group, shown_return)
        shown.advantages = shown.at_tokens(advantages)


def _srft_fits(config: Any, **settings: Any) -> None:
    demand(config, "policy_loss 'srft', which reads no advantage,",
           advantage={"name": "zero"}, bonus_coeff=0.0, shapers=[])  # fmt: skip


@register(
    "policy_loss",
    "srft",
    needs=("demonstrations", "entropy"),
    prepare=_prepare_srft,
    fits=_srft_fits,
)
def srft(
    logp: Tensor,
    batch: SequenceBatch,
    *,
    supervised_coeff: NotNegative = 0.5,
    positive_coeff: NotNegative = 0.1,
    shaping: Positive = 0.1,
    good_above: float = 0.5,
    shown_return: float = 1.0,
) -> Tensor:
    """SRFT: .1 e^H (−log π) of right completions, +log π of wrong ones, and a shown solution.

    What is shown costs .5 e^{−H} (−log π) − A π/(π + .1), H being a completion's mean entropy and A
    the return of a shown solution less the mean of its group and itself. arXiv 2506.19767; its
    authors' code could not be read, so where the paper leaves open, and in A (no division by the
    deviation) and π/(π + .1) (in place of the ratio π), it is what the code of HPT (arXiv
    2509.04419) trains as SRFT. Each of the three expectations is a mean of its own, those of shown
    solutions over their tokens (paper).

    Args:
        logp: (B, T).
        batch: With `entropy`, prepared; of sampled rows, or `shown`.
        supervised_coeff: Of the imitation.
        positive_coeff: Of right completions.
        shaping: Of π/(π + s).
        good_above: Returns of the task above are right.
        shown_return: The return that a shown solution counts as.

    Returns:
        (B, T).
    """
    del good_above, shown_return
    entropy, mask = batch.column("entropy"), batch.loss_mask
    if batch.shown:
        return imitation.srft_shown(
            logp,
            entropy,
            batch.column("advantages"),
            supervised_coeff=supervised_coeff,
            shaping=shaping,
            loss_mask=mask,
        )
    return imitation.srft_sampled(
        logp, entropy, batch.column(_RIGHT), positive_coeff=positive_coeff, loss_mask=mask
    )
