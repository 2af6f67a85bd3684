"""The learning rate's factor over iterations: warm-up and decay."""

import math

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
