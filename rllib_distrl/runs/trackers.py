"""Weights & Biases and MLflow, through Ray's own logger callbacks.

Ray calls these callbacks from Tune. `distrl train` runs without Tune and calls them itself, with
what they read of a trial: its name, identity, settings and folder.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CALLBACKS = {
    "mlflow": "ray.air.integrations.mlflow.MLflowLoggerCallback",
    "wandb": "ray.air.integrations.wandb.WandbLoggerCallback",
}
"""Names of `run.trackers` and Ray's callbacks behind them; the name is the package's, too."""

_UPLOAD_TIMEOUT_S = 600


def check_trackers(trackers: Sequence[Mapping[str, Any]]) -> None:
    """Checks the names, and that their packages are there.

    Args:
        trackers: `{name, ...}` each; what follows the name goes to Ray's callback.

    Raises:
        ValueError: For a tracker without a name, an unknown one, the same one twice, or a missing
            package.
    """
    known = ", ".join(sorted(CALLBACKS))
    names = [tracker.get("name") for tracker in trackers]
    for name in names:
        if not isinstance(name, str) or name not in CALLBACKS:
            raise ValueError(
                f"run.trackers: got the name {name!r}; known are {known}. "
                'Write for example trackers = [{name = "wandb", project = "countdown"}].'
            )
        if names.count(name) > 1:
            raise ValueError(f"run.trackers: {name} stands there {names.count(name)} times.")
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"run.trackers: {name} is not installed. pip install '{name}', or take it out."
            )


def make_callbacks(trackers: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Returns Ray's callbacks, also for `tune.RunConfig(callbacks=...)`.

    Raises:
        ValueError: See `check_trackers`; and for settings that a callback does not take.
    """
    check_trackers(trackers)
    callbacks = []
    for tracker in trackers:
        module, _, attribute = CALLBACKS[tracker["name"]].rpartition(".")
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
