"""Checkpoints are whole or recognised as damaged, at whatever moment the process dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rllib_distrl.runs.checkpoints import (
    DamagedCheckpointError,
    Mode,
    best_iteration,
    checkpoint_iteration,
    checkpoint_scores,
    latest_checkpoint,
    list_checkpoints,
    save_checkpoint,
    verify_checkpoint,
)


def writer(text: str) -> Callable[[str], None]:
    def write(path: str) -> None:
        (Path(path) / "learner").mkdir()
        (Path(path) / "learner" / "state").write_text(text)
        (Path(path) / "config").write_text("config")

    return write


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for iteration in (5, 10, 15, 20):
        save_checkpoint(tmp_path, iteration, writer(str(iteration)), keep=2)
    assert [checkpoint_iteration(p) for p in list_checkpoints(tmp_path)] == [20, 15]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iteration_000015", "iteration_000020"]
    newest = latest_checkpoint(tmp_path, pytest.fail)
    assert newest is not None
    assert (newest / "learner" / "state").read_text() == "20"


def _truncate(path: Path) -> None:
    (path / "learner" / "state").write_text("2")


def _flip(path: Path) -> None:
    (path / "learner" / "state").write_text("0x")


def _lose(path: Path) -> None:
    (path / "config").unlink()


def _lose_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def _break_manifest(path: Path) -> None:
    (path / "manifest.json").write_text('{"files": [1]}')


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_truncate, "learner/state"),
        (_flip, "learner/state"),
        (_lose, "config"),
        (_lose_manifest, "manifest.json"),
        (_break_manifest, "manifest.json"),
    ],
)
def test_a_damaged_one_is_named_and_skipped(
    tmp_path: Path, damage: Callable[[Path], None], named: str
) -> None:
    save_checkpoint(tmp_path, 1, writer("10"), keep=3)
    newest = save_checkpoint(tmp_path, 2, writer("20"), keep=3)
    damage(newest)
    with pytest.raises(DamagedCheckpointError, match=named):
        verify_checkpoint(newest)
    reports: list[str] = []
    found = latest_checkpoint(tmp_path, reports.append)
    assert found is not None
    assert checkpoint_iteration(found) == 1
    assert len(reports) == 1
    assert "iteration_000002" in reports[0]
    assert named in reports[0]


def test_a_save_that_fails_leaves_the_one_before(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, writer("10"), keep=1)

    def fail(path: str) -> None:
        (Path(path) / "half").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path, 2, fail, keep=1)
    assert [checkpoint_iteration(p) for p in list_checkpoints(tmp_path)] == [1]
    save_checkpoint(tmp_path, 2, writer("20"), keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["iteration_000002"]


def test_saving_the_same_iteration_again_replaces_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, writer("10"), keep=1)
    save_checkpoint(tmp_path, 1, writer("11"), keep=1)
    assert (tmp_path / "iteration_000001" / "learner" / "state").read_text() == "11"


def test_a_damaged_later_one_does_not_count_as_kept(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 10, writer("10"), keep=1)
    (tmp_path / "iteration_000020").mkdir()
    save_checkpoint(tmp_path, 15, writer("15"), keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["iteration_000015"]


def test_other_names_are_not_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "iteration_x").mkdir()
    (tmp_path / "iteration_000001").write_text("a file")
    assert list_checkpoints(tmp_path) == []
    assert list_checkpoints(tmp_path / "missing") == []
    with pytest.raises(ValueError, match="iteration_NNNNNN"):
        checkpoint_iteration(tmp_path)


PROGRAM = """
import sys
from pathlib import Path
from rllib_distrl.runs.checkpoints import save_checkpoint
def write(path):
    for index in range(20):
        (Path(path) / f"part{index}").write_bytes(bytes(200_000))
for iteration in range(1, 10_000):
    save_checkpoint(Path(sys.argv[1]), iteration, write, keep=2)
    print(iteration, flush=True)
"""


@pytest.mark.parametrize("delay", [0.005, 0.013, 0.021])
def test_a_kill_at_any_moment_leaves_a_good_checkpoint(tmp_path: Path, delay: float) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "1\n"
    time.sleep(delay)
    os.kill(process.pid, signal.SIGKILL)
    printed = process.communicate()[0].split()
    last = int(printed[-1]) if printed else 1
    newest = latest_checkpoint(tmp_path, pytest.fail)
    assert newest is not None
    assert checkpoint_iteration(newest) >= last
    save_checkpoint(tmp_path, 99_999, writer("x"), keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["iteration_099999"]


@pytest.mark.parametrize(
    ("mode", "scores", "kept"),
    [
        ("max", {1: 0.2, 2: 0.9, 3: 0.4, 4: 0.1}, [4, 2]),
        ("min", {1: 0.2, 2: 0.9, 3: 0.4, 4: 0.3}, [4, 1]),
        ("max", {1: None, 2: 0.5, 3: 0.5, 4: None}, [4, 2]),  # the earliest of equals
        ("max", {1: None, 2: None, 3: None}, [3]),
        ("max", {1: 0.1, 2: 0.2}, [2]),
    ],
)
def test_the_best_stays_besides_the_newest(
    tmp_path: Path, mode: Mode, scores: dict[int, float | None], kept: list[int]
) -> None:
    for iteration, score in scores.items():
        save_checkpoint(tmp_path, iteration, writer("x"), keep=1, score=score, mode=mode)
    assert [checkpoint_iteration(p) for p in list_checkpoints(tmp_path)] == kept
    assert best_iteration(checkpoint_scores(tmp_path), mode) == (
        None if set(scores.values()) == {None} else kept[-1]
    )


def test_the_best_of_an_abandoned_future_goes(tmp_path: Path) -> None:
    for iteration, score in ((1, 0.1), (2, 0.3), (3, 0.9)):
        save_checkpoint(tmp_path, iteration, writer("x"), keep=3, score=score)
    save_checkpoint(tmp_path, 2, writer("again"), keep=1, score=0.05)
    assert checkpoint_scores(tmp_path) == {2: 0.05, 1: 0.1}
