"""What commands show: the progress of training and of evaluations, and tables of results.

Progress is a live table or a bar on a terminal, a plain line now and then elsewhere.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich import progress as bars
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from rllib_distrl.cli.session import Interrupts
from rllib_distrl.experiments.training import RunLength
from rllib_distrl.runs.log import tokens_generated

if TYPE_CHECKING:
    from rllib_distrl.evaluation.sampling import Progress as EvalProgress


# Where RLlib and our learners report what a person wants to see; the first key found counts.
_RETURN = ("env_runners/episode_return_mean",)
_VALIDATION = ("evaluation/env_runners/episode_return_mean",)
_ENTROPY = ("learners/default_policy/entropy",)
_SPREAD = ("learners/default_policy/quantile_spread",)

_WINDOW = 20  # iterations over which speed is averaged
_LINE_SECONDS = 30.0  # between lines of an evaluation


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


SHARES = (0.0, 1.0)
"""Scores within these bounds are shares, shown in %; others are shown as they are."""
OF_SCORES = ("avg@", "best@", "maj@")
"""Metrics that average scores; the others are shares whatever the scores."""

_COUNTS = {"tokens": "tokens per sample", "distinct_correct": "distinct correct solutions"}
"""Estimates that are no shares, so not in %."""
_OF_CRITIC = {
    "quantile_explained_variance": "explained variance of returns",
    "quantile_state_explained_variance": "explained variance of mean returns",
    "quantile_state_rmse": "error of the value (root mean square)",
    "quantile_crps": "continuous ranked probability score",
    "quantile_coverage_50": "coverage of the central 50 %",
    "quantile_coverage_90": "coverage of the central 90 %",
    "quantile_pit_ks": "largest deviation of the PIT from uniform",
    "quantile_crossing_rate": "crossing rate",
    "quantile_spread": "spread",
    "quantile_spread_error_correlation": "spread and error, rank correlation",
    "quantile_spread_error_partial_correlation": "... given the value",
    "quantile_spread_error_partial_correlation_given_position": "... and the position",
    "optimism_stat_error_correlation": "bonus statistic and error",
    "optimism_stat_error_partial_correlation": "... given the value",
    "optimism_stat_error_partial_correlation_given_position": "... and the position",
}


def print_before_after(console: Console, results: Mapping[str, Any]) -> None:
    """Prints the table that ends a training run.

    Args:
        console: Where to.
        results: The contents of `eval.json`; shares in [0, 1], shown as percentages.
    """
    before, after = results["before"], results["after"]
    scores = results.get("scores", SHARES)
    table = _metrics("value") if before is None else _metrics("before", "after", "change")
    for name in (k for k in after if before is None or k in before):
        cells = [shown(name, after[name], scores)]
        if before is not None:
            change = after[name] - before[name]
            style = "green" if change > 0 else "red" if change < 0 else ""
            signed = Text(shown(name, change, scores, sign="+"), style)
            cells = [shown(name, before[name], scores), *cells, signed]
        table.add_row(name, *cells)
    asked = f"{results['problems']} {problems_of(results)}, {results['samples']} samples each"
    numbers = ", averages of scores as they are" if _is_number("avg@", scores) else ""
    _print(console, f"{asked}, in %{numbers}:", table)


def print_report(console: Console, report: Mapping[str, Any], data: str, problems: str) -> None:
    """Prints the table of one evaluation with its intervals.

    Args:
        console: Where to.
        report: What `EvalResult.report` returns; shares in [0, 1], shown as percentages.
        data: What was evaluated on.
        problems: What its problems are called.
    """
    table = _metrics("value", "95 % interval")
    for name, (low, high) in report["intervals"].items():
        cells = [report[name], low, high]
        if name in _COUNTS:
            value, low, high = (f"{cell:.1f}" for cell in cells)
        else:
            value, low, high = (shown(name, cell, report["scores"]) for cell in cells)
            value += unit_of(name, report["scores"])
        table.add_row(_COUNTS.get(name, name), value, f"{low} to {high}")
    samples = f"{report['samples']} sample{'s' * (report['samples'] != 1)} each"
    _print(console, f"{data}: {report['problems']} {problems}, {samples}", table)


def print_critic(console: Console, found: Mapping[str, float], split: str) -> None:
    """Prints the table of one critic; nothing where there is none."""
    if not found:
        return
    table = _metrics("value", first="critic")
    for name, label in _OF_CRITIC.items():
        if name in found:
            table.add_row(label, f"{found[name]:.3f}")
    prefixes = problems_of({"split": split}).replace("problems", "prefixes")
    each = f"{found['continuations']} continuations each:"
    _print(console, f"{found['prefixes']} {prefixes}, {each}", table)


def print_judged(console: Console, found: Mapping[str, Any]) -> None:
    """Prints what a critic's choices and stops are worth; nothing where none was asked."""
    if not found:
        return
    table = _metrics("mean score", first="chosen by the critic")
    for name, value in found.items():
        if "@" in name:
            label = f"{name} (votes count alike)" if name.startswith("maj@") else name
            table.add_row(label, f"{value:.3f}")
    _print(console, "The critic's choice among the samples:", table)
    table = _metrics("stopped", "tokens saved", "false stops", "score lost", first="below")
    for each in found["stopping"]:
        names = ("stopped", "tokens_saved", "false_stops", "score_lost")
        cells = ("-" if each[name] is None else f"{100 * each[name]:.1f}" for name in names)
        table.add_row(f"{each['threshold']:g}", *cells)
    quantile = f"{100 * found['level']:.0f} % quantile"
    _print(console, f"If a completion stopped where the critic's {quantile} is below, %:", table)


def print_audit(console: Console, found: Mapping[str, Any]) -> None:
    """Prints how often the verifier errs, and the reward that knows of it; nothing without one."""
    if not found:
        return
    table = _metrics("%", "95 % interval", "of", first="the verifier")
    rows = {
        "false_positive_rate": ("passes what is wrong", found["wrong"]),
        "false_negative_rate": ("fails what is right", found["right"]),
    }
    for name, (label, count) in rows.items():
        value, low, high = (found[name][each] for each in ("value", "low", "high"))
        shown = "-" if value is None else f"{100 * value:.1f}"
        table.add_row(label, shown, f"{100 * low:.1f} to {100 * high:.1f}", str(count))
    _print(console, f"Of {found['right'] + found['wrong']} labelled samples:", table)
    values = {name: found[name]["value"] for name in rows}
    if None not in values.values() and sum(values.values()) < 1:
        given = ", ".join(f"{name} = {value:.4g}" for name, value in values.items())
        line = f'reward_transforms = [{{ name = "noise_backward", {given} }}]'
        console.print(f"In [training]: {line}", highlight=False, markup=False, soft_wrap=True)


def knows_critic(found: Mapping[str, float]) -> bool:
    """Whether `print_critic` has something to print of it."""
    return any(name in found for name in _OF_CRITIC)


def _metrics(*columns: str, first: str = "metric") -> Table:
    """An empty table whose further columns are numbers."""
    table = Table(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _print(console: Console, header: str, table: Table) -> None:
    console.print(header, highlight=False, markup=False, soft_wrap=True)
    console.print(table)


def problems_of(results: Mapping[str, Any]) -> str:
    """What the problems of an evaluation are called: held-out only where training sees none."""
    return "training problems" if results.get("split") == "train" else "held-out problems"


def in_one_line(summary: Mapping[str, float], scores: Sequence[float] = SHARES) -> str:
    """Formats one evaluation as `avg@64 17.1 %, pass@8 60.9 %`."""
    return ", ".join(
        f"{name} {shown(name, value, scores)}{unit_of(name, scores)}"
        for name, value in summary.items()
    )


def shown(name: str, value: float, scores: Sequence[float] = SHARES, sign: str = "") -> str:
    """A metric in %, or as a number where it averages scores outside of [0, 1]."""
    return f"{value:{sign}.3f}" if _is_number(name, scores) else f"{100 * value:{sign}.1f}"


def unit_of(name: str, scores: Sequence[float]) -> str:
    """What stands behind a metric that is `shown`."""
    return "" if _is_number(name, scores) else " %"


def _is_number(name: str, scores: Sequence[float]) -> bool:
    return name.startswith(OF_SCORES) and (scores[0] < SHARES[0] or scores[1] > SHARES[1])


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
        self._bar = bars.Progress(
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TextColumn("samples{task.fields[numbers]}"),
            bars.TimeRemainingColumn(),
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
