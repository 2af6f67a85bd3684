"""A comparison: contenders times seeds at one budget of tokens, a `distrl train` process for each.

Not on Ray Tune, which would lose what these runs have: after a signal, or where this process is
killed, they finish their iteration and write a checkpoint (Tune 2.60 ends at once on SIGTERM, and
leaves an actor 5 s after SIGINT, tune_controller.py:802); later calls may add seeds and recipes
(`Tuner.restore` runs the grid that it was given); each is a run folder on this machine's disk like
any other, wherever its actors are. Each run would also start an actor of Tune's beside its own.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from rllib_distrl.experiments.results import FAILED, Record, finished_record, read_record
from rllib_distrl.files import write_atomic
from rllib_distrl.recipe import (
    Recipe,
    load_recipe,
    locate,
    override_tables,
    read_recipe,
    read_toml,
    recipe_from_tables,
)
from rllib_distrl.recipe_schema import check_names
from rllib_distrl.runs.folder import is_locked, is_run_folder
from rllib_distrl.settings import EvalTable, RolloutSettings, RunSettings

MIN_SEEDS = 2
_NAME = re.compile(r"[\w][\w.+-]*")
_VARIANTS_FILE = ("recipe", "base", "variants")
_ABOUT = ("recipe", "part", "same_task")  # of a variant, beside its settings


@dataclass(frozen=True)
class Contender:
    """One recipe of a comparison.

    Attributes:
        name: Names it in tables, figures and folders.
        recipe: Its settings; seed and budget are the comparison's.
        part: The part of the method that it varies; empty outside of ablations.
        same_task: Its file's word that its environment, where it is another, asks and grades held
            out problems as the others' do: a control that tells learners something else.
    """

    name: str
    recipe: Recipe
    part: str = ""
    same_task: bool = False

    @property
    def digest(self) -> str:
        """See `recipe_digest`."""
        return recipe_digest(self.recipe.to_dict())


def recipe_digest(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """A hash of a recipe's settings but name and seed, 12 hexadecimal digits.

    Settings of our own tables that have their default do not count, so that a setting that a later
    version adds does not make another recipe of it.

    Args:
        tables: Of the resolved recipe, as `Recipe.to_dict` gives them.
    """
    kept = {table: dict(values) for table, values in tables.items()}
    for table, cls in (("run", RunSettings), ("rollout", RolloutSettings), ("eval", EvalTable)):
        defaults = cls.defaults()
        kept[table] = {
            key: value
            for key, value in kept[table].items()
            if key not in ("name", "seed") and value != _as_toml(defaults.get(key))
        }
    text = json.dumps(kept, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def _as_toml(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class Plan:
    """Contenders times seeds.

    Attributes:
        contenders: The first is the baseline.
        seeds: Every contender runs with each of them.
        budget_tokens: Completion tokens that each run generates.
    """

    contenders: tuple[Contender, ...]
    seeds: tuple[int, ...]
    budget_tokens: int

    @property
    def baseline(self) -> Contender:
        """What the others are compared with."""
        return self.contenders[0]

    def jobs(self) -> list[tuple[Contender, int]]:
        """All runs, one seed after the other, so that an unfinished comparison is balanced."""
        return [(contender, seed) for seed in self.seeds for contender in self.contenders]


def make_plan(
    files: Sequence[Path],
    overrides: Sequence[str],
    *,
    seeds: int,
    first_seed: int,
    budget_tokens: int,
) -> Plan:
    """Reads recipes and files of variants, and checks that they can be compared.

    Args:
        files: Recipes; or files with `recipe = "…"`, a table `[base]` of settings for all
            variants, and tables `[variants.NAME]` of settings that replace the recipe's; a variant
            may name a recipe of its own, and promise `same_task` (see `Contender`).
        overrides: `table.key=value` items for all of them.
        seeds: How many.
        first_seed: They are this one and those that follow.
        budget_tokens: Of each run.

    Raises:
        ValueError: For recipes that differ in task, evaluation or budget, or share a name; for
            fewer than 2 seeds or contenders; for anything that `distrl train` would refuse.
    """
    if seeds < MIN_SEEDS:
        raise ValueError(
            f"{seeds} seed(s) give no interval and no paired test. Give --seeds {MIN_SEEDS} or "
            "more; 8 or more before believing a difference."
        )
    if budget_tokens < 1:
        raise ValueError(f"--budget-tokens: wanted at least 1, got {budget_tokens}.")
    found = [contender for file in files for contender in _read(file, overrides)]
    if len(found) < 2:
        raise ValueError("There is nothing to compare with: give at least two recipes.")
    _check_names(found)
    _check_same_task(found)
    _check_budgets(found, budget_tokens)
    contenders = tuple(_with_budget(contender, budget_tokens) for contender in found)
    for contender in contenders:
        try:
            contender.recipe.build_config()
        except ValueError as error:
            raise ValueError(f"{contender.name}: {error}") from error
    return Plan(contenders, tuple(range(first_seed, first_seed + seeds)), budget_tokens)


def _read(file: Path, overrides: Sequence[str]) -> list[Contender]:
    tables = read_toml(file)
    if "variants" in tables or "recipe" in tables:
        return _read_variants(file, tables, overrides)
    recipe = load_recipe(file, overrides)
    return [Contender(recipe.run.name, recipe)]


def _read_variants(
    file: Path, tables: Mapping[str, Any], overrides: Sequence[str]
) -> list[Contender]:
    check_names(f"{file}", tables, _VARIANTS_FILE)
    variants, source = tables.get("variants"), tables.get("recipe")
    if not isinstance(source, str) or not isinstance(variants, Mapping) or not variants:
        raise ValueError(
            f'{file}: a file of variants needs recipe = "FILE.toml" and tables [variants.NAME].'
        )
    contenders = []
    for name, changes in variants.items():
        recipe = read_recipe(file.parent / changes.get("recipe", source))
        part = changes.get("part", "")
        _replace(recipe, tables.get("base", {}), f"{file}: [base]")
        settings = {table: values for table, values in changes.items() if table not in _ABOUT}
        _replace(recipe, settings, f"{file}: [variants.{name}]")
        locate(recipe, file.parent)
        override_tables(recipe, overrides)
        locate(recipe, Path.cwd())
        try:
            resolved = recipe_from_tables(recipe, name)
        except ValueError as error:
            raise ValueError(f"{file}: [variants.{name}]: {error}") from error
        if not isinstance(promise := changes.get("same_task", False), bool):
            raise ValueError(
                f"{file}: [variants.{name}]: same_task is {promise!r}; it must be true or false."
            )
        contenders.append(Contender(name, resolved, part, promise))
    return contenders


def _replace(recipe: dict[str, Any], changes: Mapping[str, Any], where: str) -> None:
    """Puts settings into a recipe's tables in place; a setting is replaced whole."""
    for table, values in changes.items():
        if not isinstance(values, Mapping):
            raise ValueError(f"{where}: {table!r} is not a table. Write TABLE.KEY = VALUE.")
        recipe[table] = {**recipe.get(table, {}), **values}


def _with_budget(contender: Contender, budget_tokens: int) -> Contender:
    changes = {"budget_tokens": budget_tokens, "name": contender.name}
    run = contender.recipe.run.model_copy(update=changes)
    return replace(contender, recipe=replace(contender.recipe, run=run))


def _check_names(contenders: Sequence[Contender]) -> None:
    names = [contender.name for contender in contenders]
    for name in names:
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"{name!r} cannot name a folder. Use letters, digits, '-', '_', '.', '+'."
            )
        if names.count(name) > 1:
            raise ValueError(f"Two recipes are called {name!r}. Give one another run.name.")


def _task(recipe: Recipe) -> dict[str, Any]:
    """What must agree for two numbers to be comparable."""
    evaluation = recipe.to_dict()["eval"]
    kept = ("problems", "n", "split", "temperature", "top_p")
    return {
        "environment.env": recipe.env_id,
        "environment.env_config": recipe.env_config,
        "rollout.max_completion_tokens": recipe.rollout.max_completion_tokens,
        **{f"eval.{key}": evaluation[key] for key in kept},
    }


def _check_same_task(contenders: Sequence[Contender]) -> None:
    first, *others = contenders
    wanted = _task(first.recipe)
    for other in others:
        got = _task(other.recipe)
        for key, value in wanted.items():
            if other.same_task and key == "environment.env_config":
                continue
            if got[key] != value:
                raise ValueError(
                    f"{first.name} and {other.name} cannot be compared: {key} is {value!r} in the "
                    f"first and {got[key]!r} in the second. Give both the same, for example with "
                    f"{key}=... after the recipes."
                )


def _check_budgets(contenders: Sequence[Contender], budget_tokens: int) -> None:
    for contender in contenders:
        own = contender.recipe.run.budget_tokens
        if own not in (0, budget_tokens):
            raise ValueError(
                f"{contender.name} has run.budget_tokens = {own:,}, but all recipes are compared "
                f"at --budget-tokens {budget_tokens:,}. Remove it from the recipe, or compare at "
                f"that budget."
            )


_ERROR_LINES = 12  # of a failed run's output
# Until a run whose comparison was killed has written its checkpoint and let go of its folder.
_UNLOCK_SECONDS, _LOOK_AGAIN_SECONDS = 60.0, 0.2
# What a process may take for a checkpoint once the one that started it is gone.
_GRACE_SECONDS = 30.0
# What `distrl train` measures beside and no table of a comparison shows.
_NOT_COMPARED = ("eval.before=false", "eval.token_problems=0", "eval.critic_prefixes=0")
# A process starts in a moment, because it is forked after these.
_CONTEXT = multiprocessing.get_context("forkserver")
_IMPORTED = (
    "rllib_distrl.cli.app",
    "rllib_distrl.cli.train",
    "rllib_distrl.algorithm.registry",
    "rllib_distrl.algorithm.distrl",
    "rllib_distrl.algorithm.inspection",
    "rllib_distrl.evaluation.evaluate",
    "rllib_distrl.learner.distrl_learner",
    "torch.utils.tensorboard",
    "transformers.models.qwen2.modeling_qwen2",
)


@dataclass(frozen=True)
class _Running:
    """A run in progress."""

    contender: Contender
    seed: int
    process: ForkServerProcess
    log: Path
    started: float


class Comparison:
    """The folder of a comparison.

    Attributes:
        plan: What is run.
        folder: `recipes/NAME.toml`, `runs/NAME-seedS/` (a run folder each), `runs/NAME-seedS.json`
            (its record) and `logs/NAME-seedS.log`.
    """

    def __init__(self, plan: Plan, folder: Path) -> None:
        """Opens a folder for a plan.

        Raises:
            ValueError: If it holds runs of other settings under the same names.
        """
        self.plan = plan
        self.folder = folder
        for contender, seed in plan.jobs():
            found = self._record(contender, seed)
            if found is not None and found.finished and found.digest != contender.digest:
                raise ValueError(
                    f"{self.record_file(contender, seed)} was made with other settings or another "
                    f"budget than {contender.name} has now. Name another folder with --out, or "
                    "delete the file and its run folder."
                )

    def record_file(self, contender: Contender, seed: int) -> Path:
        """Where the record of a run is."""
        return self.folder / "runs" / f"{contender.name}-seed{seed}.json"

    def records(self) -> list[Record]:
        """The records of the plan's runs that are there, failed ones included."""
        found = (self._record(*job) for job in self.plan.jobs())
        return [record for record in found if record is not None]

    def run(self, jobs: int, report: Callable[[Record], None]) -> None:
        """Runs what is missing or failed; a failed run does not stop the others.

        Args:
            jobs: Processes at once.
            report: Called with every record when it is written.

        Raises:
            KeyboardInterrupt: After a signal, once the runs in progress have checkpointed.
        """
        waiting = [job for job in self.plan.jobs() if not self._finished(*job)]
        running: list[_Running] = []
        with _signals_raise():
            try:
                while waiting or running:
                    while waiting and len(running) < jobs:
                        running.append(self._start(*waiting.pop(0)))
                    ended = connection.wait([one.process.sentinel for one in running])
                    for one in [one for one in running if one.process.sentinel in ended]:
                        running.remove(one)
                        report(self._finish(one))
            except KeyboardInterrupt:
                _stop([one.process for one in running])
                raise

    def _finished(self, contender: Contender, seed: int) -> bool:
        found = self._record(contender, seed)
        return found is not None and found.finished

    def _record(self, contender: Contender, seed: int) -> Record | None:
        file = self.record_file(contender, seed)
        return read_record(file) if file.is_file() else None

    def _start(self, contender: Contender, seed: int) -> _Running:
        recipe = self.folder / "recipes" / f"{contender.name}.toml"
        run = self.record_file(contender, seed).with_suffix("")
        log = self.folder / "logs" / f"{run.name}.log"
        for path in (run, log):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(recipe, contender.recipe.to_toml())
        _wait_until_free(run)
        started = time.monotonic()
        command = ["train", recipe, f"run.seed={seed}", *_NOT_COMPARED, "--out", run]
        command += ["--resume"] if is_run_folder(run) else []
        return _Running(contender, seed, start_distrl(command, log), log, started)

    def _finish(self, one: _Running) -> Record:
        """Reads what became of a process and writes its record."""
        seconds = time.monotonic() - one.started
        contender, seed = one.contender, one.seed
        file, budget = self.record_file(contender, seed), self.plan.budget_tokens
        begun = Record(
            contender.name, contender.part, seed, contender.digest, budget, FAILED,
            wall_seconds=seconds,
        )  # fmt: skip
        one.process.join()
        try:
            if code := one.process.exitcode:
                raise ValueError(f"exit code {code}: {_last_lines(one.log)}")
            record = finished_record(begun, file.with_suffix(""))
        except (ValueError, OSError) as error:
            record = replace(begun, error=str(error))
        record.write(file)
        return record


def start_distrl(
    arguments: Sequence[str | Path],
    output: Path,
    *,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> ForkServerProcess:
    """Starts the command line in a session of its own.

    Where this process is killed, it ends as after SIGTERM: with a checkpoint.

    Args:
        arguments: Of `distrl`.
        output: A file to which stdout and stderr are appended.
        folder: To work in; this process's if None.
        environment: Variables on top of this process's.

    Returns:
        The process; `exitcode` is None until it ends.
    """
    _CONTEXT.set_forkserver_preload(list(_IMPORTED))
    command = [str(argument) for argument in arguments]
    place = str(folder or Path.cwd())
    process = _CONTEXT.Process(
        target=_distrl, args=(command, str(output), place, dict(environment or {}))
    )
    process.start()
    return process


def _distrl(arguments: list[str], output: str, folder: str, environment: Mapping[str, str]) -> None:
    os.setsid()
    stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for descriptor in (1, 2):
        os.dup2(stream, descriptor)
    os.close(stream)
    os.environ.update(environment)
    os.chdir(folder)
    sys.path.insert(0, folder)  # as `python -m` does
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.argv = ["distrl", *arguments]
    runpy.run_module("rllib_distrl.cli", run_name="__main__")


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def _wait_until_free(run: Path) -> None:
    """Waits for another process to leave a run folder; one that stays is the run's error."""
    give_up = time.monotonic() + _UNLOCK_SECONDS
    while run.is_dir() and is_locked(run) and time.monotonic() < give_up:
        time.sleep(_LOOK_AGAIN_SECONDS)


def _last_lines(log: Path) -> str:
    """The last error that the command line printed, or what a traceback ends with."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    said = [number for number, line in enumerate(lines) if line.startswith("error:")]
    start = said[-1] if said else -1  # the end of a traceback
    return "\n".join(lines[start:][:_ERROR_LINES])


def _stop(running: Sequence[ForkServerProcess]) -> None:
    """Asks runs to finish their iteration and checkpoint, and waits for them."""
    for process in running:
        process.terminate()  # what runs in the background may ignore SIGINT
    for process in running:
        process.join()


@contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGTERM and SIGHUP are as Ctrl-C, unless they are ignored, as under `nohup`."""

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    asked = (signal.SIGTERM, signal.SIGHUP)
    heard = [signum for signum in asked if signal.getsignal(signum) != signal.SIG_IGN]
    previous = {signum: signal.signal(signum, interrupt) for signum in heard}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
