"""Optimiser steps whose loss or gradient is not finite: refused, counted, and named."""

from collections.abc import Sequence

import torch
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from rllib_distrl.learner.step import Step
from rllib_distrl.maths.statistics import AllReduce

EPISODE = "episode"
"""Key of the batch's `extras` that holds each row's number among the learner's episodes."""
REFUSED_STEPS = "nonfinite_steps"
REFUSED_IN_A_ROW = "nonfinite_steps_in_a_row"


class NonFiniteError(ValueError):
    """Training stopped at numbers that are not finite; the weights are the last good ones."""


class Refusals:
    """Decides about each step, and remembers why the last one was refused.

    A step is taken by all learners or by none. What is refused changes neither weights nor
    the optimiser's state.

    Attributes:
        last: What was not finite in the step that was refused last, and where.
        in_a_row: Steps refused since one was last taken.
    """

    def __init__(self, limit: int) -> None:
        """Starts counting.

        Args:
            limit: So many steps in a row, and no more are tried.
        """
        self._limit = limit
        self._refused = 0
        self._names: list[str] = []
        self.in_a_row = 0
        self.last = ""

    @property
    def exhausted(self) -> bool:
        """Whether the limit is reached."""
        return self.in_a_row >= self._limit

    def start_iteration(self, episodes: Sequence[SingleAgentEpisode]) -> None:
        """Starts the iteration's count; the episodes are the rows of its batch."""
        self._refused = 0
        self._names = [f"episode {e.id_} (row {e.infos[0]['row']})" for e in episodes]

    def refuse(self, step: Step, module: torch.nn.Module, k: int, all_reduce: AllReduce) -> bool:
        """Says whether the step must not be taken; called once per step, by every learner.

        Args:
            step: With the numbers of all its micro-batches.
            module: With the step's gradients.
            k: The iteration.
            all_reduce: Sum over learners.
        """
        total = torch.as_tensor(step.losses.total_loss).detach()
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        # One number that is not finite makes the norm of its tensor so; so do finite ones whose
        # squares are not, which would stay in Adam's second moments for ever.
        finite = torch.isfinite(torch.stack([total, *(g.norm() for g in gradients)])).all()
        if not bool(all_reduce((~finite).float())):
            self.in_a_row = 0
            return False
        if bool(finite):
            self.last = f"a gradient of another learner (iteration {k})"
        else:
            self.last = f"{self._where(step, module)} (iteration {k})"
        self._refused += 1
        self.in_a_row += 1
        return True

    def _where(self, step: Step, module: torch.nn.Module) -> str:
        for name, column, rollouts in step.suspects:
            finite = torch.isfinite(column)
            finite = finite if finite.dim() == 2 else finite.all(-1)
            finite_rows = (finite | ~rollouts.loss_mask).all(-1)
            if not bool(finite_rows.all()):
                row = int(rollouts.column(EPISODE)[~finite_rows][0])
                return f"{name} of {self._names[row]}"
        for name, parameter in module.named_parameters():
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
                return f"the gradient of {name}"
        return f"the loss {float(step.losses.total_loss)}"

    def metrics(self) -> dict[str, int]:
        """The iteration's count, and how many in a row there were at its end."""
        return {REFUSED_STEPS: self._refused, REFUSED_IN_A_ROW: self.in_a_row}
