"""Policy losses that imitate a shown completion beside what was sampled.

They need ``demonstrations``: the environment then tells learners a worked solution of each prompt,
and a policy loss is also asked for the losses of a batch of these (`SequenceBatch.shown`), whose
mean over tokens is added to that of the sampled rows.
"""

from typing import Any

import torch
from torch import Tensor

from rllib_distrl.maths import imitation, losses
from rllib_distrl.maths.statistics import masked_mean
from rllib_distrl.method.batch import SequenceBatch, takes_settings_of
from rllib_distrl.method.policy_losses import clip
from rllib_distrl.method.registry import demand, register
from rllib_distrl.settings import NotNegative, NotNegativeInt, Positive

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
