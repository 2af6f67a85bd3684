"""`distrl train`: measure, train with checkpoints, export, measure again."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from rich.console import Console

from rllib_distrl.cli.display import (
    EvaluationProgress,
    Progress,
    in_one_line,
    print_before_after,
    training_display,
    warn,
)
from rllib_distrl.cli.explain import (
    check_memory,
    check_problems,
    check_room,
    said_of_micro_batches,
    said_of_weights,
)
from rllib_distrl.cli.scale import take_scale_request
from rllib_distrl.cli.session import (
    Interrupted,
    Interrupts,
    check_address,
    hide_loading_bars,
    naming_a_full_disk,
    ray_session,
    silence_libraries,
)
from rllib_distrl.experiments.training import Row, RunLength, Training, TrainingCheckpoints
from rllib_distrl.files import remove_temporaries, replaced_folder
from rllib_distrl.recipe import Recipe, load_recipe
from rllib_distrl.runs.checkpoints import TrainingStopped, checkpoint_iteration, list_checkpoints
from rllib_distrl.runs.folder import (
    RunFolder,
    check_free,
    check_same_recipe,
    create_run,
    discard_run,
    is_run_folder,
    locked,
    open_run,
    resume_run,
)
from rllib_distrl.runs.log import RunLog, Trackers, connect_trackers, read_progress, tracked_run
from rllib_distrl.runs.storage import RunStorage, storage_of

if TYPE_CHECKING:
    from rllib_distrl.evaluation.result import EvalResult

_FINISHING = (
    "Finishing what cannot be left (in training: this iteration), then a checkpoint. "
    "Ctrl-C again stops at once."
)
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


def run_train(
    source: Path, overrides: Sequence[str], *, out: Path | None, resume: bool, overwrite: bool
) -> None:
    """Runs the command.

    Args:
        source: A recipe, or with `resume` a run folder.
        overrides: `table.key=value` items.
        out: The run folder; by default runs/NAME-seedSEED.
        resume: Continue the run in the folder.
        overwrite: Delete the run in the folder first.

    Raises:
        ValueError: For bad input, before anything is started or deleted.
        Interrupted: After Ctrl-C, SIGTERM or SIGHUP, with a checkpoint written.
    """
    silence_libraries()
    console = Console()
    with Interrupts(_FINISHING) as interrupts:
        recipe, path, problems = _check(source, overrides, out, resume, overwrite, console)
        again = f"distrl train {shlex.quote(str(path))} --resume"
        with locked(path):
            interrupts.check()
            run, storage = RunFolder(path), storage_of(recipe, path)
            checkpoints = TrainingCheckpoints(recipe, run, storage, partial(warn, console))
            newest = _newest(checkpoints) if resume else None
            if resume:
                resume_run(path, recipe, sys.argv)
            else:
                if overwrite and storage is not None:
                    storage.delete()
                create_run(path, recipe, sys.argv, overwrite=overwrite)
            interrupts.last_words = f"Stopped at once, as by a kill. Resume with: {again}"
            try:
                _run(Session(checkpoints, interrupts, console, newest, problems))
            except Interrupted:
                _print(console, f"Stopped. Resume with: {again}")
                raise


def _run(session: Session) -> None:
    """Does the work; what ends it is written down, and a run that never began leaves nothing."""
    run, checkpoints = session.run, session.checkpoints
    try:
        with naming_a_full_disk(run.path):
            checkpoints.copy()
            _measure_and_train(session)
            checkpoints.copy()
    except Exception as error:
        if isinstance(error, ValueError) and not (run.eval_file.exists() or run.has_progress):
            # Bad input that only the loading of the model has shown.
            discard_run(run)
            if checkpoints.storage is not None:
                checkpoints.storage.delete()
        else:
            with contextlib.suppress(OSError):  # no room for it
                run.error_file.write_text(traceback.format_exc(), encoding="utf-8")
                _print(session.console, f"Traceback: {run.error_file}")
        raise


def _check(
    source: Path,
    overrides: Sequence[str],
    out: Path | None,
    resume: bool,
    overwrite: bool,
    console: Console,
) -> tuple[Recipe, Path, list[str]]:
    """Returns the recipe, the run folder and what to say of the problems, once all is well."""
    if resume and overwrite:
        raise ValueError("--resume continues a run and --overwrite deletes it: give one of them.")
    recipe, path = _locate(source, overrides, out, resume)
    storage = storage_of(recipe, path)
    if resume:
        check_same_recipe(_run_to_resume(recipe, path, storage, console), recipe)
    else:
        check_free(path, overwrite=overwrite)
        if storage is not None and not overwrite:
            storage.check_free()
    config = recipe.build_config()
    from rllib_distrl.model.loading import resolve

    check_memory(recipe, config)
    check_room(recipe, config, RunFolder(path))
    check_address()
    connect_trackers(recipe.run.trackers)
    problems = [*check_problems(recipe, config), *said_of_weights(recipe, config)]
    if micro_batches := said_of_micro_batches(recipe, config):
        problems.append(f"Micro-batches have {micro_batches}.")
    resolve(recipe.run.model)  # builds a built-in one, or says that its cache cannot be written to
    return recipe, path, problems


def _locate(
    source: Path, overrides: Sequence[str], out: Path | None, resume: bool
) -> tuple[Recipe, Path]:
    """Returns the recipe and the run folder."""
    if not is_run_folder(source):
        recipe = load_recipe(source, overrides)
        return recipe, out or Path("runs") / f"{recipe.run.name}-seed{recipe.run.seed}"
    if not resume:
        raise ValueError(f"{source} is a run folder. Add --resume to continue it.")
    if out is not None and out.resolve() != source.resolve():
        raise ValueError(f"--resume continues {source} in its own folder. Leave --out out.")
    return load_recipe(RunFolder(source).recipe_file, overrides), source


def _run_to_resume(
    recipe: Recipe, path: Path, storage: RunStorage | None, console: Console
) -> RunFolder:
    """Opens the run; makes its folder anew from the copy where it is gone."""
    if is_run_folder(path):
        if storage is not None:
            storage.check_not_ahead(RunFolder(path))
        return open_run(path)
    if storage is None or not storage.holds_run():
        place = f" nor in {storage.uri}" if storage is not None else ""
        raise ValueError(f"There is no run to resume in {path}{place}. Start it without --resume.")
    check_free(path)
    _print(console, f"Fetching {storage.uri}")
    mode = recipe.run.checkpoint_mode
    storage.download(path, mode=mode, report=lambda text: warn(console, text))
    return open_run(path)


def _newest(checkpoints: TrainingCheckpoints) -> Path | None:
    """The checkpoint to go on from; None where the run has not got to its first one.

    Raises:
        ValueError: If the log holds iterations and no checkpoint is good: going on would do them
            all again.
    """
    run, newest = checkpoints.run, checkpoints.latest()
    rows = read_progress(run.progress_file)
    # The first iteration writes the first checkpoint, so one alone is what was being done.
    begun = len(rows) > 1 or (rows and list_checkpoints(run.checkpoints))
    if newest is None and begun:
        copy = ""
        if checkpoints.storage is not None:
            copy = (
                f" {checkpoints.storage.uri} may hold a good one: move this folder away and resume."
            )
        raise ValueError(
            f"{run.path} holds a log of {len(rows)} iterations and no good checkpoint: --resume "
            f"would start at iteration 1 and write over it.{copy} To start over, deleting the run: "
            f"distrl train {shlex.quote(str(run.recipe_file))} --out {shlex.quote(str(run.path))} "
            "--overwrite. To keep it, name another folder with --out."
        )
    return newest


def _measure_and_train(session: Session) -> None:
    recipe, run, console = session.recipe, session.run, session.console
    if damaged := run.set_damaged_eval_aside():
        warn(console, damaged)
    results = run.read_eval()
    _print_header(session)
    session.interrupts.check()
    if not results and recipe.eval.before:
        results = _measured(session, "before", {})
    if _train_and_export(session) or not results.get("after"):
        session.interrupts.check()
        results = _measured(session, "after", run.read_eval())
    print_before_after(console, results)
    _print(console, f"Model: {run.model}")


def _measured(session: Session, when: str, results: dict[str, Any]) -> dict[str, Any]:
    """Evaluates "before" or "after" training and writes it into `eval.json`."""
    recipe, run, console = session.recipe, session.run, session.console
    measured = _evaluated(session, when)
    low, high = measured.scores
    earlier = results.get("scores", [low, high])
    summary = measured.summary()
    results = {
        "before": None,
        "after": None,
        **results,
        when: summary,
        "problems": measured.problems,
        "samples": measured.samples,
        "split": recipe.eval.split,
        "scores": [min(low, earlier[0]), max(high, earlier[-1])],
    }
    run.write_eval(results)
    line = f"{when.capitalize()} training: {in_one_line(summary, measured.scores)}"
    _print(console, line)
    return results


def _evaluated(session: Session, when: str) -> EvalResult:
    """Evaluates as `[eval]` says; an evaluation that was interrupted continues where it stopped."""
    from rllib_distrl.evaluation.data import recipe_data
    from rllib_distrl.evaluation.evaluate import evaluate_model

    hide_loading_bars()
    recipe, run = session.recipe, session.run
    model = recipe.run.model if when == "before" else run.model
    run.samples.mkdir(parents=True, exist_ok=True)
    unfinished = run.samples / f".{when}-unfinished"
    data = recipe_data(recipe)
    label = f"Evaluating {when} training"
    with EvaluationProgress(session.console, label, session.interrupts) as report:
        result = evaluate_model(
            str(model),
            data.env_id,
            data.env_config,
            data.settings,
            out=unfinished,
            on_progress=report,
            overwrite=True,
        )
    result.to_parquet(run.samples / f"{when}.parquet")
    shutil.rmtree(unfinished)
    return result


def _print_header(session: Session) -> None:
    recipe, console = session.recipe, session.console
    _print(
        console,
        f"{recipe.run.algorithm} on {recipe.env_id} with {recipe.run.model}: "
        f"{RunLength.of(recipe.run)} of {recipe.rollout.prompts_per_iteration} prompts x "
        f"{recipe.rollout.num_generations} completions, seed {recipe.run.seed}",
    )
    for line in session.problems:
        _print(console, line)
    _print(console, f"Run folder: {session.run.path}")


def _print(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _train_and_export(session: Session) -> bool:
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
