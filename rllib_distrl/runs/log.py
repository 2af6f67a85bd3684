"""The record of a run: `progress.jsonl`, a line per iteration, and the same for TensorBoard.

And what `meta.json` says of the software that made it. Trackers, Weights & Biases and MLflow, get
the lines through Ray's own logger callbacks. Ray calls these from Tune. `distrl train` runs without
Tune and calls them itself, with what they read of a trial: its name, identity, settings and folder.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib
import importlib.metadata
import json
import math
import os
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from rllib_distrl.files import write_atomic
from rllib_distrl.settings import TRACKERS, RunSettings

# The pools of each problem of a validation: in the log alone, they are no metric.
VALIDATED_PROBLEMS = "evaluation/problems"
_NOT_METRICS = frozenset({"config", "hist_stats"})
# Numbered metrics that TensorBoard gets as one histogram: equally likely points of the quantiles
# of all tokens, and shares of returns in equal bins of [0, 1].
_POINTS, _SHARES = "quantile_atoms", "quantile_pit"
_HISTOGRAM = re.compile(rf"(?P<name>(.*/)?({_POINTS}|{_SHARES}))_(?P<number>\d+)")
_SAMPLES_PER_POINT = 10
_BINS = 30
_LARGEST, _LARGEST_SCALAR = float(np.finfo(np.float64).max), float(np.finfo(np.float32).max)
# Where RLlib reports the tokens of all completions of a run; the first key found counts.
_TOKENS = ("num_env_steps_sampled_lifetime", "env_runners/num_env_steps_sampled_lifetime")


def flatten_result(result: Mapping[str, Any]) -> dict[str, float | int | bool | None]:
    """Reduces RLlib's nested result to scalars under '/'-joined keys.

    Keeps numbers, booleans and one-element arrays or tensors; NaN and infinities become None,
    which JSON can hold. Leaves out everything else, and the configuration.
    """
    return dict(_scalars(result, ""))


class RunLog:
    """Writes a run's metrics, one iteration at a time."""

    def __init__(self, progress: Path, tensorboard: Path, *, last_iteration: int = 0) -> None:
        """Opens the logs and drops what they hold of later iterations.

        Args:
            progress: The `progress.jsonl` to append to.
            tensorboard: The folder of TensorBoard's event files.
            last_iteration: The iteration that training continues from; 0 for a new run.
        """
        from torch.utils.tensorboard import SummaryWriter

        truncate_progress(progress, last_iteration)
        self._stream: IO[str] = progress.open("a", encoding="utf-8")
        purge = last_iteration + 1 if last_iteration else None
        self._writer = SummaryWriter(str(tensorboard), purge_step=purge)

    def write(self, iteration: int, result: Mapping[str, Any]) -> dict[str, Any]:
        """Records one iteration and returns its metrics."""
        row = {"iteration": iteration, **flatten_result(result)}
        table, _, name = VALIDATED_PROBLEMS.partition("/")
        problems = result.get(table, {}).get(name)
        kept = {**row, VALIDATED_PROBLEMS: problems} if problems else row
        self._stream.write(json.dumps(kept, allow_nan=False) + "\n")
        self._stream.flush()
        histograms: dict[str, dict[int, float]] = defaultdict(dict)
        for key, value in row.items():
            if value is None or key == "iteration":
                continue
            if match := _HISTOGRAM.fullmatch(key):
                histograms[match["name"]][int(match["number"])] = float(value)
            else:
                # TensorBoard keeps scalars in single precision.
                shown = min(max(float(value), -_LARGEST_SCALAR), _LARGEST_SCALAR)
                self._writer.add_scalar(key, shown, iteration)
        for name, numbered in histograms.items():
            self._add_histogram(name, [numbered[i] for i in sorted(numbered)], iteration)
        self._writer.flush()
        return row

    def _add_histogram(self, name: str, values: Sequence[float], iteration: int) -> None:
        if name.endswith(_POINTS):
            places = np.linspace(0, len(values) - 1, _SAMPLES_PER_POINT * len(values))
            between = np.interp(places, np.arange(len(values)), values)
            self._writer.add_histogram_raw(name, **_binned(between), global_step=iteration)
            return
        limits = np.arange(1, len(values) + 1) / len(values)
        middles = limits - 0.5 / len(values)
        self._writer.add_histogram_raw(
            name,
            min=0.0,
            max=1.0,
            num=sum(values),
            sum=float(np.dot(values, middles)),
            sum_squares=float(np.dot(values, middles**2)),
            bucket_limits=limits.tolist(),
            bucket_counts=list(values),
            global_step=iteration,
        )

    def sync(self) -> None:
        """Returns when `progress.jsonl` is on disk."""
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Flushes and closes both logs."""
        self._stream.close()
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def tokens_generated(row: Mapping[str, Any]) -> float | None:
    """Completion tokens that a run had generated by an iteration, dropped ones included.

    Args:
        row: What `RunLog.write` recorded of the iteration.

    Returns:
        None where the iteration did not report it, as the first ones of APPO and IMPALA do not.
    """
    return next((row[key] for key in _TOKENS if row.get(key) is not None), None)


def read_progress(path: Path) -> list[dict[str, Any]]:
    """Reads `progress.jsonl`, passing over a last line that was cut short."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break  # only the line being written when the machine stopped can be incomplete
    return rows


def truncate_progress(path: Path, last_iteration: int) -> None:
    """Drops the lines after `last_iteration`, so that each iteration is recorded once."""
    rows = read_progress(path)
    kept = [row for row in rows if row["iteration"] <= last_iteration]
    text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in kept)
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    write_atomic(path, text)


def _binned(values: np.ndarray) -> dict[str, Any]:
    """A histogram as `add_histogram_raw` takes it, over bins between the least and the greatest.

    TensorBoard's own bins end at 1e20, and it fails where all values lie beyond.
    """
    scale = max(float(np.abs(values).max()), 1.0)  # so that no difference overflows
    counts, edges = np.histogram(values / scale, bins=_BINS)
    with np.errstate(over="ignore"):
        limits = np.clip(edges[1:] * scale, -_LARGEST, _LARGEST)
        squares = min(float(np.square(values).sum()), _LARGEST)
    return {
        "min": float(values.min()),
        "max": float(values.max()),
        "num": len(values),
        "sum": float(values.sum()),
        "sum_squares": squares,
        "bucket_limits": limits.tolist(),
        "bucket_counts": counts.tolist(),
    }


def _scalars(node: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        name = f"{prefix}{key}"
        if key in _NOT_METRICS:
            continue
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{name}/")
        elif (number := _number(value)) is not None:
            yield name, None if isinstance(number, float) and not math.isfinite(number) else number


def _number(value: Any) -> float | int | bool | None:
    """The value as a Python number; None where it is not one."""
    if not isinstance(value, (bool, int, float)) and getattr(value, "size", None) is not None:
        size = value.numel() if hasattr(value, "numel") else value.size
        value = value.item() if size == 1 else None
    return value if isinstance(value, (bool, int, float)) else None


_PACKAGES = ("rllib-distrl", "ray", "torch", "transformers", "gymnasium", "numpy")


def session(command: Sequence[str]) -> dict[str, Any]:
    """Says when and by which command line a session of a run started."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"started": now, "command": list(command)}


def versions() -> dict[str, str]:
    """Returns the installed versions of what decides a run's numbers."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit() -> str | None:
    """Returns the commit of the source tree, "+changes" where it is edited; None outside of git."""
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+changes" if commit and changed else commit


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


_UPLOAD_TIMEOUT_S = 600


def make_callbacks(trackers: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Returns Ray's callbacks, also for `tune.RunConfig(callbacks=...)`.

    Raises:
        ValueError: See `RunSettings`; and for settings that a callback does not take.
    """
    RunSettings(trackers=tuple(map(dict, trackers))).check_machine()
    callbacks = []
    for tracker in trackers:
        module, _, attribute = TRACKERS[tracker["name"]].rpartition(".")
        settings = {key: value for key, value in tracker.items() if key != "name"}
        try:
            callbacks.append(getattr(importlib.import_module(module), attribute)(**settings))
        except TypeError as error:
            raise ValueError(f"run.trackers: {tracker['name']} refuses: {error}.") from None
    return callbacks


def connect_trackers(trackers: Sequence[Mapping[str, Any]]) -> None:
    """Connects once, to find a missing key, project or server before a run starts.

    Raises:
        ValueError: See `make_callbacks`; and what the callback says of the connection.
    """
    for callback in make_callbacks(trackers):
        callback.setup()


@dataclass(frozen=True, eq=False)
class TrackedRun:
    """What Ray's callbacks read of a trial.

    Attributes:
        trial_id: Stays the same when a run is resumed.
        name: The name under which the run is shown.
        experiment_dir_name: The group of runs that it is shown in.
        local_path: The run folder.
        config: The recipe.
    """

    trial_id: str
    name: str
    experiment_dir_name: str
    local_path: str
    config: Mapping[str, Any]

    def __str__(self) -> str:
        return self.name


class Trackers:
    """The trackers of one run."""

    def __init__(self, trackers: Sequence[Mapping[str, Any]], run: TrackedRun) -> None:
        """Opens them. Ray must be running: the callback of W&B logs from an actor.

        Raises:
            ValueError: For settings that a tracker does not take, a missing key or project.
        """
        given = [dict(tracker) for tracker in trackers]
        for tracker in given:
            if tracker.get("name") == "wandb":
                # A resumed run goes on where it was, and its files stay with the run.
                tracker.update({"resume": "allow", "dir": run.local_path} | tracker)
        self._run = run
        self._callbacks = make_callbacks(given)
        for callback in self._callbacks:
            callback.setup()
            callback.log_trial_start(run)

    def write(self, row: Mapping[str, Any]) -> None:
        """Logs the metrics of one iteration: a line of `progress.jsonl`."""
        iteration = row["iteration"]
        metrics = {key: value for key, value in row.items() if value is not None}
        for callback in self._callbacks:
            callback.log_trial_result(iteration, self._run, metrics)

    def close(self, *, failed: bool) -> list[str]:
        """Ends the run, waits for uploads, and returns what went wrong with them."""
        import ray
        from ray.exceptions import RayError

        problems = []
        for callback in self._callbacks:
            # Ray 2.60 waits for the actor of W&B and never looks at its result.
            uploads = list(getattr(callback, "_trial_logging_futures", {}).values())
            callback.log_trial_end(self._run, failed=failed)
            for upload in uploads:
                try:
                    ray.get(upload, timeout=_UPLOAD_TIMEOUT_S)
                except RayError as error:
                    last = str(error).strip().splitlines()[-1]
                    problems.append(f"{type(callback).__name__}: {last}")
            callback.on_experiment_end([self._run])
        return problems


def tracked_run(path: Path, started: str, settings: Mapping[str, Any]) -> TrackedRun:
    """Describes a run folder to the trackers.

    Args:
        path: The run folder.
        started: When the run began, from `meta.json`: a run that replaces it is another one.
        settings: The resolved recipe.
    """
    path = path.resolve()
    identity = hashlib.sha256(f"{path} {started}".encode()).hexdigest()[:12]
    return TrackedRun(identity, path.name, path.parent.name, str(path), settings)
