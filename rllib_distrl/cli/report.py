"""`distrl report`: one page about one run or several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from rllib_distrl.runs.reading import load_run
from rllib_distrl.viewer.report import write_report


def run_report(sources: Sequence[Path], out: Path | None) -> None:
    """Writes the page.

    Args:
        sources: Run folders.
        out: The HTML file; by default `report.html` in the run folder, or here for several runs.

    Raises:
        ValueError: If one of them is not a run.
    """
    names = [source.resolve().name for source in sources]
    if len(set(names)) < len(names):
        names = [str(source) for source in sources]
    runs = [load_run(source, name) for source, name in zip(sources, names, strict=True)]
    default = sources[0] / "report.html" if len(sources) == 1 else Path("report.html")
    page = write_report(runs, out or default)
    Console().print(f"Wrote {page}", highlight=False, markup=False, soft_wrap=True)
