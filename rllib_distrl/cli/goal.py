"""When a training run is over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rllib_distrl.runs.log import tokens_generated

if TYPE_CHECKING:
    from rllib_distrl.settings import RunSettings


@dataclass(frozen=True)
class Goal:
    """What ends a run: its iterations, or its tokens where they have a budget.

    Attributes:
        iterations: Number of iterations; not looked at where there is a budget.
        budget_tokens: Tokens to generate; 0 means no budget.
    """

    iterations: int
    budget_tokens: int = 0

    @classmethod
    def of(cls, settings: RunSettings) -> Goal:
        """The goal of a recipe's `[run]` table."""
        return cls(settings.iterations, settings.budget_tokens)

    def reached(self, row: Mapping[str, Any]) -> bool:
        """Says whether training is over after the iteration that `row` of the run's log records."""
        if self.budget_tokens:
            return (tokens_generated(row) or 0) >= self.budget_tokens
        return row["iteration"] >= self.iterations

    def share_done(self, iteration: float, tokens: float) -> float:
        """How much of the run is done, in [0, 1], after so many iterations and tokens."""
        done = tokens / self.budget_tokens if self.budget_tokens else iteration / self.iterations
        return min(done, 1.0)

    def __str__(self) -> str:
        if self.budget_tokens:
            return f"{self.budget_tokens:,} tokens in iterations"
        return f"{self.iterations} iterations"
