"""The loop of `distrl train`: iterations, logs, checkpoints, export."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from rich.console import Console

from rllib_distrl.cli.display import Progress, make_display, warn
from rllib_distrl.cli.errors import TrainingStopped
from rllib_distrl.cli.goal import Goal
from rllib_distrl.cli.interrupts import Interrupts
from rllib_distrl.cli.quiet import hide_loading_bars
from rllib_distrl.cli.ray_session import ray_session
from rllib_distrl.cli.scale import take_scale_request
from rllib_distrl.cli.training_checkpoints import TrainingCheckpoints
from rllib_distrl.files import replaced_folder
from rllib_distrl.recipe import Recipe
from rllib_distrl.runs.checkpoints import checkpoint_iteration
from rllib_distrl.runs.folder import RunFolder
from rllib_distrl.runs.log import RunLog, read_progress
from rllib_distrl.runs.trackers import Trackers, tracked_run

_REFUSED_STEPS = "learners/default_policy/nonfinite_steps"

if TYPE_CHECKING:
    from ray.rllib.algorithms.algorithm import Algorithm


def train_and_export(
    checkpoints: TrainingCheckpoints, interrupts: Interrupts, checkpoint: Path | None
) -> bool:
    """Trains from a checkpoint, or from the start, to the run's goal and writes `model/`.

    Returns:
        False if there was nothing left to do.

    Raises:
        ValueError: If what is to be trained cannot be exported, or the cluster lacks what was
            asked for.
        Interrupted: After a signal; the last whole iteration is in a checkpoint.
    """
    from rllib_distrl.algorithm.cluster import check_cluster

    recipe, run, console = checkpoints.recipe, checkpoints.run, checkpoints.console
    start = checkpoint_iteration(checkpoint) if checkpoint else 0
    if start and Goal.of(recipe.run).reached(_row(run, start)) and run.model.is_dir():
        setting = "run.budget_tokens" if recipe.run.budget_tokens else "run.iterations"
        console.print(f"All {start} iterations of this run are done. Raise {setting} to train on.")
        return False
    if start:
        console.print(f"Resuming after iteration {start}.", highlight=False)
    hide_loading_bars()
    config = recipe.build_config()
    interrupts.check()
    with ray_session(config, interrupts):
        check_cluster(config)  # RLlib's own algorithms would wait
        algo = config.build_algo()
        try:
            interrupts.check()
            if checkpoint is not None:
                algo.restore_from_path(str(checkpoint.resolve()))
            _try_export(algo, run)
            interrupts.check()
            with _trackers(recipe, run, console) as trackers:
                _iterate(algo, checkpoints, interrupts, start, trackers)
            # The model comes last: where it is, nothing is missing.
            for write in (_write_tokens, _write_critic, _write_model):
                interrupts.check()
                write(algo, recipe, run, console)
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
    ):
        row = _row(run, start)
        try:
            while not goal.reached(row):
                if scaled := take_scale_request(run, algo):
                    console.print(scaled, highlight=False)
                row = log.write(row["iteration"] + 1, _train(algo, run, row["iteration"] + 1))
                stopping = interrupts.pending  # a later signal waits for the next iteration
                if checkpoints.due(row) or goal.reached(row) or stopping:
                    checkpoints.save(algo, log, row)
                trackers.write(row)
                display.show(progress.snapshot(row))
                _warn_of_refused_steps(console, row)
                if stopping:
                    interrupts.check()
        except Exception:
            checkpoints.rescue(algo, log, row)
            interrupts.check()  # a signal to all processes takes Ray's down, too
            raise


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


def _train(algo: Algorithm, run: RunFolder, iteration: int) -> dict[str, Any]:
    """Trains one iteration."""
    from rllib_distrl.algorithm.optimizer_steps import OPTIMIZER_STEPS, optimizer_steps
    from rllib_distrl.algorithm.sampling import RunnersLostError, SamplingError
    from rllib_distrl.algorithm.validation_clock import without_repeats
    from rllib_distrl.learner.refusals import NonFiniteError

    try:
        result = without_repeats(algo.train())
        return {**result, OPTIMIZER_STEPS: optimizer_steps(algo)}
    except (RunnersLostError, SamplingError, NonFiniteError) as error:
        again = f"distrl train {shlex.quote(str(run.path))} --resume"
        raise TrainingStopped(
            f"Training stopped in iteration {iteration}; what was learned before is in a "
            f"checkpoint. {error}\nContinue with: {again}"
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


def _write_tokens(algo: Any, recipe: Recipe, run: RunFolder, console: Console) -> None:
    """Stores the token table; a run that cannot be looked at is still a finished run."""
    from rllib_distrl.algorithm.inspection import inspect_policy

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


def _try_export(algo: Any, run: RunFolder) -> None:
    """Writes the model once before training, and removes it: what the end needs works.

    Raises:
        ValueError: With the reason why it does not.
    """
    from rllib_distrl.algorithm.wiring import export_policy

    with TemporaryDirectory(prefix=".tmp-export-", dir=run.path) as folder:
        try:
            export_policy(algo, folder)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"What is trained from this model could not be exported, so training does not "
                f"start: {error}"
            ) from error


def _write_model(algo: Any, recipe: Recipe, run: RunFolder, console: Console) -> None:
    """Writes the Hugging Face folder, whole or not at all."""
    from rllib_distrl.algorithm.wiring import export_policy

    with replaced_folder(run.model) as folder:
        export_policy(algo, folder)
