"""`distrl scale`: the request, the answer, and what is refused."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rllib_distrl.cli.app import app
from rllib_distrl.cli.scale import take_scale_request
from rllib_distrl.runs.folder import RunFolder, locked
from tests.helpers import distrl_config

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def algo(ray_session: Any) -> Iterator[Any]:
    algo = distrl_config().build_algo()
    yield algo
    algo.stop()


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    (tmp_path / "meta.json").write_text(json.dumps({"format": "distrl-run-1"}))
    return RunFolder(tmp_path)


def scale(run: RunFolder, n: int) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["scale", str(run.path), "--", str(n)])
    return result.exit_code, result.stdout + result.stderr


def scale_a_trainer(run: RunFolder, algo: Any, n: int) -> tuple[int, str]:
    """Runs the command while a thread takes requests as the training loop does."""
    stop = threading.Event()

    def train() -> None:
        with locked(run.path):
            started.set()
            while not stop.is_set():
                take_scale_request(run, algo)
                time.sleep(0.05)

    started = threading.Event()
    trainer = threading.Thread(target=train)
    trainer.start()
    started.wait()
    try:
        return scale(run, n)
    finally:
        stop.set()
        trainer.join()


def test_a_running_job_is_scaled(run: RunFolder, algo: Any) -> None:
    code, text = scale_a_trainer(run, algo, 1)
    assert (code, algo.fleet.present()) == (0, 1), text
    assert "Env runners: 1" in text
    assert scale_a_trainer(run, algo, 0)[0] == algo.fleet.present() == 0


def test_a_refusal_reaches_the_asker(run: RunFolder, algo: Any) -> None:
    code, text = scale_a_trainer(run, algo, 3)
    assert (code, algo.fleet.present()) == (2, 0)
    assert "the cluster has 2" in text


def test_a_job_that_does_not_run_is_an_error(run: RunFolder) -> None:
    code, text = scale(run, 2)
    assert code == 2
    assert "No process is training in" in text
    assert not run.scale_file.exists()


def test_a_folder_without_a_run_and_a_negative_number_are_errors(
    run: RunFolder, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert "must be >= 0" in scale(run, -1)[1]
    code, text = scale(RunFolder(tmp_path_factory.mktemp("empty")), 1)
    assert code == 2
    assert "is not a run folder" in text


def test_a_run_that_ends_first_says_so(run: RunFolder) -> None:
    def end_soon() -> None:
        with locked(run.path):
            started.set()
            while not run.scale_file.exists():
                time.sleep(0.02)

    started = threading.Event()
    trainer = threading.Thread(target=end_soon)
    trainer.start()
    started.wait()
    code, text = scale(run, 2)
    trainer.join()
    assert code == 2
    assert "ended before it took the request up" in text
    assert not run.scale_file.exists()


def test_a_file_that_is_no_request_is_removed_and_reported(run: RunFolder, algo: Any) -> None:
    run.scale_file.write_text("3")
    assert "is not a request of `distrl scale`" in take_scale_request(run, algo)
    assert algo.fleet.present() == 0
    assert take_scale_request(run, algo) == ""
