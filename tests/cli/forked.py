"""`distrl` in real processes that start in a second.

They are forked from a server that has imported everything, and join the Ray cluster of the test.
What runs in them is the command line itself.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import ray

_CONTEXT = multiprocessing.get_context("forkserver")
_IMPORTED = (
    "rllib_distrl.cli.train",
    "rllib_distrl.cli.export",
    "rllib_distrl.cli.training_loop",
    "rllib_distrl.algorithms.distrl",
    "rllib_distrl.algorithms.inspection",
    "rllib_distrl.evaluation.evaluate",
    "rllib_distrl.learners.distrl_learner",
    "torch.utils.tensorboard",
    "transformers.models.qwen2.modeling_qwen2",
)


def start(*arguments: str | Path, cwd: Path, output: Path) -> ForkServerProcess:
    """Starts `distrl` with its stdout and stderr appended to a file."""
    _CONTEXT.set_forkserver_preload(list(_IMPORTED))
    address = ray.get_runtime_context().gcs_address
    process = _CONTEXT.Process(
        target=_run, args=([str(a) for a in arguments], str(cwd), str(output), address)
    )
    process.start()
    return process


def run(*arguments: str | Path, cwd: Path, output: Path, seconds: float = 120) -> int | None:
    """Runs `distrl` to its end and returns the exit code; None if it takes longer."""
    process = start(*arguments, cwd=cwd, output=output)
    process.join(seconds)
    return process.exitcode


def _run(arguments: list[str], cwd: str, output: str, address: str) -> None:
    from rllib_distrl.cli.app import main

    os.chdir(cwd)
    sys.path.insert(0, cwd)  # as `python -m` does
    os.environ["RAY_ADDRESS"] = address
    stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for descriptor in (1, 2):
        os.dup2(stream, descriptor)
    sys.argv = ["distrl", *arguments]
    main()
