"""Reads a sweep where its trials have the same average score, for pass@k costs average.

python tune/equal_average.py runs/search --by training.lr --levels 0.24,0.26,0.28

Several sweeps, or files that --save has written, make one table.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from rllib_distrl.cli.session import exit_code_of
from rllib_distrl.experiments.sweep import at_equal_average, read_validations
from rllib_distrl.files import write_atomic


def main(
    sources: Annotated[list[Path], typer.Argument(help="Folders of sweeps, or saved files.")],
    by: Annotated[str, typer.Option(help="Settings that make a row, table.key,table.key.")],
    levels: Annotated[str, typer.Option(help="Average scores in [0, 1], 0.24,0.26.")],
    metrics: Annotated[
        str, typer.Option(help="Of the validation; the table is sorted by the first.")
    ] = "pass@16,pass@32",
    save: Annotated[
        Path | None, typer.Option(help="Keeps what was read, with run.seed, as JSON.")
    ] = None,
) -> None:
    """Prints a row per combination of settings, the best first; means over trials and levels."""
    settings = by.split(",")
    try:
        validations = [
            one for source in sources for one in _read(source, settings, metrics.split(","))
        ]
        table = at_equal_average(
            validations, settings, [float(level) for level in levels.split(",")]
        )
        if save is not None:
            write_atomic(save, "[\n" + ",\n".join(map(json.dumps, validations)) + "\n]\n")
    except (ValueError, OSError) as error:
        raise typer.Exit(exit_code_of(error)) from error
    print(table.to_string(index=False, float_format="{:.3f}".format))


def _read(source: Path, settings: list[str], metrics: list[str]) -> list[dict]:
    if source.is_file():
        return json.loads(source.read_text(encoding="utf-8"))
    return read_validations(source, [*settings, "run.seed"], metrics)


if __name__ == "__main__":
    typer.run(main)
