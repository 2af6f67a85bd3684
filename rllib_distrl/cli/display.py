"""The progress of training: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from rllib_distrl.experiments.training import RunLength
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
    length: RunLength
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
        return self.length.share_done(self.iteration, self.tokens or 0.0)

    def _all_cells(self) -> list[tuple[str, str]]:
        budget = self.length.budget_tokens
        iterations = "" if budget else f"/{self.length.iterations}"
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

    def __init__(self, length: RunLength, clock: Any = time.monotonic) -> None:
        """Starts the clock.

        Args:
            length: Where training ends.
            clock: Returns seconds.
        """
        self._length = length
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
        done = self._length.share_done(iteration, tokens1)
        pace = (done - self._length.share_done(first, tokens0)) / seconds
        return Snapshot(
            iteration=iteration,
            length=self._length,
            last=self._length.reached(row),
            tokens=tokens,
            episode_return=_first(row, _RETURN),
            validation=self._validation,
            entropy=_first(row, _ENTROPY),
            quantile_spread=_first(row, _SPREAD),
            tokens_per_s=None if tokens is None else (tokens1 - tokens0) / seconds,
            seconds_left=(1.0 - done) / pace if pace > 0 else None,
        )


@contextmanager
def training_display(console: Console, interval: int) -> Iterator[Callable[[Snapshot], None]]:
    """Gives what shows a snapshot: a table and a bar on a terminal, elsewhere plain lines.

    Args:
        console: Where to show.
        interval: Iterations between plain lines; the last iteration has one in any case.
    """

    def print_line(snapshot: Snapshot) -> None:
        if snapshot.last or snapshot.iteration % interval == 0:
            line = "  ".join(f"{label} {text}" for label, text in snapshot.cells().items())
            console.print(line, soft_wrap=True, highlight=False)

    if not console.is_terminal:
        yield print_line
        return
    starting = Text("Starting the first iteration …", style="dim")
    with Live(starting, console=console, refresh_per_second=4) as live:
        yield lambda snapshot: live.update(_table(snapshot))


def _table(snapshot: Snapshot) -> Group:
    cells = snapshot.cells()
    table = Table(
        *(Column(label, justify="right") for label in cells),
        box=None, padding=(0, 2, 0, 0), header_style="dim",
    )  # fmt: skip
    table.add_row(*cells.values())
    return Group(table, ProgressBar(total=1.0, completed=snapshot.share_done, width=60))


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
