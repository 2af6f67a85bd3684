"""When `distrl train` writes checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rllib_distrl.checkpoints import (
    checkpoint_iteration,
    latest_checkpoint,
    list_checkpoints,
    save_checkpoint,
)
from rllib_distrl.cli.display import warn
from rllib_distrl.recipe import Recipe
from rllib_distrl.run_folder import RunFolder
from rllib_distrl.run_log import RunLog


@dataclass(frozen=True)
class TrainingCheckpoints:
    """The checkpoints of one run.

    Attributes:
        recipe: Says how often and how many.
        run: Where they go.
        console: Hears of damaged ones.
    """

    recipe: Recipe
    run: RunFolder
    console: Any

    def latest(self) -> Path | None:
        """The newest undamaged checkpoint."""
        return latest_checkpoint(self.run.checkpoints, lambda text: warn(self.console, text))

    def due(self, iteration: int) -> bool:
        """Whether one is written after this iteration in any case."""
        interval = self.recipe.run.checkpoint_interval
        return bool(interval) and iteration % interval == 0

    def save(self, algo: Any, log: RunLog, iteration: int) -> None:
        """Writes a checkpoint; the log is on disk before it."""
        log.sync()
        keep = self.recipe.run.keep_checkpoints
        save_checkpoint(self.run.checkpoints, iteration, algo.save_to_path, keep=keep)

    def rescue(self, algo: Any, log: RunLog, iteration: int) -> None:
        """After an error: writes the last whole iteration if nothing has touched it since."""
        newest = list_checkpoints(self.run.checkpoints)[:1]
        known = iteration == 0 or [iteration] == [checkpoint_iteration(path) for path in newest]
        if getattr(algo, "between_iterations", False) and not known:
            self.save(algo, log, iteration)
