"""Running a comparison: every run is a `distrl train` process, resumable one by one.

Not on Ray Tune, which would lose what these runs have: after a signal, or where this process is
killed, they finish their iteration and write a checkpoint (Tune 2.60 ends at once on SIGTERM, and
leaves an actor 5 s after SIGINT, tune_controller.py:802); later calls may add seeds and recipes
(`Tuner.restore` runs the grid that it was given); each is a run folder on this machine's disk like
any other, wherever its actors are.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from rllib_distrl.experiments.plan import Contender, Plan
from rllib_distrl.experiments.record import Record, failed_record, finished_record, read_record
from rllib_distrl.files import write_atomic
from rllib_distrl.runs.folder import is_locked, is_run_folder

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
        file = self.record_file(one.contender, one.seed)
        one.process.join()
        try:
            if code := one.process.exitcode:
                raise ValueError(f"exit code {code}: {_last_lines(one.log)}")
            record = finished_record(
                one.contender, one.seed, file.with_suffix(""), wall_seconds=seconds
            )
        except (ValueError, OSError) as error:
            record = failed_record(one.contender, one.seed, str(error), wall_seconds=seconds)
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
