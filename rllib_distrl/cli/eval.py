"""`distrl eval`: avg@n and pass@k of a run, a checkpoint or any model."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from rllib_distrl.cli.checkpoints import (
    export_checkpoint,
    find_checkpoint,
    find_policy,
    print_critic,
    probe_checkpoint,
)
from rllib_distrl.cli.eval_data import DataOptions, run_data_eval
from rllib_distrl.cli.interrupts import Interrupts
from rllib_distrl.cli.measure import evaluation_settings, measure
from rllib_distrl.cli.ray_session import silence_libraries
from rllib_distrl.cli.results import print_summary, problems_of
from rllib_distrl.files import write_atomic
from rllib_distrl.recipe import Recipe, load_recipe
from rllib_distrl.runs.checkpoints import list_checkpoints
from rllib_distrl.runs.folder import RunFolder

_STOPPING = "Stopping with this chunk of problems. Ctrl-C again stops at once."
_CONTINUE = "The same command continues."


def run_eval(
    target: Path,
    overrides: Sequence[str],
    *,
    model: str | None,
    out: Path | None,
    options: DataOptions | None = None,
) -> None:
    """Runs the command.

    Args:
        target: A recipe (evaluates its starting model), a run folder or a checkpoint; a model
            where the options name data.
        overrides: `table.key=value` items.
        model: A folder or id to evaluate in place of the target's.
        out: Folder for `eval.json`, the samples and, with data, the plot; None writes nothing.
        options: Data other than the recipe's, and how to sample it.

    Raises:
        ValueError: For bad input.
    """
    silence_libraries()
    console = Console()
    options = options or DataOptions()
    if options.data is not None:
        if overrides:
            raise ValueError(
                f"{overrides[0]} changes a recipe, which does not decide what happens with "
                "--data: use options such as --n 64."
            )
        with Interrupts(_STOPPING, f"Stopped. {_CONTINUE if out else ''}") as interrupts:
            run_data_eval(
                target, options, model=model, out=out, console=console, interrupts=interrupts
            )
        return
    options.refuse_without_data()
    with Interrupts(_STOPPING) as interrupts, ExitStack() as held:
        report = _Report(out, console, interrupts)
        _eval_as_recipe(target, overrides, model, report, held)


@dataclass(frozen=True)
class _Report:
    """Where the numbers of an evaluation go, and what may end it."""

    out: Path | None
    console: Console
    interrupts: Interrupts


def _eval_as_recipe(
    target: Path,
    overrides: Sequence[str],
    model: str | None,
    report: _Report,
    held: ExitStack,
) -> None:
    """Evaluates as the `[eval]` table of the target's recipe says."""
    if target.is_file():
        recipe = load_recipe(target, overrides)
        _measure_and_report(recipe, model or recipe.run.model, report)
        return
    if not target.exists() or (target / "config.json").is_file():
        raise ValueError(
            f"{target} is neither a run folder nor a checkpoint in one, nor a recipe. To evaluate "
            "a model of this name, say on what: --data gsm8k, --data FILE.jsonl, ..."
        )
    run, checkpoint = find_policy(target, report.console, held)
    recipe = load_recipe(run.recipe_file, overrides)
    if model is not None:
        _measure_and_report(recipe, model, report)
        return
    evaluation_settings(recipe).validate()
    critic = _critic(target, run, checkpoint, recipe, report, held)
    if checkpoint is None:
        _measure_and_report(recipe, run.model, report, critic)
        return
    with tempfile.TemporaryDirectory(prefix="distrl-") as folder:
        export_checkpoint(run, checkpoint, Path(folder), report.interrupts)
        _measure_and_report(recipe, folder, report, critic)


def _critic(
    target: Path,
    run: RunFolder,
    checkpoint: Path | None,
    recipe: Recipe,
    report: _Report,
    held: ExitStack,
) -> dict[str, float]:
    """What the critic of a run or checkpoint knows; only checkpoints hold critics."""
    if recipe.eval.critic_prefixes and not list_checkpoints(run.checkpoints):
        report.console.print("No report on the critic: the run has no checkpoint.", highlight=False)
        return {}
    if checkpoint is None:
        _, checkpoint = find_checkpoint(target, report.console, held)
    return probe_checkpoint(run, checkpoint, recipe, report.interrupts)


def _measure_and_report(
    recipe: Recipe, model: str | Path, to: _Report, critic: dict[str, float] | None = None
) -> None:
    out, console = to.out, to.console
    evaluation_settings(recipe).validate()
    with tempfile.TemporaryDirectory(prefix="distrl-eval-") as scratch:
        samples = (out or Path(scratch)) / "samples.parquet"
        result = measure(
            recipe, model, "Evaluating", console, samples=samples, interrupts=to.interrupts
        )
    measured = {"split": result.split, "scores": list(result.scores)}
    kind = problems_of(measured)
    print_summary(console, result.summary, result.problems, result.samples, kind, result.scores)
    print_critic(console, critic or {}, result.split)
    if out is not None:
        report = {**result.summary, "problems": result.problems, "samples": result.samples}
        report |= measured
        report |= {"critic": critic} if critic else {}
        write_atomic(out / "eval.json", json.dumps(report, indent=2) + "\n")
        console.print(f"Wrote {out}", highlight=False)
