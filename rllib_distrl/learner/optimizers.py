"""Optimisers: one for the policy, one for what only the critic uses, and their learning rates."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ray.rllib.core.learner.learner import DEFAULT_OPTIMIZER
from torch import nn
from torch.optim import Adam, Optimizer

from rllib_distrl.settings import TrainingSettings

LR_SCHEDULES = ("constant", "cosine")


def lr_factor(
    k: int,
    schedule: str = "constant",
    *,
    warmup_iterations: int = 0,
    decay_iterations: int | None = None,
    min_ratio: float = 0.0,
) -> float:
    """What the learning rate is multiplied by in iteration k.

    Warm-up over w iterations: k/w. Then `constant`: 1. `cosine`: m + (1 − m)(1 + cos πp)/2 with
    p = (k − w)/(K − w), 1 at k = w (or at k = 1 without warm-up) and m from k = K on (Loshchilov
    & Hutter 2017, eq. 5, without restarts).

    Args:
        k: Training iteration, from 1.
        schedule: "constant" or "cosine".
        warmup_iterations: w ≥ 0.
        decay_iterations: K > w, needed for "cosine".
        min_ratio: m in [0, 1].

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: For an unknown schedule, or "cosine" without a K above w.
    """
    if schedule not in LR_SCHEDULES:
        raise ValueError(f"lr_schedule is {schedule!r}; it must be one of {LR_SCHEDULES}.")
    if k < warmup_iterations:
        return k / warmup_iterations
    if schedule == "constant":
        return 1.0
    top = max(warmup_iterations, 1)
    if decay_iterations is None or decay_iterations <= top:
        raise ValueError(
            f"lr_schedule='cosine' needs lr_decay_iterations above {top} (the warm-up's end), "
            f"got {decay_iterations}: the number of iterations is usual."
        )
    progress = min((k - top) / (decay_iterations - top), 1.0)
    return min_ratio + (1.0 - min_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))


CRITIC_OPTIMIZER = "critic"
Rate = float | list[list[float]]
"""A number, or RLlib's schedule of (env step, number)."""


class Owned(NamedTuple):
    """An optimiser, with what RLlib is to know of it.

    Attributes:
        name: for RLlib.
        optimizer: Adam.
        parameters: that it owns.
        schedule: RLlib's, in whose hands it stays; None: `set_learning_rates` sets a number anew
            for each iteration.
    """

    name: str
    optimizer: Optimizer
    parameters: list[nn.Parameter]
    schedule: Rate | None


def learning_rates(lr: Rate, critic_lr: float | None) -> dict[str, Rate]:
    """By the optimisers' names."""
    return {DEFAULT_OPTIMIZER: lr, CRITIC_OPTIMIZER: lr if critic_lr is None else critic_lr}


def make_optimizers(module: Any, rates: Mapping[str, Rate]) -> list[Owned]:
    """Adam for the policy and, where there is a critic, one of its own.

    Args:
        module: `CausalLMModule`.
        rates: of `learning_rates`.
    """
    critic = module.critic_parameters()
    own = {id(parameter) for parameter in critic}
    policy = [p for p in module.parameters() if id(p) not in own and p.requires_grad]
    critic = [p for p in critic if p.requires_grad]
    found = []
    for name, parameters in ((DEFAULT_OPTIMIZER, policy), (CRITIC_OPTIMIZER, critic)):
        rate = rates[name]
        if parameters:
            number = rate if isinstance(rate, (int, float)) else 0.0
            schedule = None if isinstance(rate, (int, float)) else rate
            found.append(Owned(name, Adam(parameters, lr=number), parameters, schedule))
    return found


def set_learning_rates(
    optimizers: Iterable[tuple[str, Optimizer]], rates: Mapping[str, Rate], factor: float
) -> None:
    """Sets the learning rates that are numbers, times ``factor``."""
    for name, optimizer in optimizers:
        rate = rates[name]
        if isinstance(rate, (int, float)):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor


def lr_schedule_settings(settings: TrainingSettings) -> dict[str, Any]:
    """The arguments of `lr_factor` that ``settings`` give."""
    return {
        "schedule": settings.lr_schedule,
        "warmup_iterations": settings.lr_warmup_iterations,
        "decay_iterations": settings.lr_decay_iterations,
        "min_ratio": settings.lr_min_ratio,
    }
