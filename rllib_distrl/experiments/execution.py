"""Running a plan: every run is a `distrl train` process, resumable one by one."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from rllib_distrl.experiments.plan import Contender, Plan
from rllib_distrl.experiments.processes import start_distrl
from rllib_distrl.experiments.record import Record, failed_record, finished_record, read_record
from rllib_distrl.files import write_atomic
from rllib_distrl.runs.folder import is_locked, is_run_folder

_POLL_SECONDS = 0.2
_ERROR_LINES = 12  # of a failed run's output
# Until a run whose comparison was killed has written its checkpoint and let go of its folder.
_UNLOCK_SECONDS = 60.0
# What `distrl train` measures beside and no table of a comparison shows.
_NOT_COMPARED = ("eval.before=false", "eval.token_problems=0", "eval.critic_prefixes=0")

Report = Callable[[Record], None]


@dataclass
class _Process:
    """A run in progress."""

    contender: Contender
    seed: int
    process: ForkServerProcess
    log: Path
    started: float


class Execution:
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
        self._check_same()

    def record_file(self, contender: Contender, seed: int) -> Path:
        """Where the record of a run is."""
        return self.folder / "runs" / f"{contender.name}-seed{seed}.json"

    def records(self) -> list[Record]:
        """The records of the plan's runs that are there, failed ones included."""
        files = [self.record_file(*job) for job in self.plan.jobs()]
        return [read_record(file) for file in files if file.is_file()]

    def run(self, jobs: int, report: Report) -> None:
        """Runs what is missing or failed; a failed run does not stop the others.

        Args:
            jobs: Processes at once.
            report: Called with every record when it is written.

        Raises:
            KeyboardInterrupt: After a signal, once the runs in progress have checkpointed.
        """
        waiting = [job for job in self.plan.jobs() if not self._done(*job)]
        running: list[_Process] = []
        asked = (signal.SIGTERM, signal.SIGHUP)
        previous = {n: signal.signal(n, _raise_interrupt) for n in asked if _is_heard(n)}
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    running.append(self._start(*waiting.pop(0)))
                time.sleep(_POLL_SECONDS)
                for process in [p for p in running if p.process.exitcode is not None]:
                    running.remove(process)
                    report(self._finish(process))
        except KeyboardInterrupt:
            _stop(running)
            raise
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)

    def _done(self, contender: Contender, seed: int) -> bool:
        file = self.record_file(contender, seed)
        return file.is_file() and read_record(file).finished

    def _check_same(self) -> None:
        for contender, seed in self.plan.jobs():
            file = self.record_file(contender, seed)
            if file.is_file():
                found = read_record(file)
                if found.finished and found.digest != contender.digest:
                    raise ValueError(
                        f"{file} was made with other settings or another budget than "
                        f"{contender.name} has now. Name another folder with --out, or delete "
                        "the file and its run folder."
                    )

    def _start(self, contender: Contender, seed: int) -> _Process:
        recipe = self.folder / "recipes" / f"{contender.name}.toml"
        run = self.record_file(contender, seed).with_suffix("")
        log = self.folder / "logs" / f"{run.name}.log"
        for path in (recipe, run, log):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(recipe, contender.recipe.to_toml())
        _wait_until_free(run)
        started = time.monotonic()
        command = ["train", recipe, f"run.seed={seed}", *_NOT_COMPARED, "--out", run]
        command += ["--resume"] if is_run_folder(run) else []
        return _Process(contender, seed, start_distrl(command, log), log, started)

    def _finish(self, process: _Process) -> Record:
        """Reads what became of a process and writes its record."""
        contender, seed = process.contender, process.seed
        seconds = time.monotonic() - process.started
        file = self.record_file(contender, seed)
        try:
            if code := process.process.exitcode:
                raise ValueError(f"exit code {code}: {_last_lines(process.log)}")
            record = finished_record(contender, seed, file.with_suffix(""), wall_seconds=seconds)
        except (ValueError, OSError) as error:
            record = failed_record(contender, seed, str(error), wall_seconds=seconds)
        record.write(file)
        return record


def _wait_until_free(run: Path) -> None:
    """Waits for another process to leave a run folder; one that stays is the run's error."""
    give_up = time.monotonic() + _UNLOCK_SECONDS
    while run.is_dir() and is_locked(run) and time.monotonic() < give_up:
        time.sleep(_POLL_SECONDS)


def _last_lines(log: Path) -> str:
    """The last error that the command line printed, or what a traceback ends with."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    said = [number for number, line in enumerate(lines) if line.startswith("error:")]
    start = said[-1] if said else -1  # the end of a traceback
    return "\n".join(lines[start:][:_ERROR_LINES])


def _stop(running: list[_Process]) -> None:
    """Asks runs to finish their iteration and checkpoint, and waits for them."""
    for process in running:
        if process.process.exitcode is None:
            process.process.terminate()  # what runs in the background may ignore SIGINT
    for process in running:
        process.process.join()


def _is_heard(signum: int) -> bool:
    """Whether a signal is not ignored, as `nohup` does with SIGHUP."""
    return signal.getsignal(signum) != signal.SIG_IGN


def _raise_interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt
