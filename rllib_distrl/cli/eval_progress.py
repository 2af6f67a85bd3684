"""How far an evaluation has come: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rllib_distrl.cli.display import duration
from rllib_distrl.cli.interrupts import Interrupts

if TYPE_CHECKING:
    from rllib_distrl.evaluation.settings import Progress as EvalProgress

_LINE_SECONDS = 30.0  # between lines


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
            interrupts: Asked after every chunk.
            clock: Returns seconds.
        """
        self._console, self._label, self._clock = console, label, clock
        self._interrupts = interrupts
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(label, total=None)
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
        """Shows the state after a chunk of problems.

        Raises:
            Interrupted: After a signal.
        """
        self._show(progress)
        if self._interrupts is not None:
            self._interrupts.check()

    def _show(self, progress: EvalProgress) -> None:
        self._bar.update(self._task, completed=progress.problems_done, total=progress.problems)
        if progress.resumed and not progress.samples:
            done = f"{progress.resumed} of {progress.problems} problems"
            self._print(f"Continuing: {done} are finished.")
        if not self._console.is_terminal and self._clock() - self._last_line >= _LINE_SECONDS:
            self._last_line = self._clock()
            self._print(_line(self._label, progress))

    def _print(self, line: str) -> None:
        self._bar.console.print(line, highlight=False, markup=False, soft_wrap=True)


def _line(label: str, progress: EvalProgress) -> str:
    speed = progress.tokens / max(progress.seconds, 1e-9)
    return (
        f"{label}: {progress.problems_done}/{progress.problems} problems  "
        f"samples {progress.samples:,}  score {progress.score:.3f}  tokens/s {speed:,.0f}  "
        f"time left {duration(progress.seconds_left)}"
    )
