"""Evaluation as `train` and `eval` show it: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rllib_distrl.cli.display import duration
from rllib_distrl.cli.interrupts import Interrupts
from rllib_distrl.cli.ray_session import hide_loading_bars

if TYPE_CHECKING:
    from rllib_distrl.evaluation.result import EvalResult
    from rllib_distrl.evaluation.sampling import Progress as EvalProgress
    from rllib_distrl.recipe import Recipe

_LINE_SECONDS = 30.0  # between lines


def measure(
    recipe: Recipe,
    model: str | Path,
    label: str,
    console: Console,
    *,
    samples: Path,
    interrupts: Interrupts | None = None,
) -> EvalResult:
    """Evaluates a model as the recipe's `[eval]` table says.

    An evaluation that was interrupted continues where it stopped.

    Args:
        recipe: Names the environment, the completion limit and the evaluation.
        model: A Hugging Face folder or id, or a built-in model.
        label: Stands before the progress.
        console: Where to show it.
        samples: The Parquet file for the graded completions.
        interrupts: Where a signal is noted, which ends the evaluation.

    Raises:
        Interrupted: After a signal.
    """
    from rllib_distrl.evaluation.data import recipe_data
    from rllib_distrl.evaluation.evaluate import evaluate_model

    hide_loading_bars()
    samples.parent.mkdir(parents=True, exist_ok=True)
    unfinished = samples.with_name(f".{samples.stem}-unfinished")
    data = recipe_data(recipe)
    with EvaluationProgress(console, label, interrupts) as report:
        result = evaluate_model(
            str(model),
            data.env_id,
            data.env_config,
            data.settings,
            out=unfinished,
            on_progress=report,
            overwrite=True,
        )
    result.to_parquet(samples)
    shutil.rmtree(unfinished)
    return result


class EvaluationProgress:
    """Shows progress while entered; call it with every `Progress` of the evaluation.

    That is also where a signal ends the evaluation: what is finished is on disk.
    """

    def __init__(
        self,
        console: Console,
        label: str,
        interrupts: Interrupts | None = None,
        clock: Any = time.monotonic,
    ) -> None:
        """Shows nothing yet.

        Args:
            console: Where to.
            label: What is going on.
            interrupts: Asked whenever a sample has ended.
            clock: Returns seconds.
        """
        self._console, self._label, self._clock = console, label, clock
        self._interrupts = interrupts
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("samples{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(label, total=None, numbers="")
        self._last_line = clock()

    def __enter__(self) -> Self:
        """Draws the bar."""
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Takes the bar away."""
        self._bar.stop()

    def __call__(self, progress: EvalProgress) -> None:
        """Shows the state once a sample has ended.

        Raises:
            Interrupted: After a signal.
        """
        self._show(progress)
        if self._interrupts is not None:
            self._interrupts.check()

    def _show(self, progress: EvalProgress) -> None:
        numbers = _numbers(progress)
        self._bar.update(
            self._task,
            completed=progress.samples_done,
            total=progress.samples_in_all,
            numbers=f"  {numbers}" if numbers else "",
        )
        if progress.resumed and not progress.samples:
            done = f"{progress.resumed} of {progress.problems} problems"
            self._print(f"Continuing: {done} are finished.")
        if not self._console.is_terminal and self._clock() - self._last_line >= _LINE_SECONDS:
            self._last_line = self._clock()
            done = f"{progress.samples_done:,}/{progress.samples_in_all:,} samples"
            left = f"time left {duration(progress.seconds_left)}"
            self._print(f"{self._label}: " + "  ".join(filter(None, (done, numbers, left))))

    def _print(self, line: str) -> None:
        self._bar.console.print(line, highlight=False, markup=False, soft_wrap=True)


def _numbers(progress: EvalProgress) -> str:
    """Score and speed, as far as there are any."""
    fresh = progress.problems_done - progress.resumed
    score = [f"score {progress.score:.3f}"] if fresh else []
    speed = progress.tokens / max(progress.seconds, 1e-9)
    return "  ".join([*score, f"tokens/s {speed:,.0f}"]) if progress.samples else ""
