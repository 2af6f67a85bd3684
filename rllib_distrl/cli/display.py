"""The progress of training: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rllib_distrl.cli.goal import Goal
from rllib_distrl.runs.log import tokens_generated

# Where RLlib and our learners report what a person wants to see; the first key found counts.
_RETURN = ("env_runners/episode_return_mean",)
_VALIDATION = ("evaluation/env_runners/episode_return_mean",)
_ENTROPY = ("learners/default_policy/entropy",)
_SPREAD = ("learners/default_policy/quantile_spread",)

_WINDOW = 20  # iterations over which speed is averaged


@dataclass(frozen=True)
class Snapshot:
    """What is shown of one iteration; None where a number is not known."""

    iteration: int
    goal: Goal
    last: bool
    tokens: float | None
    episode_return: float | None
    validation: float | None
    entropy: float | None
    quantile_spread: float | None
    tokens_per_s: float | None
    seconds_left: float | None

    def cells(self) -> dict[str, str]:
        """Returns {label: text} of the numbers that are known."""
        return {label: text for label, text in self._all_cells() if text}

    @property
    def share_done(self) -> float:
        """How much of the run is done, in [0, 1]."""
        return self.goal.share_done(self.iteration, self.tokens or 0.0)

    def _all_cells(self) -> list[tuple[str, str]]:
        budget = self.goal.budget_tokens
        iterations = "" if budget else f"/{self.goal.iterations}"
        tokens = _formatted(self.tokens, ",.0f")
        return [
            ("iteration", f"{self.iteration}{iterations}"),
            ("tokens", f"{tokens}/{budget:,}" if tokens and budget else tokens),
            ("return", _formatted(self.episode_return, ".3f")),
            ("validation pass@1", _formatted(self.validation, ".3f")),
            ("entropy", _formatted(self.entropy, ".3f")),
            ("quantile spread", _formatted(self.quantile_spread, ".3f")),
            ("tokens/s", _formatted(self.tokens_per_s, ",.0f")),
            ("time left", duration(self.seconds_left)),
        ]


def warn(console: Console, text: str) -> None:
    """Prints a sentence in yellow."""
    console.print(text, style="yellow", highlight=False)


class Progress:
    """Turns the rows of a run's log into snapshots."""

    def __init__(self, goal: Goal, clock: Any = time.monotonic) -> None:
        """Starts the clock.

        Args:
            goal: Where training ends.
            clock: Returns seconds.
        """
        self._goal = goal
        self._clock = clock
        self._marks: deque[tuple[float, int, float]] = deque(maxlen=_WINDOW + 1)
        self._start = clock()
        self._validation: float | None = None

    def snapshot(self, row: Mapping[str, Any]) -> Snapshot:
        """Returns what to show after the iteration that `row` records."""
        iteration, tokens = row["iteration"], tokens_generated(row)
        if (validation := _first(row, _VALIDATION)) is not None:
            self._validation = validation
        if not self._marks:
            # The first iteration's tokens are counted from where an earlier session stopped.
            fresh = row.get("env_runners/num_env_steps_sampled", tokens) or 0.0
            self._marks.append((self._start, iteration - 1, (tokens or 0.0) - fresh))
        self._marks.append((self._clock(), iteration, tokens or 0.0))
        (t0, first, tokens0), (t1, _, tokens1) = self._marks[0], self._marks[-1]
        seconds = max(t1 - t0, 1e-9)
        done = self._goal.share_done(iteration, tokens1)
        pace = (done - self._goal.share_done(first, tokens0)) / seconds
        return Snapshot(
            iteration=iteration,
            goal=self._goal,
            last=self._goal.reached(row),
            tokens=tokens,
            episode_return=_first(row, _RETURN),
            validation=self._validation,
            entropy=_first(row, _ENTROPY),
            quantile_spread=_first(row, _SPREAD),
            tokens_per_s=None if tokens is None else (tokens1 - tokens0) / seconds,
            seconds_left=(1.0 - done) / pace if pace > 0 else None,
        )


class TrainingDisplay(Protocol):
    """Shows snapshots as they come."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

    def show(self, snapshot: Snapshot) -> None:
        """Shows the state after an iteration."""
        ...


class LiveDisplay:
    """A table and a bar that are redrawn in place."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, refresh_per_second=4, transient=False)

    def __enter__(self) -> Self:
        self._live.start()
        self._live.update(Text("Starting the first iteration …", style="dim"))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._live.stop()

    def show(self, snapshot: Snapshot) -> None:
        """Redraws the table."""
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        cells = snapshot.cells()
        for label in cells:
            table.add_column(label, justify="right")
        table.add_row(*cells.values())
        bar = ProgressBar(total=1.0, completed=snapshot.share_done, width=60)
        self._live.update(Group(table, bar))


class PlainDisplay:
    """One line every few iterations, and for the last one."""

    def __init__(self, console: Console, interval: int) -> None:
        self._console = console
        self._interval = interval

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        return None

    def show(self, snapshot: Snapshot) -> None:
        """Prints the line if it is due."""
        if snapshot.iteration % self._interval and not snapshot.last:
            return
        cells = snapshot.cells()
        line = "  ".join(f"{label} {text}" for label, text in cells.items())
        self._console.print(line, soft_wrap=True, highlight=False)


def make_display(console: Console, interval: int) -> TrainingDisplay:
    """Returns the display that suits the console.

    Args:
        console: Where to show.
        interval: Iterations between plain lines.
    """
    return LiveDisplay(console) if console.is_terminal else PlainDisplay(console, interval)


def duration(seconds: float | None) -> str:
    """Formats seconds as m:ss or h:mm:ss ("" for None)."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _first(row: Mapping[str, Any], keys: tuple[str, ...]) -> float | None:
    return next((row[key] for key in keys if row.get(key) is not None), None)


def _formatted(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)
