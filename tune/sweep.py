"""Searches a recipe's settings with Ray Tune.

    python tune/sweep.py RECIPE.toml SPACE.toml --out runs/sweep

SPACE.toml names the metric, the search (grid, random, optuna), the scheduler (none, asha, pbt) and
the settings: see tune/countdown_space.toml. `--resume` continues; the best recipe is printed and
written as best.toml.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from rllib_distrl.cli.session import exit_code_of, silence_libraries


def main(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe (TOML).")],
    space: Annotated[Path, typer.Argument(metavar="SPACE", help="What to search (TOML).")],
    out: Annotated[Path, typer.Option(help="Folder of the sweep.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TABLE.KEY=VALUE]...", help="Settings that replace the recipe's."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the sweep in there.")] = False,
    max_concurrent: Annotated[
        int, typer.Option(help="Trials at once; 0: what the resources allow.")
    ] = 0,
    address: Annotated[
        str | None, typer.Option(help="Of a running Ray cluster, host:port; else one is started.")
    ] = None,
) -> None:
    """Runs the sweep, prints its trials and the best recipe."""
    silence_libraries()
    try:
        _run(recipe, space, overrides or [], out, resume, max_concurrent, address)
    except (ValueError, OSError, KeyboardInterrupt) as error:
        raise typer.Exit(exit_code_of(error)) from error


def _run(
    recipe: Path,
    space: Path,
    overrides: list[str],
    out: Path,
    resume: bool,
    max_concurrent: int,
    address: str | None,
) -> None:
    from rllib_distrl.cli.session import check_address, ray_session
    from rllib_distrl.experiments.sweep import run_sweep
    from rllib_distrl.experiments.trials import load_space
    from rllib_distrl.model.loading import resolve
    from rllib_distrl.recipe import load_recipe

    base = load_recipe(recipe, overrides)
    config = base.build_config()
    searched = load_space(space, base)
    if address is not None:
        os.environ["RAY_ADDRESS"] = address
    check_address()
    resolve(base.run.model)  # once, before trials ask for it at the same time
    with ray_session(config):
        found = run_sweep(base, searched, out, resume=resume, max_concurrent=max_concurrent)
    print(found.frame.drop(columns="folder").to_string(index=False))
    if found.tied > 1:
        print(f"{found.tied} trials tie for the best; the first of them is taken.")
    print(f"Wrote {out}/trials.parquet and {out}/best.toml:\n\n{found.best.to_toml()}")


if __name__ == "__main__":
    typer.run(main)
