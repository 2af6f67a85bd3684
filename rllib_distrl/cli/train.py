"""`distrl train`: measure, train with checkpoints, export, measure again."""

from __future__ import annotations

import contextlib
import shlex
import sys
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from rllib_distrl.cli.checks import check_problems, check_room, naming_a_full_disk
from rllib_distrl.cli.display import warn
from rllib_distrl.cli.errors import Interrupted
from rllib_distrl.cli.explain import check_memory, said_of_micro_batches, said_of_weights
from rllib_distrl.cli.interrupts import Interrupts
from rllib_distrl.cli.measure import measure
from rllib_distrl.cli.ray_session import check_address, silence_libraries
from rllib_distrl.cli.results import in_one_line, print_before_after
from rllib_distrl.cli.training_session import Session, train_and_export
from rllib_distrl.experiments.training import RunLength, TrainingCheckpoints
from rllib_distrl.recipe import Recipe, load_recipe
from rllib_distrl.runs.checkpoints import list_checkpoints
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
from rllib_distrl.runs.log import connect_trackers, read_progress
from rllib_distrl.runs.storage import RunStorage, storage_of

_FINISHING = (
    "Finishing what cannot be left (in training: this iteration), then a checkpoint. "
    "Ctrl-C again stops at once."
)


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
        with naming_a_full_disk(run):
            checkpoints.copy()
            _train(session)
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


def _train(session: Session) -> None:
    recipe, run, console = session.recipe, session.run, session.console
    if damaged := run.set_damaged_eval_aside():
        warn(console, damaged)
    results = run.read_eval()
    _print_header(session)
    session.interrupts.check()
    if not results and recipe.eval.before:
        results = _measured(session, "before", {})
    if train_and_export(session) or not results.get("after"):
        session.interrupts.check()
        results = _measured(session, "after", run.read_eval())
    print_before_after(console, results)
    _print(console, f"Model: {run.model}")


def _measured(session: Session, when: str, results: dict[str, Any]) -> dict[str, Any]:
    """Evaluates "before" or "after" training and writes it into `eval.json`."""
    recipe, run, console = session.recipe, session.run, session.console
    model = recipe.run.model if when == "before" else run.model
    samples = run.samples / f"{when}.parquet"
    label = f"Evaluating {when} training"
    measured = measure(
        recipe, model, label, console, samples=samples, interrupts=session.interrupts
    )
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
