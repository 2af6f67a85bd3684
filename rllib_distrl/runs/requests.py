"""What one process may ask of another that trains: how many env runners there should be.

The request is one small file in the run folder. Either side replaces it as a whole: the asker by
a request, the training process, between two iterations, by its answer.
"""

from __future__ import annotations

import dataclasses
import json
import uuid
from dataclasses import dataclass

from rllib_distrl.files import write_atomic
from rllib_distrl.runs.folder import RunFolder


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
