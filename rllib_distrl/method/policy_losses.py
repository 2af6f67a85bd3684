"""Policy losses: (logp (B, T) with gradient, batch slice, settings) to per-token losses (B, T)."""

from typing import Any

from torch import Tensor

from rllib_distrl.maths import losses
from rllib_distrl.method.batch import SequenceBatch
from rllib_distrl.method.registry import demand, register


@register("policy_loss", "clip")
def clip(
    logp: Tensor,
    batch: SequenceBatch,
    *,
    clip_param: float = 0.2,
    clip_param_high: float | None = None,
    dual_clip: float | None = None,
) -> Tensor:
    """PPO's clipped surrogate, with DAPO's upper bound and dual clip as options.

    Args:
        logp: (B, T).
        batch: With `advantages`.
        clip_param: ε.
        clip_param_high: ε above 1; None: ε.
        dual_clip: Bound on the loss of negative advantages; None: off.

    Returns:
        (B, T).
    """
    return losses.clipped_surrogate(
        logp,
        batch.action_logp,
        batch.column("advantages"),
        clip_param=clip_param,
        clip_param_high=clip_param_high,
        dual_clip=dual_clip,
        loss_mask=batch.loss_mask,
    )


def _gspo_fits(config: Any, **settings: Any) -> None:
    demand(config, "policy_loss 'gspo'", aggregation="sequence_mean")


@register("policy_loss", "gspo", fits=_gspo_fits, own_defaults=("clip_param", "clip_param_high"))
def gspo(
    logp: Tensor,
    batch: SequenceBatch,
    *,
    clip_param: float = 3e-4,
    clip_param_high: float | None = 4e-4,
) -> Tensor:
    """The clipped surrogate on the geometric mean of a sequence's ratios.

    Args:
        logp: (B, T).
        batch: With `advantages`.
        clip_param: ε.
        clip_param_high: ε above 1; None: ε.

    Returns:
        (B, T), for the `sequence_mean` aggregation.
    """
    return losses.gspo(
        logp,
        batch.action_logp,
        batch.column("advantages"),
        clip_param=clip_param,
        clip_param_high=clip_param_high,
        loss_mask=batch.loss_mask,
    )


def _one_step(config: Any, method: str, otherwise: str) -> None:
    """Refuses several optimiser steps on a batch."""
    rows = config.rollout_settings.episodes_per_iteration // max(config.num_learners or 0, 1)
    steps = config.num_epochs * (rows // (config.minibatch_size or rows))
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


@register("policy_loss", "lad", check=_check_lad, fits=_lad_fits)
def lad(
    logp: Tensor,
    batch: SequenceBatch,
    *,
    divergence: str = "js",
    inverse_eta: float = 4.0,
    ratio_level: str = "sequence",
) -> Tensor:
    """Learning Advantage Distributions.

    Args:
        logp: (B, T).
        batch: With `advantages`, group-normalised and not whitened.
        divergence: One of `losses.LAD_DIVERGENCES`.
        inverse_eta: 1/η.
        ratio_level: "token" or "sequence" (for the `sequence_mean` aggregation).

    Returns:
        (B, T).
    """
    return losses.lad(
        logp,
        batch.action_logp,
        batch.column("advantages"),
        divergence=divergence,
        inverse_eta=inverse_eta,
        ratio_level=ratio_level,
        loss_mask=batch.loss_mask,
    )
