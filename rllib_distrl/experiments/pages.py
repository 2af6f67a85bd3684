"""A comparison's tables and pages, from its records alone: Markdown, and HTML without a network."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rllib_distrl.experiments import figures
from rllib_distrl.experiments.decisions import (
    AtEqualAverage,
    Decisions,
    at_level,
    claims,
    decide,
    equal_average_metrics,
    levels,
    mean_at_levels,
)
from rllib_distrl.experiments.results import Results, Row, arrange, number, read_records
from rllib_distrl.experiments.statistics import Estimate, PairedTest
from rllib_distrl.figures import Chart
from rllib_distrl.files import write_atomic
from rllib_distrl.viewer.html import Table, prose, report_page, section

_NOTHING = "–"


def results_table(results: Results) -> Table:
    """One row per contender: mean ± sd over the seeds."""
    metrics = results.main_metrics
    parts = any(row.part for row in results.rows)
    head = ["recipe", *(["part"] if parts else []), "seeds", *map(_title, metrics)]
    lines = [
        [
            row.name,
            *([row.part] if parts else []),
            str(len(row.records)),
            *(_spread(metric, row.estimate(metric)) for metric in metrics),
        ]
        for row in results.rows
    ]
    return Table(head, lines)


def costs_table(results: Results) -> Table:
    """One row per contender: means over the seeds of speed, iterations, optimiser steps, time."""
    return Table(["recipe", *_COST_COLUMNS], [[row.name, *_costs(row)] for row in results.rows])


_COST_COLUMNS = ("tokens/s", "iterations", "optimiser steps", "minutes", "minutes in all")


def _costs(row: Row) -> list[str]:
    speed = row.estimate_of(lambda record: record.tokens_per_second)
    iterations = row.estimate_of(lambda record: record.iterations)
    updates = row.estimate_of(lambda record: record.updates)
    minutes = row.estimate_of(lambda record: record.seconds / 60)
    wall = row.estimate_of(lambda record: record.wall_seconds / 60)
    found = [
        (speed, ",.0f"),
        (iterations, ",.0f"),
        (updates, ",.0f"),
        (minutes, ".1f"),
        (wall, ".1f"),
    ]
    return [format(one.mean, form) if one else _NOTHING for one, form in found]


def differences_table(results: Results, decisions: Decisions) -> Table:
    """One row per contender: the difference to the baseline by seed, with interval and p."""
    metrics = results.main_metrics
    lines = [
        [row.name, *(tested(metric, decisions.after(row, metric)) for metric in metrics)]
        for row in results.rows[1:]
    ]
    return Table(["recipe", *map(_title, metrics)], lines)


def tested(metric: str, test: PairedTest | None) -> str:
    """`+3.8 [+2.2, +5.4], p .008 → .02`: the p of the test alone, and corrected."""
    if test is None:
        return _NOTHING
    cell = _interval(metric, test.difference, signed=True)
    return f"{cell}, p {test.p:.2g} → {test.corrected:.2g}"


def pass_k_table(results: Results) -> Table:
    """Mean pass@k (best@k too where scores are graded) for every k, with 95 % intervals."""
    metrics = [name for name in results.metrics if name.startswith(("pass@", "best@"))]
    lines = [
        [row.name, *(_interval(metric, row.estimate(metric)) for metric in metrics)]
        for row in results.rows
    ]
    return Table(["recipe", *metrics], lines)


def equal_average_table(results: Results, decisions: Decisions) -> Table | None:
    """Metrics at the same average score along training, and their paired difference.

    One line per recipe and metric: the mean over the levels, then every level. None where no
    recipe has the baseline's average score on two seeds or more, or none was validated.
    """
    over = levels(results)
    head = ["recipe", "metric", "mean over levels", *(f"at {100 * x:g} %" for x in over)]
    lines, compared = [], False
    for metric in equal_average_metrics(results):
        for row in results.rows:
            mean = mean_at_levels(results, row, metric, over)
            found = [at_level(results, row, metric, level) for level in over]
            cells = [
                _equal_average_cell(metric, one, row is results.baseline) for one in (mean, *found)
            ]
            if test := decisions.at_equal_average(row, metric):
                cells[0] = f"{tested(metric, test)}; {mean.pairs} of {mean.seeds}"
                compared = True
            lines.append([row.name, metric, *cells])
    return Table(head, lines) if compared else None


def _equal_average_cell(metric: str, found: AtEqualAverage, baseline: bool) -> str:
    """The baseline's value, or the difference to it, and how many seeds reach the level."""
    count = f"{found.pairs} of {found.seeds}"
    if baseline and found.value is not None:
        return f"{_interval(metric, found.value)}; {count}"
    if found.difference is None:
        return f"{_NOTHING}; {count}"
    return f"{_interval(metric, found.difference, signed=True)}; {count}"


def failures_table(results: Results) -> Table:
    """The runs that failed, with what they said."""
    lines = [[r.name, str(r.seed), " ".join(r.error.split())] for r in results.failed]
    return Table(["recipe", "seed", "error"], lines, wraps=True)


def _title(metric: str) -> str:
    return metric.replace("_", " ")


def _spread(metric: str, found: Estimate | None) -> str:
    """Mean ± sd; the mean alone for one seed."""
    if found is None or found.seeds == 1:
        return number(metric, found.mean) if found else _NOTHING
    return f"{number(metric, found.mean)} ± {number(metric, found.sd)}"


def _interval(metric: str, found: Estimate | None, *, signed: bool = False) -> str:
    """Mean [low, high]; the mean alone for one seed."""
    if found is None or found.seeds == 1:
        return number(metric, found.mean, signed=signed) if found else _NOTHING
    mean, low, high = (
        number(metric, value, signed=signed) for value in (found.mean, found.low, found.high)
    )
    return f"{mean} [{low}, {high}]"


_COLOURS = (
    "Filled blue: above zero, filled orange: below, clear after correction; hollow: the interval "
    "alone is off zero; grey: it holds zero."
)
_CELLS = "mean [95 % interval], p → p corrected for all comparisons of the page"
_COSTS = (
    "Means over the seeds. Speed and minutes are of training alone, on whatever else the machine "
    "did; minutes in all have start, validations and evaluation too."
)


@dataclass(frozen=True)
class Section:
    """A part of the page; what is not there is left out.

    Attributes:
        title: Its headline.
        words: What a reader must know.
        points: Sentences in a list.
        table: Of numbers.
        figure: A picture.
        picture: Names the picture's file.
    """

    title: str
    words: str = ""
    table: Table | None = None
    figure: Chart | None = None
    picture: str = ""
    points: Sequence[str] = ()


def sections(results: Results) -> list[Section]:
    """Everything that is shown of a comparison, what came out first."""
    baseline, decisions = results.baseline.name, decide(results)
    parts = [
        Section(
            "What came out",
            f"Differences to {baseline} on the same seeds, in points of %, with 95 % intervals. "
            "Clear is what the exact sign-flip test over the seeds tells from zero (p ≤ .05), "
            "corrected for all comparisons of this page by the step-down law of the largest of "
            "them, and whose interval is off zero.",
            points=claims(results, decisions),
        )
    ]
    parts += _at_equal_average(results, decisions)
    parts += [
        Section("After training", _how_measured(results), results_table(results)),
        Section(
            f"After training, against {baseline}",
            f"Difference to {baseline} on the same seeds: {_CELLS}. {_intervals(results)} The p is "
            f"that of the two-sided sign-flip test, 2^(1-S) at least for S seeds. {_COLOURS}",
            differences_table(results, decisions),
            figures.plot_differences(results, decisions),
            "differences",
        ),
        Section(
            "pass@k",
            f"Mean and 95 % interval. {_intervals(results)}",
            pass_k_table(results),
            figures.plot_pass_k(results),
            "pass_k",
        ),
        Section("Learning", "Mean over the seeds; bands from the lowest to the highest seed, where "
                "there are few recipes.",
                figure=figures.plot_learning(results), picture="learning"),
        Section("What it cost", _COSTS, costs_table(results)),
    ]  # fmt: skip
    if results.failed:
        parts.append(Section("Failed runs", table=failures_table(results)))
    if results.missing:
        parts.append(Section("Not run", f"{_listed(results.missing)}. The command continues."))
    return parts


def _intervals(results: Results) -> str:
    """What the intervals after training are over."""
    average = results.main_metrics[0]
    kept = [record.problem_values(average) is not None for record in results.baseline.records]
    if not all(kept):
        return "Intervals are Student's over the seeds, for these problems."
    return (
        "Intervals are over seeds and problems, both drawn anew; those of the entropy, which is "
        "not kept by problem, are Student's over the seeds."
    )


def _intervals_there(results: Results) -> str:
    """What the intervals at an equal average are over."""
    if results.problems_validated:
        return "Intervals are over seeds and validation problems, both drawn anew."
    kept = any(r.validation_problems for row in results.rows for r in row.records)
    without = "not all records keep the same ones" if kept else "the records keep their means alone"
    return (
        f"Intervals are Student's over the seeds, for these validation problems: {without}, so "
        "other problems cannot be drawn, and the intervals do not hold what they would change."
    )


def _at_equal_average(results: Results, decisions: Decisions) -> list[Section]:
    table, baseline = equal_average_table(results, decisions), results.baseline.name
    if table is None:
        return []
    return [
        Section(
            "At equal average score",
            "Each run is read where its own average score on validation problems is at a level, on "
            "a smooth fit through its validations (local quadratics over the tokens, the average "
            "made to rise); nothing is extrapolated. Drawn is the difference to "
            f"{baseline} there, on the same seeds, as the mean over the levels that both reach. "
            f"{_COLOURS} In the table: {_CELLS} for that mean, and how many seeds reach the level "
            f"with both; the line of {baseline} has its values. {_intervals_there(results)}",
            table,
            figures.plot_equal_average(results, decisions),
            "matched",
        ),
        Section(
            "On the way there",
            "Each point is a validation, the mean over the seeds; higher at the same place is "
            f"better. Black: {baseline}.",
            figure=figures.plot_against_average(results),
            picture="front",
        ),
    ]


def _listed(jobs: Sequence[tuple[str, int]]) -> str:
    """`a (seeds 0, 1), b (seed 2)`."""
    seeds: dict[str, list[str]] = {}
    for name, seed in jobs:
        seeds.setdefault(name, []).append(str(seed))
    words = (f"seed{'s' * (len(s) > 1)} {', '.join(s)}" for s in seeds.values())
    return ", ".join(f"{name} ({some})" for name, some in zip(seeds, words, strict=True))


def _how_measured(results: Results) -> str:
    evaluation = results.baseline.records[0].recipe["eval"]
    return (
        f"Every run generated {results.budget_tokens:,} completion tokens in training (to the end "
        "of the iteration that reached them), dropped samples and critic warm-up included. Shares "
        f"in %, on {evaluation['problems']} {evaluation['split']} problems x {evaluation['n']} "
        "samples after training; entropy in nats per token, of the sampled tokens. Mean ± sd over "
        "the seeds. A sample counts for pass@k with a score of at least 1; avg@k and best@k, "
        "the expected best of k samples, take the score itself."
    )


def _made_by(results: Results, command: str) -> str:
    commits = sorted({r.commit or "unknown" for row in results.rows for r in row.records})
    seeds = sorted({record.seed for row in results.rows for record in row.records})
    listed = ", ".join(commit[:12] for commit in commits)
    return f"Seeds {', '.join(map(str, seeds))}; commit {listed}; command:"


def markdown_page(
    results: Results,
    parts: Sequence[Section],
    title: str,
    note: str,
    command: str,
    *,
    pictures: str = ".",
) -> str:
    """The page for a repository; `pictures` is where they lie, as seen from the page."""
    blocks = [f"# {title}", *([note] if note else [])]
    for part in parts:
        blocks.append(f"## {part.title}")
        blocks += [part.words] if part.words else []
        blocks += ["\n".join(f"* {point}" for point in part.points)] if part.points else []
        blocks += [f"![{part.title}]({pictures}/{part.picture}.png)"] if part.figure else []
        blocks += [part.table.to_markdown()] if part.table else []
    blocks += ["## How it was made", _made_by(results, command), f"```sh\n{command}\n```"]
    return "\n\n".join(blocks) + "\n"


def html_page(
    results: Results, parts: Sequence[Section], title: str, note: str, command: str
) -> str:
    """The page to look at: figures first, tables below them."""
    body = []
    for place, part in enumerate(parts):
        figure = part.figure.to_svg(f"figure{place}") if part.figure else ""
        points = "".join(f"<li>{prose(point)}</li>" for point in part.points)
        points = f"<ul>{points}</ul>" if points else ""
        table = part.table.to_html() if part.table else ""
        if figure and table:
            table = f"<details><summary>Numbers</summary>{table}</details>"
        body.append(section(part.title, f"{points}{figure}{table}", part.words))
    made = f"<p>{html.escape(_made_by(results, command))}</p><pre>{html.escape(command)}</pre>"
    return report_page(title, [*body, section("How it was made", made)], note)


ABOUT_FILE = "comparison.json"
_DPI = 100
_SIDES = ("begin", "end")


@dataclass(frozen=True)
class About:
    """What a comparison's records do not say, kept as `comparison.json`.

    Attributes:
        title: The headline.
        note: Stands below it; may be empty.
        command: The command that makes the comparison.
        names: The contenders', the baseline's first.
        seeds: Of each contender.
    """

    title: str
    note: str
    command: str
    names: tuple[str, ...]
    seeds: tuple[int, ...]

    def write(self, folder: Path) -> None:
        """Writes the file into the comparison's folder."""
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / ABOUT_FILE, json.dumps(asdict(self), indent=1) + "\n")


def read_about(folder: Path) -> About:
    """Reads what `About.write` wrote.

    Raises:
        ValueError: If the folder is not a comparison's.
    """
    try:
        fields = json.loads((folder / ABOUT_FILE).read_text(encoding="utf-8"))
        names, seeds = tuple(fields.pop("names")), tuple(fields.pop("seeds"))
        return About(**fields, names=names, seeds=seeds)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} is not a comparison: {error}.") from error


def write_outputs(folder: Path, page: Path | None = None, baseline: str = "") -> list[Path]:
    """Writes the pages and pictures of a comparison from its `comparison.json` and `runs/*.json`.

    Args:
        folder: Of the comparison.
        page: The Markdown file; `results.md` beside the rest if None. That lies in the folder.
        baseline: Another contender than the first to compare with; everything then lies in
            `against-NAME` below the folder.

    Returns:
        The files.

    Raises:
        ValueError: If there is nothing to show, or no such contender.
    """
    about = read_about(folder)
    names = with_baseline(about.names, baseline)
    results = arrange(read_records(folder / "runs"), names, about.seeds)
    folder = folder / f"against-{baseline}" if baseline else folder
    folder.mkdir(exist_ok=True)
    parts = sections(results)
    page = page or folder / "results.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    words = (about.title, about.note, about.command)
    report = folder / "report.html"
    beside = os.path.relpath(folder, page.parent)
    write_atomic(page, markdown_page(results, parts, *words, pictures=beside))
    write_atomic(report, html_page(results, parts, *words))
    pictures = []
    for part in parts:
        if part.figure is not None:
            pictures.append(folder / f"{part.picture}.png")
            part.figure.save(pictures[-1], dpi=_DPI)
    return [page, report, *pictures]


def with_baseline(names: tuple[str, ...], baseline: str) -> tuple[str, ...]:
    """The names, the baseline's first; as they are without one.

    Raises:
        ValueError: If there is no such name.
    """
    if not baseline:
        return names
    if baseline not in names:
        raise ValueError(f"{baseline!r} is not among what was compared: {', '.join(names)}.")
    return (baseline, *(name for name in names if name != baseline))


def table_of(page: Path, name: str = "") -> str:
    """What stands between a page's markers `<!-- table NAME: begin -->` and `… end -->`.

    Raises:
        ValueError: If the page does not have these markers once.
    """
    begin, end = (f"<!-- {' '.join(['table', name]).strip()}: {side} -->" for side in _SIDES)
    text = page.read_text(encoding="utf-8")
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{page} needs {begin} and {end} once each, around its table.")
    return text.split(begin)[1].split(end)[0].strip()


def renew_table(page: Path, table: str, name: str = "") -> None:
    """Puts a table between a page's markers; see `table_of`."""
    table_of(page, name)
    begin, end = (f"<!-- {' '.join(['table', name]).strip()}: {side} -->" for side in _SIDES)
    before, rest = page.read_text(encoding="utf-8").split(begin)
    write_atomic(page, f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}")
