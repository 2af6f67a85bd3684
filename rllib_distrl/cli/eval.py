"""`distrl eval`: avg@n and pass@k of a run, a checkpoint or any model."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from rllib_distrl.checkpoints import list_checkpoints
from rllib_distrl.cli.critic import print_critic, probe_checkpoint
from rllib_distrl.cli.eval_data import DataOptions, run_data_eval
from rllib_distrl.cli.export import export_checkpoint, find_checkpoint, find_policy
from rllib_distrl.cli.measure import evaluation_settings, measure
from rllib_distrl.cli.quiet import silence_libraries
from rllib_distrl.cli.results import print_summary, problems_of
from rllib_distrl.recipe import Recipe, load_recipe
from rllib_distrl.run_folder import RunFolder
from rllib_distrl.run_log import write_atomic


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
        run_data_eval(target, options, model=model, out=out, console=console)
        return
    options.refuse_without_data()
    _eval_as_recipe(target, overrides, model, out, console)


def _eval_as_recipe(
    target: Path, overrides: Sequence[str], model: str | None, out: Path | None, console: Console
) -> None:
    """Evaluates as the `[eval]` table of the target's recipe says."""
    if target.is_file():
        recipe = load_recipe(target, overrides)
        _measure_and_report(recipe, model or recipe.run.model, out, console)
        return
    if not target.exists() or (target / "config.json").is_file():
        raise ValueError(
            f"{target} is neither a run folder nor a checkpoint in one, nor a recipe. To evaluate "
            "a model of this name, say on what: --data gsm8k, --data FILE.jsonl, ..."
        )
    run, checkpoint = find_policy(target, console)
    recipe = load_recipe(run.recipe_file, overrides)
    if model is not None:
        _measure_and_report(recipe, model, out, console)
        return
    critic = _critic(target, run, recipe, console)
    if checkpoint is None:
        _measure_and_report(recipe, run.model, out, console, critic)
        return
    with tempfile.TemporaryDirectory(prefix="distrl-") as folder:
        export_checkpoint(run, checkpoint, Path(folder))
        _measure_and_report(recipe, folder, out, console, critic)


def _critic(target: Path, run: RunFolder, recipe: Recipe, console: Console) -> dict[str, float]:
    """What the critic of a run or checkpoint knows; only checkpoints hold critics."""
    if recipe.eval.critic_prefixes and not list_checkpoints(run.checkpoints):
        console.print("No report on the critic: the run has no checkpoint.", highlight=False)
        return {}
    evaluation_settings(recipe).validate()
    _, checkpoint = find_checkpoint(target, console)
    return probe_checkpoint(run, checkpoint, recipe)


def _measure_and_report(
    recipe: Recipe,
    model: str | Path,
    out: Path | None,
    console: Console,
    critic: dict[str, float] | None = None,
) -> None:
    evaluation_settings(recipe).validate()
    with tempfile.TemporaryDirectory(prefix="distrl-eval-") as scratch:
        samples = (out or Path(scratch)) / "samples.parquet"
        result = measure(recipe, model, "Evaluating", console, samples=samples)
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
