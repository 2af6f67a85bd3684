"""The files that show a comparison, made from its records alone."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from rllib_distrl.experiments.pages import html_page, markdown_page, sections
from rllib_distrl.experiments.record import read_records
from rllib_distrl.experiments.results import arrange
from rllib_distrl.files import write_atomic

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
            part.figure.savefig(pictures[-1], dpi=_DPI, facecolor="white")
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
