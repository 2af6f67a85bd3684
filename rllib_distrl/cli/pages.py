"""`distrl view` and `distrl report`: pages about what runs leave on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from rllib_distrl.method.token_table import TokenTable
from rllib_distrl.runs.folder import is_run_folder
from rllib_distrl.runs.reading import Run, load_run
from rllib_distrl.viewer.token_page import table_of_samples, write_viewer


def run_view(source: Path, out: Path | None, words: str | None = None) -> None:
    """Writes the page that shows what the critic believed at every token.

    Args:
        source: A run folder, a token table, or the graded completions of an evaluation.
        out: The HTML file; by default `view.html` in the run folder or beside the samples.
        words: Separated by commas: what the entropy is at tokens that are one of them is printed,
            and stands on the page.

    Raises:
        ValueError: If there is nothing to show, or no entropy.
    """
    if is_run_folder(source):
        run = load_run(source)
        table, note = _table_of_run(run)
        title, default = run.name, run.path / "view.html"
    elif source.is_dir() and not (source / "samples").is_dir():
        raise ValueError(
            f"{source} is not a run folder. Give a run, the folder of an evaluation, or a Parquet "
            "file of samples."
        )
    elif source.is_dir():
        table, note = table_of_samples(source / "samples"), ""
        title, default = source.resolve().name, source / "view.html"
    else:
        table, note = table_of_samples(source), ""
        title, default = source.stem, source.with_suffix(".html")
    said = "" if words is None else _entropy_at(table, words)
    note = "; ".join(filter(None, (note, said)))
    page = write_viewer(table, out or default, title=title, note=note)
    for line in filter(None, (said[:1].upper() + said[1:], f"Wrote {page}")):
        Console().print(line, highlight=False, markup=False, soft_wrap=True)


def _entropy_at(table: TokenTable, words: str) -> str:
    from rllib_distrl.evaluation.measures import entropy_at

    wanted = [word.strip() for word in words.split(",") if word.strip()]
    if not wanted:
        raise ValueError("--entropy-at names no word: give some, separated by commas.")
    mean, count = entropy_at(table, wanted)
    every = table.numbers("entropy")
    at_words = f"{mean:.3f} nats at {count:,} of them" if count else "none of them occurs"
    return (
        f"entropy at the tokens {', '.join(wanted)}: {at_words}; {every.mean():.3f} at all "
        f"{len(every):,}"
    )


def _table_of_run(run: Run) -> tuple[TokenTable, str]:
    """The token table; graded completions without tokens where the run has none yet."""
    if run.has_tokens:
        return run.token_table, ""
    for when in ("after", "before"):
        samples = run.folder.samples / f"{when}.parquet"
        if samples.is_file():
            note = (
                f"completions from {when} training, by word: the token table is written when "
                "training ends, unless eval.token_problems is 0"
            )
            return table_of_samples(samples), note
    raise ValueError(f"{run.path} holds no completions yet: they come with the first evaluation.")


def run_report(sources: Sequence[Path], out: Path | None) -> None:
    """Writes the page about one run or several.

    Args:
        sources: Run folders.
        out: The HTML file; by default `report.html` in the run folder, or here for several runs.

    Raises:
        ValueError: If one of them is not a run.
    """
    from rllib_distrl.viewer.run_report import write_report  # Matplotlib takes its time.

    names = [source.resolve().name for source in sources]
    if len(set(names)) < len(names):
        names = [str(source) for source in sources]
    runs = [load_run(source, name) for source, name in zip(sources, names, strict=True)]
    default = sources[0] / "report.html" if len(sources) == 1 else Path("report.html")
    page = write_report(runs, out or default)
    Console().print(f"Wrote {page}", highlight=False, markup=False, soft_wrap=True)
