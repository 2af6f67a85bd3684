"""`distrl` in processes that start in a moment, because they are forked after the imports."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing import connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path

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
# What a process may take for a checkpoint once the one that started it is gone.
_GRACE_SECONDS = 30.0


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
    process = _CONTEXT.Process(
        target=_distrl,
        args=(
            [str(argument) for argument in arguments],
            str(output),
            str(folder or Path.cwd()),
            dict(environment or {}),
        ),
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
