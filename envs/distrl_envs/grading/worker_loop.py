"""The process in which a verifier runs, one job at a time, where it can be killed.

`WorkerPool` runs it as a script, `worker_loop.py MODULE memory_bytes alarm_seconds`:
`MODULE.load()` gives what does a job. A job is a line of JSON, `[id, …]`, its reply a line
`[id, result]`. All time limits are the parent's; the alarm only ends a worker whose parent is gone.
It keeps its default action, which the kernel carries out inside C code too.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import traceback
import types
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

OUT_OF_MEMORY = 3
"""Exit status of a worker that ran into its memory limit."""

Job = Callable[..., Any]


def serve(load: Callable[[], Job]) -> None:
    """Serves until EOF under the limits that end the command line.

    Args:
        load: Imports what the job needs; before the memory is limited, so as not to fail of it.
    """
    memory_bytes, alarm_seconds = int(sys.argv[-2]), float(sys.argv[-1])
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    try:
        job = load()
    except Exception:
        replies.write(json.dumps({"error": traceback.format_exc()[-2_000:]}) + "\n")
        return
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    replies.write(json.dumps("ready") + "\n")
    for line in sys.stdin:
        number, *asked = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, alarm_seconds)
        try:
            result = job(*asked)
        except MemoryError:
            os._exit(OUT_OF_MEMORY)
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(json.dumps([number, result]) + "\n")


def _load() -> Job:
    """The module's own `load`, without the environments that the package imports."""
    package = types.ModuleType("distrl_envs")
    package.__path__ = [str(Path(__file__).resolve().parents[1])]
    sys.modules["distrl_envs"] = package
    return import_module(f"distrl_envs.grading.{sys.argv[1]}").load()


if __name__ == "__main__":
    serve(_load)
