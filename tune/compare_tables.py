"""Writes a comparison's tables, figures and page again, from its records alone.

python tune/compare_tables.py docs/results/ablation --page docs/ablation.md
python tune/compare_tables.py runs/comparison --baseline grpo
"""

from pathlib import Path
from typing import Annotated

import typer

from rllib_distrl.cli.session import exit_code_of
from rllib_distrl.experiments.pages import write_outputs


def main(
    folder: Annotated[Path, typer.Argument(help="What tune/compare.py was given as --out.")],
    page: Annotated[
        Path | None, typer.Option(help="The Markdown page; results.md in the folder if not given.")
    ] = None,
    baseline: Annotated[
        str, typer.Option(help="Compare with this recipe; the pages lie in against-NAME.")
    ] = "",
) -> None:
    """Reads comparison.json and runs/*.json; starts nothing."""
    try:
        for path in write_outputs(folder, page, baseline):
            print(f"Wrote {path}")
    except ValueError as error:
        raise typer.Exit(exit_code_of(error)) from error


if __name__ == "__main__":
    typer.run(main)
