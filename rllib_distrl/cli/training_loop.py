"""The loop of `distrl train`: iterations, logs, checkpoints, export."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from rllib_distrl.checkpoints import checkpoint_iteration
from rllib_distrl.cli.display import Progress, make_display, warn
from rllib_distrl.cli.errors import TrainingStopped
from rllib_distrl.cli.goal import Goal
from rllib_distrl.cli.interrupts import Interrupts
from rllib_distrl.cli.quiet import hide_loading_bars
from rllib_distrl.cli.ray_session import ray_session
from rllib_distrl.cli.scale import take_scale_request
from rllib_distrl.cli.training_checkpoints import TrainingCheckpoints
from rllib_distrl.recipe import Recipe
from rllib_distrl.run_folder import RunFolder
from rllib_distrl.run_log import RunLog, read_progress
from rllib_distrl.trackers import Trackers, tracked_run

_REFUSED_STEPS = "learners/default_policy/nonfinite_steps"

if TYPE_CHECKING:
    from ray.rllib.algorithms.algorithm import Algorithm


def train_and_export(checkpoints: TrainingCheckpoints, interrupts: Interrupts) -> bool:
    """Trains from the newest good checkpoint to the run's goal and writes `model/`.

    Returns:
        False if there was nothing left to do.

    Raises:
        Interrupted: After a signal; the last whole iteration is in a checkpoint.
    """
    recipe, run, console = checkpoints.recipe, checkpoints.run, checkpoints.console
    checkpoint = checkpoints.latest()
    start = checkpoint_iteration(checkpoint) if checkpoint else 0
    if start and Goal.of(recipe.run).reached(_row(run, start)) and run.model.is_dir():
        setting = "run.budget_tokens" if recipe.run.budget_tokens else "run.iterations"
        console.print(f"All {start} iterations of this run are done. Raise {setting} to train on.")
        return False
    if start:
        console.print(f"Resuming after iteration {start}.", highlight=False)
    hide_loading_bars()
    config = recipe.build_config()
    with ray_session(config):
        interrupts.install()
        algo = config.build_algo()
        try:
            if checkpoint is not None:
                algo.restore_from_path(str(checkpoint.resolve()))
            with _trackers(recipe, run, console) as trackers:
                _iterate(algo, checkpoints, interrupts, start, trackers)
            _export(algo, run.model)
            _write_tokens(algo, recipe, run, console)
            _write_critic(algo, recipe, run, console)
            _print_best(checkpoints)
        finally:
            algo.stop()
    return True


def _row(run: RunFolder, iteration: int) -> dict[str, Any]:
    """What the run's log says of an iteration; only its number where the log lacks it."""
    rows = read_progress(run.progress_file)
    found = (row for row in rows if row["iteration"] == iteration)
    return next(found, {"iteration": iteration})


def _iterate(
    algo: Algorithm,
    checkpoints: TrainingCheckpoints,
    interrupts: Interrupts,
    start: int,
    trackers: Trackers,
) -> None:
    recipe, run, console = checkpoints.recipe, checkpoints.run, checkpoints.console
    goal = Goal.of(recipe.run)
    progress = Progress(goal)
    with (
        RunLog(run.progress_file, run.tensorboard, last_iteration=start) as log,
        make_display(console, recipe.run.log_interval) as display,
        interrupts.deferred(),
    ):
        row = _row(run, start)
        while not goal.reached(row):
            if scaled := take_scale_request(run, algo):
                console.print(scaled, highlight=False)
            iteration = row["iteration"] + 1
            row = log.write(iteration, _train(algo, checkpoints, log, row))
            trackers.write(row)
            display.show(progress.snapshot(row))
            _warn_of_refused_steps(console, row)
            if checkpoints.due(row) or goal.reached(row) or interrupts.pending:
                checkpoints.save(algo, log, row)
            interrupts.raise_pending()


@contextmanager
def _trackers(recipe: Recipe, run: RunFolder, console: Console) -> Iterator[Trackers]:
    """Opens the trackers and ends the run in them; a failed upload does not fail the run."""
    described = tracked_run(run.path, run.started(), recipe.to_dict())
    trackers = Trackers(recipe.run.trackers, described)
    failed = True
    try:
        yield trackers
        failed = False
    finally:
        for problem in trackers.close(failed=failed):
            warn(console, f"Not everything was logged. {problem}")


def _train(
    algo: Algorithm, checkpoints: TrainingCheckpoints, log: RunLog, row: dict[str, Any]
) -> dict[str, Any]:
    """Trains one iteration after that of `row`; if it cannot be done, keeps the state before it."""
    from rllib_distrl.algorithms.optimizer_steps import OPTIMIZER_STEPS, optimizer_steps
    from rllib_distrl.algorithms.sampling import RunnersLostError, SamplingError
    from rllib_distrl.algorithms.validation_clock import without_repeats
    from rllib_distrl.learners.refusals import NonFiniteError

    try:
        result = without_repeats(algo.train())
        return {**result, OPTIMIZER_STEPS: optimizer_steps(algo)}
    except Exception as error:
        checkpoints.rescue(algo, log, row)
        if not isinstance(error, (RunnersLostError, SamplingError, NonFiniteError)):
            raise
        again = f"distrl train {shlex.quote(str(checkpoints.run.path))} --resume"
        raise TrainingStopped(
            f"Training stopped in iteration {row['iteration'] + 1}; what was learned before is in "
            f"a checkpoint. {error}\nContinue with: {again}"
        ) from error


def _print_best(checkpoints: TrainingCheckpoints) -> None:
    if best := checkpoints.best():
        path, score = best
        checkpoints.console.print(
            f"Best checkpoint: {path} ({checkpoints.recipe.run.checkpoint_metric} = {score:.4g})",
            highlight=False,
            soft_wrap=True,
        )


def _warn_of_refused_steps(console: Console, row: dict[str, Any]) -> None:
    if refused := row.get(_REFUSED_STEPS):
        warn(
            console,
            f"Iteration {row['iteration']}: refused {refused} optimiser step(s) whose loss or "
            "gradient is not finite.",
        )


def _export(algo: Any, target: Path) -> None:
    """Writes the Hugging Face folder, whole or not at all."""
    from rllib_distrl.algorithms.language_model import export_policy

    temporary = target.with_name(f".tmp-{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    export_policy(algo, str(temporary))
    if target.is_dir():
        shutil.rmtree(target)
    os.rename(temporary, target)


def _write_tokens(algo: Any, recipe: Recipe, run: RunFolder, console: Console) -> None:
    """Stores the token table; a run that cannot be looked at is still a finished run."""
    from rllib_distrl.algorithms.inspection import inspect_policy

    if not recipe.eval.token_problems:
        return
    split = "train" if recipe.eval.split == "train" else "validation"
    try:
        table = inspect_policy(algo, problems=recipe.eval.token_problems, split=split)
    except (RuntimeError, ValueError) as error:
        warn(console, f"No token table for `distrl view`: {error}")
        return
    table.to_parquet(run.tokens_file)


def _write_critic(algo: Any, recipe: Recipe, run: RunFolder, console: Console) -> None:
    """Puts what the critic knows into `eval.json`; a run without that is still finished."""
    from rllib_distrl.cli.critic import probe

    try:
        found = probe(algo, recipe)
    except (RuntimeError, ValueError) as error:
        warn(console, f"No report on the critic: {error}")
        return
    if found:
        run.write_eval({**run.read_eval(), "critic": found})
