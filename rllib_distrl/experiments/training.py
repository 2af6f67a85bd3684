"""THE training loop: iterations, their log, checkpoints, and when it is over.

`distrl train` runs it with everything around; a sweep's trial takes its steps one by one, and a
script runs it bare.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rllib_distrl.recipe_schema import nearest
from rllib_distrl.runs.checkpoints import (
    TrainingStopped,
    best_iteration,
    checkpoint_iteration,
    checkpoint_name,
    checkpoint_scores,
    latest_checkpoint,
    list_checkpoints,
    save_checkpoint,
)
from rllib_distrl.runs.folder import RunFolder
from rllib_distrl.runs.log import RunLog, flatten_result, tokens_generated

if TYPE_CHECKING:
    from rllib_distrl.recipe import Recipe
    from rllib_distrl.runs.storage import RunStorage
    from rllib_distrl.settings import RunSettings

_RETRY_AFTER = (1.0, 4.0)  # seconds
Row = dict[str, Any]
"""What the log says of an iteration; `{"iteration": 0}` before the first."""


@dataclass(frozen=True)
class RunLength:
    """What ends a run: its iterations, or its tokens where they have a budget.

    Attributes:
        iterations: Number of iterations; not looked at where there is a budget.
        budget_tokens: Tokens to generate; 0 means no budget.
    """

    iterations: int
    budget_tokens: int = 0

    @classmethod
    def of(cls, settings: RunSettings) -> RunLength:
        """That of a recipe's `[run]` table."""
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


class Training:
    """An algorithm on its way through its iterations.

    Attributes:
        algo: RLlib's algorithm, built and, where a run goes on, restored.
        length: What ends it.
        row: Of the newest iteration.
    """

    def __init__(
        self,
        algo: Any,
        length: RunLength,
        row: Row | None = None,
        *,
        log: RunLog | None = None,
        checkpoints: TrainingCheckpoints | None = None,
    ) -> None:
        """Starts nothing yet.

        Args:
            algo: See the attribute.
            length: See the attribute.
            row: Of the iteration that `algo` has the state of; None before the first.
            log: Where iterations are recorded, if anywhere.
            checkpoints: Written by `run`, if any.
        """
        self.algo = algo
        self.length = length
        self.row: Row = row or {"iteration": 0}
        self._log = log
        self._checkpoints = checkpoints

    @property
    def over(self) -> bool:
        """Whether nothing is left to train."""
        return self.length.reached(self.row)

    def step(self) -> Row:
        """Trains one iteration, validating where the algorithm's configuration says so."""
        from rllib_distrl.rllib_traps import OPTIMIZER_STEPS, optimizer_steps, without_repeats

        result = without_repeats(self.algo.train())
        result = {**result, OPTIMIZER_STEPS: optimizer_steps(self.algo)}
        iteration = self.row["iteration"] + 1
        if self._log is not None:
            self.row = self._log.write(iteration, result)
        else:
            self.row = {"iteration": iteration, **flatten_result(result)}
        return self.row

    def validate(self) -> Row:
        """Validates now, if the newest iteration has not; the row has it then."""
        from rllib_distrl.rllib_traps import EVALUATION

        if not any(key.startswith(f"{EVALUATION}/") for key in self.row):
            self.row = {**self.row, **flatten_result({EVALUATION: self.algo.evaluate()})}
        return self.row

    def run(
        self,
        *,
        before: Callable[[], object] = lambda: None,
        after: Callable[[Row], object] = lambda row: None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """Trains to the end, with a checkpoint wherever one is due and at the end.

        After an error the last whole iteration is in a checkpoint, if anything was kept at all.

        Args:
            before: Called before each iteration.
            after: Called with each iteration's row, once its checkpoint is written.
            stopping: Asked after each iteration; True ends training there, with a checkpoint.
        """
        stop = False
        try:
            while not (stop or self.over):
                before()
                row = self.step()
                stop = stopping()  # what comes later waits for the next iteration
                self._save_if_due(row, last=stop or self.over)
                after(row)
        except Exception:
            if self._checkpoints is not None and self._log is not None:
                self._checkpoints.rescue(self.algo, self._log, self.row)
            raise

    def _save_if_due(self, row: Row, *, last: bool) -> None:
        if self._checkpoints is None or self._log is None:
            return
        if self._checkpoints.due(row) or last:
            self._checkpoints.save(self.algo, self._log, row)


@dataclass(frozen=True)
class TrainingCheckpoints:
    """The checkpoints of one run.

    Attributes:
        recipe: Says when, how many, and which is the best.
        run: Where they go.
        storage: Where they are copied to, if anywhere.
        warn: Called with a sentence for each damaged one and each copy that fails.
    """

    recipe: Recipe
    run: RunFolder
    storage: RunStorage | None
    warn: Callable[[str], None]

    def latest(self) -> Path | None:
        """The newest undamaged checkpoint."""
        return latest_checkpoint(self.run.checkpoints, self.warn)

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
        from rllib_distrl.algorithm.export import nonfinite_weights

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
                    self.warn(
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
