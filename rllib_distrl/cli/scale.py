"""`distrl scale`: changes the number of env runners of a job that trains."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console

from rllib_distrl.runs.folder import RunFolder, is_locked, open_run
from rllib_distrl.runs.requests import ScaleRequest, answer_request, ask_to_scale, read_request

_POLL_S = 0.2


def run_scale(path: Path, n: int) -> None:
    """Runs the command: asks, and waits for the training process to answer.

    Args:
        path: The run folder.
        n: Remote env runners.

    Raises:
        ValueError: No run, no process that trains in it, a bad number, or a refusal.
    """
    if n < 0:
        raise ValueError(f"Cannot scale to {n} env runners: the number must be >= 0.")
    run = open_run(path)
    if not is_locked(path):
        raise ValueError(
            f"No process is training in {path}. env_runners.num_env_runners in the recipe sets "
            "the number that a run starts with."
        )
    console = Console()
    request = ask_to_scale(run, n)
    console.print(
        f"Asked for {n} env runners; the run takes it up between two iterations.", highlight=False
    )
    answered = _wait(run, request)
    if answered.refused:
        raise ValueError(answered.answer)
    console.print(answered.answer, highlight=False)


def _wait(run: RunFolder, request: ScaleRequest) -> ScaleRequest:
    """Returns the request with its answer."""
    while True:
        running = is_locked(run.path)  # asked before the file is read, whose answer counts more
        newest = read_request(run)
        if newest is None or newest.id != request.id:
            raise ValueError("Another request has taken the place of this one.")
        if newest.answer:
            return newest
        if not running:
            run.scale_file.unlink()
            raise ValueError("The run ended before it took the request up.")
        time.sleep(_POLL_S)


def take_scale_request(run: RunFolder, algo: Any) -> str:
    """Does what `distrl scale` has asked for, if it has; called between two iterations.

    Returns:
        What happened, for the console; "" if there was no request.
    """
    from rllib_distrl.rollout.scaling import scale_env_runners

    try:
        request = read_request(run)
    except ValueError as error:
        run.scale_file.unlink()
        return f"{error} It is removed."
    if request is None or request.answer:
        return ""
    try:
        scale_env_runners(algo, request.num_env_runners)
    except (ValueError, TimeoutError) as error:
        answer_request(run, request, str(error), refused=True)
        return f"Not scaled. {error}"
    text = f"Env runners: {request.num_env_runners}. New ones join as soon as they are up."
    answer_request(run, request, text, refused=False)
    return text
