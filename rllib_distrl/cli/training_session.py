"""One session of `distrl train`: Ray, the algorithm, its training, and what that leaves."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from rllib_distrl.cli.display import Progress, training_display, warn
from rllib_distrl.cli.interrupts import Interrupts
from rllib_distrl.cli.ray_session import hide_loading_bars, ray_session
from rllib_distrl.cli.scale import take_scale_request
from rllib_distrl.experiments.training import Row, RunLength, Training, TrainingCheckpoints
from rllib_distrl.files import remove_temporaries, replaced_folder
from rllib_distrl.recipe import Recipe
from rllib_distrl.runs.checkpoints import TrainingStopped, checkpoint_iteration
from rllib_distrl.runs.folder import RunFolder
from rllib_distrl.runs.log import RunLog, Trackers, read_progress, tracked_run

_REFUSED_STEPS = "learners/default_policy/nonfinite_steps"


@dataclass(frozen=True)
class Session:
    """What one `distrl train` works with.

    Attributes:
        checkpoints: Of the run, with its recipe and its folder.
        interrupts: Where signals are noted.
        console: For people.
        newest: The checkpoint to go on from; None at the start of a run.
        problems: What is said of the problems before anything starts.
    """

    checkpoints: TrainingCheckpoints
    interrupts: Interrupts
    console: Console
    newest: Path | None
    problems: Sequence[str]

    @property
    def recipe(self) -> Recipe:
        """That of the run."""
        return self.checkpoints.recipe

    @property
    def run(self) -> RunFolder:
        """Where everything goes."""
        return self.checkpoints.run


def train_and_export(session: Session) -> bool:
    """Trains from the newest checkpoint, or from the start, to the end and writes `model/`.

    Returns:
        False if there was nothing left to do.

    Raises:
        ValueError: If what is to be trained cannot be exported, or the cluster lacks what was
            asked for.
        Interrupted: After a signal; the last whole iteration is in a checkpoint.
    """
    from rllib_distrl.algorithm.cluster import check_cluster

    recipe, run, interrupts = session.recipe, session.run, session.interrupts
    start = checkpoint_iteration(session.newest) if session.newest else 0
    if start and RunLength.of(recipe.run).reached(_row(run, start)) and run.model.is_dir():
        setting = "run.budget_tokens" if recipe.run.budget_tokens else "run.iterations"
        session.console.print(
            f"All {start} iterations of this run are done. Raise {setting} to train on."
        )
        return False
    if start:
        session.console.print(f"Resuming after iteration {start}.", highlight=False)
    hide_loading_bars()
    config = recipe.build_config()
    interrupts.check()
    with ray_session(config, interrupts):
        check_cluster(config)  # RLlib's own algorithms would wait
        algo = config.build_algo()
        try:
            interrupts.check()
            if session.newest is not None:
                algo.restore_from_path(str(session.newest.resolve()))
            _try_export(algo, run)
            interrupts.check()
            _train(algo, session, _row(run, start))
            # The model comes last: where it is, nothing is missing.
            for write in (_write_tokens, _write_critic, _write_model):
                interrupts.check()
                write(algo, session)
            _print_best(session)
        finally:
            algo.stop()
    return True


def _row(run: RunFolder, iteration: int) -> Row:
    """What the run's log says of an iteration; only its number where the log lacks it."""
    rows = read_progress(run.progress_file)
    found = (row for row in rows if row["iteration"] == iteration)
    return next(found, {"iteration": iteration})


def _train(algo: Any, session: Session, row: Row) -> None:
    """Trains on from the iteration of `row`, telling the trackers and people of it."""
    recipe, run, interrupts = session.recipe, session.run, session.interrupts
    length = RunLength.of(recipe.run)
    with (
        _trackers(session) as trackers,
        RunLog(run.progress_file, run.tensorboard, last_iteration=row["iteration"]) as log,
        training_display(session.console, recipe.run.log_interval) as show,
    ):
        training = Training(algo, length, row, log=log, checkpoints=session.checkpoints)
        try:
            with _said_what_to_do(training, run):
                training.run(
                    before=lambda: _scale(algo, session),
                    after=_reporter(session, trackers, show, Progress(length)),
                    stopping=lambda: interrupts.pending,
                )
        except Exception:
            interrupts.check()  # a signal to all processes takes Ray's down, too
            raise
        interrupts.check()


def _scale(algo: Any, session: Session) -> None:
    if scaled := take_scale_request(session.run, algo):
        session.console.print(scaled, highlight=False)


def _reporter(
    session: Session, trackers: Trackers, show: Callable[[Any], None], progress: Progress
) -> Callable[[Row], None]:
    def report(row: Row) -> None:
        trackers.write(row)
        show(progress.snapshot(row))
        if refused := row.get(_REFUSED_STEPS):
            warn(
                session.console,
                f"Iteration {row['iteration']}: refused {refused} optimiser step(s) whose loss or "
                "gradient is not finite.",
            )

    return report


@contextmanager
def _said_what_to_do(training: Training, run: RunFolder) -> Iterator[None]:
    """Says of an error that ends training where it was and how to go on."""
    from rllib_distrl.learner.step import NonFiniteError
    from rllib_distrl.rollout.groups import RunnersLostError, SamplingError

    try:
        yield
    except (RunnersLostError, SamplingError, NonFiniteError) as error:
        again = f"distrl train {shlex.quote(str(run.path))} --resume"
        raise TrainingStopped(
            f"Training stopped in iteration {training.row['iteration'] + 1}; what was learned "
            f"before is in a checkpoint. {error}\nContinue with: {again}"
        ) from error


@contextmanager
def _trackers(session: Session) -> Iterator[Trackers]:
    """Opens the trackers and ends the run in them; a failed upload does not fail the run."""
    recipe, run = session.recipe, session.run
    described = tracked_run(run.path, run.started(), recipe.to_dict())
    trackers = Trackers(recipe.run.trackers, described)
    failed = True
    try:
        yield trackers
        failed = False
    finally:
        for problem in trackers.close(failed=failed):
            warn(session.console, f"Not everything was logged. {problem}")


def _print_best(session: Session) -> None:
    if best := session.checkpoints.best():
        path, score = best
        session.console.print(
            f"Best checkpoint: {path} ({session.recipe.run.checkpoint_metric} = {score:.4g})",
            highlight=False,
            soft_wrap=True,
        )


def _write_tokens(algo: Any, session: Session) -> None:
    """Stores the token table; a run that cannot be looked at is still a finished run."""
    from rllib_distrl.algorithm.inspection import inspect_policy

    settings = session.recipe.eval
    if not settings.token_problems:
        return
    split = "train" if settings.split == "train" else "validation"
    try:
        table = inspect_policy(algo, problems=settings.token_problems, split=split)
    except (RuntimeError, ValueError) as error:
        warn(session.console, f"No token table for `distrl view`: {error}")
        return
    table.to_parquet(session.run.tokens_file)


def _write_critic(algo: Any, session: Session) -> None:
    """Puts what the critic knows into `eval.json`; a run without that is still finished."""
    from rllib_distrl.cli.checkpoints import probe

    try:
        found = probe(algo, session.recipe)
    except (RuntimeError, ValueError) as error:
        warn(session.console, f"No report on the critic: {error}")
        return
    if found:
        session.run.write_eval({**session.run.read_eval(), "critic": found})


def _try_export(algo: Any, run: RunFolder) -> None:
    """Writes the model once before training, and removes it: what the end needs works.

    Raises:
        ValueError: With the reason why it does not.
    """
    from rllib_distrl.algorithm.export import export_policy

    remove_temporaries(run.path)  # of a process that was killed in here
    with TemporaryDirectory(prefix=".tmp-export-", dir=run.path) as folder:
        try:
            export_policy(algo, folder)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"What is trained from this model could not be exported, so training does not "
                f"start: {error}"
            ) from error


def _write_model(algo: Any, session: Session) -> None:
    """Writes the Hugging Face folder, whole or not at all."""
    from rllib_distrl.algorithm.export import export_policy

    with replaced_folder(session.run.model) as folder:
        export_policy(algo, folder)
