"""A run's copy is enough to go on from, at whatever moment the copying process dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from rllib_distrl.recipe import recipe_from_tables
from rllib_distrl.runs.checkpoints import checkpoint_scores, save_checkpoint, verify_checkpoint
from rllib_distrl.runs.folder import RunFolder, create_run, is_run_folder
from rllib_distrl.runs.storage import RunStorage

TABLES = {
    "run": {"model": "builtin:countdown-tiny"},
    "environment": {"env": "distrl_envs:distrl/Countdown-v0"},
}
SETTINGS = {"keep": 2, "mode": "max"}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    recipe = recipe_from_tables(TABLES, name="small")
    run = create_run(tmp_path / "local" / "a", recipe, ["distrl"])
    run.samples.mkdir()
    (run.samples / "before.parquet").write_bytes(b"graded")
    (run.samples / ".before-unfinished").mkdir()
    (run.samples / ".before-unfinished" / "part").write_bytes(b"half")
    return run


def add_checkpoint(run: RunFolder, iteration: int, score: float | None = None) -> None:
    def write(path: str) -> None:
        (Path(path) / "learner").mkdir()
        (Path(path) / "learner" / "state").write_text(f"state {iteration}")
        (Path(path) / "config").write_text("config")

    run.progress_file.write_text(f"{iteration}\n")
    save_checkpoint(run.checkpoints, iteration, write, keep=2, score=score)


def tree(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def no_report(text: str) -> None:
    pytest.fail(text)


@pytest.mark.parametrize("kind", ["file", "path", "fsspec"])
def test_a_deleted_run_comes_back(tmp_path: Path, run: RunFolder, kind: str) -> None:
    uri = {
        "file": (tmp_path / "disk").as_uri(),
        "path": str(tmp_path / "disk"),
        "fsspec": "memory://disk",
    }[kind]
    storage = RunStorage(uri, "a")
    assert not storage.holds_run()
    storage.check_free()
    for iteration, score in ((1, 0.9), (2, 0.1), (3, 0.2), (4, 0.3)):
        add_checkpoint(run, iteration, score)
        storage.upload(run, **SETTINGS)
    again = RunStorage(uri, "a")
    with pytest.raises(ValueError, match=r"already holds a run.*--resume"):
        again.check_free()
    again.check_not_ahead(run)
    again.download(tmp_path / "back", mode="max", report=no_report)
    expected = tree(run.path)
    del expected["samples/.before-unfinished/part"]
    # Iteration 4 to go on from, and 1, the best; the one between is not fetched.
    expected = {k: v for k, v in expected.items() if "iteration_000003" not in k}
    assert checkpoint_scores(tmp_path / "back" / "checkpoints") == {4: 0.3, 1: 0.9}
    assert tree(tmp_path / "back") == expected
    assert is_run_folder(tmp_path / "back")
    again.delete()
    assert not storage.holds_run()


def test_checkpoints_there_are_those_here(tmp_path: Path, run: RunFolder) -> None:
    storage = RunStorage((tmp_path / "disk").as_uri(), "a")
    for iteration in (1, 2, 3):
        add_checkpoint(run, iteration)
        storage.upload(run, **SETTINGS)
    assert tree(tmp_path / "disk" / "a" / "checkpoints") == tree(run.checkpoints)
    # The run went back behind a damaged checkpoint: its future there goes too.
    (run.checkpoints / "iteration_000003" / "config").unlink()
    add_checkpoint(run, 2)
    storage.upload(run, **SETTINGS)
    assert tree(tmp_path / "disk" / "a" / "checkpoints") == tree(run.checkpoints)


def test_a_damaged_copy_is_named_and_the_one_before_taken(tmp_path: Path, run: RunFolder) -> None:
    storage = RunStorage(str(tmp_path / "disk"), "a")
    for iteration in (1, 2):
        add_checkpoint(run, iteration)
    storage.upload(run, **SETTINGS)
    (tmp_path / "disk/a/checkpoints/iteration_000002/learner/state").write_text("state x")
    reports: list[str] = []
    storage.download(tmp_path / "back", mode="max", report=reports.append)
    assert checkpoint_scores(tmp_path / "back" / "checkpoints") == {1: None}
    assert len(reports) == 1
    assert "iteration_000002: learner/state is not what was written" in reports[0]


def test_a_copy_that_is_ahead_is_refused(tmp_path: Path, run: RunFolder) -> None:
    storage = RunStorage(str(tmp_path / "disk"), "a")
    add_checkpoint(run, 7)
    storage.upload(run, **SETTINGS)
    add_checkpoint(run, 5)
    with pytest.raises(ValueError, match=r"at iteration 7 and .* at 5.*Move the folder away"):
        storage.check_not_ahead(run)


@pytest.mark.parametrize("uri", ["relative/path", "nonsense://bucket/x", "file://host/x"])
def test_places_that_cannot_be_opened(uri: str) -> None:
    with pytest.raises(ValueError, match=r"run.storage: .* cannot be opened.*Give an absolute"):
        RunStorage(uri, "a")


PROGRAM = """
import sys
from pathlib import Path
from rllib_distrl.runs.checkpoints import save_checkpoint
from rllib_distrl.runs.folder import RunFolder
from rllib_distrl.runs.storage import RunStorage
def write(path):
    for index in range(20):
        (Path(path) / f"part{index}").write_bytes(bytes([iteration % 256]) * 100_000)
run, storage = RunFolder(Path(sys.argv[1])), RunStorage(sys.argv[2], "a")
for iteration in range(1, 10_000):
    run.progress_file.write_text(f"{iteration} " * 10_000)
    save_checkpoint(run.checkpoints, iteration, write, keep=2)
    storage.upload(run, keep=2, mode="max")
    print(iteration, flush=True)
"""


class EndsInBetween(MemoryFileSystem):
    """A file system that takes so many files, and leaves the next one empty."""

    protocol = "ends"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    left = 10**9

    def _open(self, path: str, mode: str = "rb", **more: Any) -> Any:
        if mode == "wb":
            type(self).left -= 1
            if self.left < 0:
                super()._open(path, mode, **more).close()
                raise OSError("the network is gone")
        return super()._open(path, mode, **more)


def test_an_upload_that_ends_anywhere_leaves_the_copy_before(
    tmp_path: Path, run: RunFolder
) -> None:
    """Ends at the first file, at the second, and so on to the last."""
    fsspec.register_implementation("ends", EndsInBetween, clobber=True)
    uri = "ends://disk"
    add_checkpoint(run, 1)
    RunStorage(uri, "a").upload(run, **SETTINGS)
    add_checkpoint(run, 2)
    for left in range(100):
        back = tmp_path / f"back{left}"
        EndsInBetween.left = left
        try:
            RunStorage(uri, "a").upload(run, **SETTINGS)
        except OSError:
            EndsInBetween.left = 10**9
            RunStorage(uri, "a").download(back, mode="max", report=no_report)
            assert checkpoint_scores(back / "checkpoints") == {1: None}
            assert (back / "progress.jsonl").read_text() in ("1\n", "2\n")
            assert RunFolder(back).recipe() == run.recipe()
        else:
            break
    # Its own files, those of the new checkpoint, and no file of the one that is there.
    assert left == len(tree(run.path)) - len(tree(run.checkpoints / "iteration_000001")) - 1
    RunStorage(uri, "a").download(tmp_path / "back", mode="max", report=no_report)
    assert checkpoint_scores(tmp_path / "back" / "checkpoints") == {2: None}


@pytest.mark.parametrize("delay", [0.013])
def test_a_kill_at_any_moment_leaves_a_whole_copy(
    tmp_path: Path, run: RunFolder, delay: float
) -> None:
    uri = (tmp_path / "disk").as_uri()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(run.path), uri], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "1\n"
    time.sleep(delay)
    os.kill(process.pid, signal.SIGKILL)
    printed = process.communicate()[0].split()
    RunStorage(uri, "a").download(tmp_path / "back", mode="max", report=no_report)
    scores = checkpoint_scores(tmp_path / "back" / "checkpoints")
    assert max(scores) >= int(printed[-1] if printed else 1)
    for number in scores:
        verify_checkpoint(tmp_path / "back" / "checkpoints" / f"iteration_{number:06d}")
    words = (tmp_path / "back" / "progress.jsonl").read_text().split()
    assert len(words) == 10_000
    assert int(words[0]) >= max(scores)
