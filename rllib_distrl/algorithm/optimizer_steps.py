"""How many optimiser steps an algorithm has taken, ours or RLlib's own."""

from __future__ import annotations

from typing import Any

OPTIMIZER_STEPS = "num_optimizer_steps_lifetime"
_TIMEOUT_SECONDS = 30.0


def optimizer_steps(algo: Any) -> int | None:
    """Optimiser steps since training began, those before a checkpoint included.

    Read from the optimisers themselves, because RLlib's learners do not count them: the most
    that any parameter has seen, which with a warm-up of the critic are the critic's.

    Args:
        algo: With a learner group.

    Returns:
        None where the optimiser does not count (SGD), or no learner answers.
    """
    answers = algo.learner_group.foreach_learner(_steps, timeout_seconds=_TIMEOUT_SECONDS)
    found = [answer.get() for answer in answers.ignore_errors()]
    return max((steps for steps in found if steps is not None), default=None)


def _steps(learner: Any) -> int | None:
    counts = [
        int(state["step"])
        for optimizer in learner._named_optimizers.values()
        for state in optimizer.state.values()
        if "step" in state
    ]
    return max(counts, default=None)
