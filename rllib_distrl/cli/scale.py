"""`distrl scale`: how many env runners a job that trains should have.

The request is one small file in the run folder. Either side replaces it as a whole: the asker by
a request, the training process, between two iterations, by its answer.
"""

from __future__ import annotations

import dataclasses
import json
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from rllib_distrl.files import write_atomic
from rllib_distrl.runs.folder import RunFolder, is_locked, open_run


@dataclass(frozen=True)
class ScaleRequest:
    """A request, and its answer once there is one.

    Attributes:
        id: Tells it from other requests.
        num_env_runners: How many remote env runners there should be.
        answer: A sentence; "" until the training process has taken the request up.
        refused: Whether the answer is an error.
    """

    id: str
    num_env_runners: int
    answer: str = ""
    refused: bool = False


def ask_to_scale(run: RunFolder, n: int) -> ScaleRequest:
    """Leaves a request in a run folder; replaces one that was not taken up yet."""
    request = ScaleRequest(uuid.uuid4().hex, n)
    _write(run, request)
    return request


def read_request(run: RunFolder) -> ScaleRequest | None:
    """Returns the newest request, answered or not, or None.

    Raises:
        ValueError: The file was not written by this module.
    """
    try:
        values = json.loads(run.scale_file.read_text(encoding="utf-8"))
        return ScaleRequest(**values)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{run.scale_file} is not a request of `distrl scale`.") from error


def answer_request(run: RunFolder, request: ScaleRequest, text: str, *, refused: bool) -> None:
    """Replaces a request by its answer."""
    _write(run, dataclasses.replace(request, answer=text, refused=refused))


def _write(run: RunFolder, request: ScaleRequest) -> None:
    write_atomic(run.scale_file, json.dumps(dataclasses.asdict(request)) + "\n")


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
    from rllib_distrl.algorithm.scaling import scale_env_runners

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
