"""When `distrl train` writes checkpoints, and where they go."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rllib_distrl.cli.display import warn
from rllib_distrl.cli.errors import TrainingStopped
from rllib_distrl.recipe import Recipe
from rllib_distrl.recipe_schema import nearest
from rllib_distrl.runs.checkpoints import (
    best_iteration,
    checkpoint_iteration,
    checkpoint_name,
    checkpoint_scores,
    latest_checkpoint,
    list_checkpoints,
    save_checkpoint,
)
from rllib_distrl.runs.folder import RunFolder
from rllib_distrl.runs.log import RunLog
from rllib_distrl.runs.storage import RunStorage

_RETRY_AFTER = (1.0, 4.0)  # seconds


@dataclass(frozen=True)
class TrainingCheckpoints:
    """The checkpoints of one run.

    Attributes:
        recipe: Says when, how many, and which is the best.
        run: Where they go.
        storage: Where they are copied to, if anywhere.
        console: Hears of damaged ones and of copies that fail.
    """

    recipe: Recipe
    run: RunFolder
    storage: RunStorage | None
    console: Any

    def latest(self) -> Path | None:
        """The newest undamaged checkpoint."""
        return latest_checkpoint(self.run.checkpoints, lambda text: warn(self.console, text))

    def due(self, row: Mapping[str, Any]) -> bool:
        """Whether one is written after this iteration: by interval, as the best, or as the first.

        The first iteration of a run writes one whatever the interval is: what cannot be written is
        known then, and a run that was killed goes on.

        Raises:
            ValueError: If the iteration should have reported `run.checkpoint_metric`.
        """
        interval = self.recipe.run.checkpoint_interval
        by_interval = bool(interval and row["iteration"] % interval == 0)
        return by_interval or self._is_best(row) or not list_checkpoints(self.run.checkpoints)

    def save(self, algo: Any, log: RunLog, row: Mapping[str, Any]) -> None:
        """Writes a checkpoint and copies it; the log is on disk before it.

        Raises:
            TrainingStopped: If the weights have diverged: no checkpoint ever holds such.
        """
        self._check_weights(algo, row["iteration"])
        log.sync()
        save_checkpoint(
            self.run.checkpoints,
            row["iteration"],
            algo.save_to_path,
            keep=self.recipe.run.keep_checkpoints,
            score=self._score(row),
            mode=self.recipe.run.checkpoint_mode,
        )
        self._copy_or_warn()

    def _check_weights(self, algo: Any, iteration: int) -> None:
        from rllib_distrl.algorithm.wiring import nonfinite_weights

        if not (bad := nonfinite_weights(algo)):
            return
        newest = list_checkpoints(self.run.checkpoints)[:1]
        good = f"The last good state is in {newest[0]}." if newest else "There is no good state."
        raise TrainingStopped(
            f"Training stopped after iteration {iteration}: {len(bad)} of the weights' tensors are "
            f"not finite, {bad[0]} for instance. {good} Lower training.lr or set "
            "training.grad_clip in another run."
        )

    def rescue(self, algo: Any, log: RunLog, row: Mapping[str, Any]) -> None:
        """After an error: writes the last whole iteration if nothing has touched it since.

        Args:
            algo: In the state of `row`, or in one that nobody can go on with.
            log: Of the run.
            row: The newest line of the log.
        """
        iteration = row["iteration"]
        newest = list_checkpoints(self.run.checkpoints)[:1]
        known = iteration == 0 or [iteration] == [checkpoint_iteration(path) for path in newest]
        whole = getattr(algo, "between_iterations", False) and algo.iteration == iteration
        if whole and not known:
            self.save(algo, log, row)

    def best(self) -> tuple[Path, float] | None:
        """The best checkpoint and its score, where the recipe names a metric."""
        scores = checkpoint_scores(self.run.checkpoints)
        number = best_iteration(scores, self.recipe.run.checkpoint_mode)
        score = scores.get(-1 if number is None else number)
        if number is None or score is None:
            return None
        return self.run.checkpoints / checkpoint_name(number), score

    def copy(self) -> None:
        """Brings the copy up to date, if there is to be one.

        Raises:
            OSError: Or what else the file system raises when it fails.
        """
        settings = self.recipe.run
        if self.storage is not None:
            keep, mode = settings.keep_checkpoints, settings.checkpoint_mode
            self.storage.upload(self.run, keep=keep, mode=mode)

    def _copy_or_warn(self) -> None:
        """Copies; what fails is tried again, and in the end with the next checkpoint."""
        for pause in (*_RETRY_AFTER, None):
            try:
                self.copy()
            except Exception as error:
                if pause is None:
                    warn(
                        self.console,
                        "The checkpoint is in the run folder but could not be copied: "
                        f"{type(error).__name__}: {error}. The next one will try again.",
                    )
                else:
                    time.sleep(pause)
            else:
                return

    def _score(self, row: Mapping[str, Any]) -> float | None:
        metric = self.recipe.run.checkpoint_metric
        if not metric:
            return None
        reported = [key for key in row if key.split("/")[0] == metric.split("/")[0]]
        if metric not in row and reported:
            raise ValueError(
                f"run.checkpoint_metric: iteration {row['iteration']} reports no {metric!r}. "
                f"The nearest key is {nearest(metric, reported)!r}."
            )
        return row.get(metric)

    def _is_best(self, row: Mapping[str, Any]) -> bool:
        """Whether no checkpoint of an earlier iteration has as good a score."""
        score = self._score(row)
        scores = {
            number: known
            for number, known in checkpoint_scores(self.run.checkpoints).items()
            if number < row["iteration"]
        }
        scores[row["iteration"]] = score
        best = best_iteration(scores, self.recipe.run.checkpoint_mode)
        return score is not None and best == row["iteration"]


def storage_of(recipe: Recipe, path: Path) -> RunStorage | None:
    """The place that the recipe names for a copy of the run at `path`.

    Raises:
        ValueError: If it cannot be opened.
    """
    storage = recipe.run.storage
    return RunStorage(storage, path.resolve().name) if storage else None
