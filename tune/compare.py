"""Compares recipes at an equal budget of tokens.

    python tune/compare.py A.toml B.toml --seeds 8 --budget-tokens 500000 --out runs/comparison

The first recipe is the baseline. A file with `recipe = "FILE.toml"` and tables `[variants.NAME]`
stands for that many variants of one recipe (an ablation). The same command continues what was
stopped and repeats what failed.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from rllib_distrl.cli.session import check_address, cpus_needed, exit_code_of, silence_libraries
from rllib_distrl.experiments.comparison import Comparison, Plan, make_plan
from rllib_distrl.experiments.pages import About, write_outputs
from rllib_distrl.experiments.results import Record


def main(
    recipes: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE... [TABLE.KEY=VALUE]...",
            help="Recipes or files of variants, then settings that replace those of all.",
        ),
    ],
    seeds: Annotated[int, typer.Option(help="Runs of each recipe.")],
    budget_tokens: Annotated[int, typer.Option(help="Completion tokens of each run.")],
    out: Annotated[Path, typer.Option(help="Folder of the comparison.")],
    first_seed: Annotated[int, typer.Option(help="Seeds are this one and the next ones.")] = 0,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at once.")] = 1,
    title: Annotated[str, typer.Option(help="Headline of the page.")] = "Comparison",
    note: Annotated[str, typer.Option(help="Stands below the headline.")] = "",
) -> None:
    """Runs what is missing, then writes results.md."""
    silence_libraries()
    try:
        check_address()
        files = [Path(item) for item in recipes if "=" not in item]
        overrides = [item for item in recipes if "=" in item]
        plan = make_plan(
            files, overrides, seeds=seeds, first_seed=first_seed, budget_tokens=budget_tokens
        )
        comparison = Comparison(plan, out)
        at_once = _at_once(plan, jobs)
        about = About(
            title=title,
            note=note,
            command=shlex.join(["python", *sys.argv]),
            names=tuple(contender.name for contender in plan.contenders),
            seeds=plan.seeds,
        )
        about.write(out)
        total = len(plan.jobs())
        print(f"{len(plan.contenders)} recipes x {seeds} seeds = {total} runs in {out}", flush=True)
        comparison.run(at_once, lambda record: _say(record, comparison, total))
        for path in write_outputs(out):
            print(f"Wrote {path}")
        failed = sum(not record.finished for record in comparison.records())
    except (ValueError, OSError, KeyboardInterrupt) as error:
        if isinstance(error, KeyboardInterrupt):
            print("Stopped. The same command continues.")
        raise typer.Exit(exit_code_of(error)) from error
    if failed:
        print(f"{failed} of {total} runs failed: see {out}/logs. The same command repeats them.")
        raise typer.Exit(1)


def _at_once(plan: Plan, jobs: int) -> int:
    """`jobs`, or as many as the cores can take: each has a driver and what its actors reserve."""
    needed = max(cpus_needed(contender.recipe.build_config()) for contender in plan.contenders)
    cores = len(os.sched_getaffinity(0))
    most = max(1, cores // max(needed, 1))
    if jobs > most:
        print(f"{most} at once instead of {jobs}: {cores} cores, {max(needed, 1)} for each run.")
    return min(jobs, most)


def _say(record: Record, comparison: Comparison, total: int) -> None:
    done = len(comparison.records())
    head = f"[{done}/{total}] {record.name} seed {record.seed}"
    if not record.finished:
        print(f"{head} failed: {record.error}", flush=True)
        return
    shown = [name for name in record.metrics if name.startswith(("avg@", "pass@"))]
    ends = ", ".join(f"{name} {100 * record.metrics[name]:.1f} %" for name in (shown[0], shown[-1]))
    print(f"{head}: {ends}, {record.tokens:,} tokens, {record.wall_seconds:.0f} s", flush=True)


if __name__ == "__main__":
    typer.run(main)
