"""`distrl` in real processes that start in a second and join the Ray cluster of the test."""

from __future__ import annotations

from multiprocessing.context import ForkServerProcess
from pathlib import Path

import ray

from rllib_distrl.experiments.comparison import start_distrl


def start(*arguments: str | Path, cwd: Path, output: Path) -> ForkServerProcess:
    """Starts `distrl` with its stdout and stderr appended to a file."""
    address = ray.get_runtime_context().gcs_address
    return start_distrl(arguments, output, folder=cwd, environment={"RAY_ADDRESS": address})


def run(*arguments: str | Path, cwd: Path, output: Path, seconds: float = 120) -> int | None:
    """Runs `distrl` to its end and returns the exit code; None if it takes longer."""
    process = start(*arguments, cwd=cwd, output=output)
    process.join(seconds)
    return process.exitcode
