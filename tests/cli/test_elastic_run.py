"""A job of real processes is scaled, loses its last runner, stops, and is continued."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rllib_distrl.runs.checkpoints import checkpoint_iteration, list_checkpoints
from rllib_distrl.runs.log import read_progress
from tests.cli.test_train import RECIPE, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SECONDS = 120
RUNNERS = "env_runners/num_env_runners"


def wait_until(condition: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    give_up = time.monotonic() + SECONDS
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < give_up
        time.sleep(0.1)


def last(run: Path, key: str) -> Any:
    rows = read_progress(run / "progress.jsonl")
    return rows[-1].get(key) if rows else None


def runner_pids(ancestor: int) -> list[int]:
    """Processes of env runners below a process."""
    parents, runners = {}, []
    for folder in Path("/proc").iterdir():
        try:
            pid = int(folder.name)
            parents[pid] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if b"CompletionEnvRunner" in (folder / "cmdline").read_bytes():
                runners.append(pid)
        except (ValueError, OSError):
            continue  # not a process, or one that has just ended
    return [pid for pid in runners if ancestor in lineage(pid, parents)]


def lineage(pid: int, parents: dict[int, int]) -> list[int]:
    found = [pid]
    while found[-1] in parents:
        found.append(parents[found[-1]])
    return found


def scale(run: Path, n: int) -> str:
    process = start("scale", run.name, str(n), cwd=run.parent)
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, out + err
    return out


def test_a_running_job_is_scaled_stops_without_runners_and_is_continued(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(RECIPE)
    run = tmp_path / "run"
    process = start(
        "train",
        "tiny.toml",
        "--out",
        "run",
        "run.iterations=100000",
        "run.checkpoint_interval=0",
        "eval.interval=0",
        "eval.problems=2",
        "env_runners.num_env_runners=1",
        "env_runners.num_cpus_per_env_runner=0.25",
        "fault_tolerance.restart_failed_env_runners=false",
        "rollout.max_env_runners=3",
        cwd=tmp_path,
    )
    wait_until(lambda: last(run, RUNNERS) == 1, process)
    assert "Env runners: 3." in scale(run, 3)
    wait_until(lambda: last(run, RUNNERS) == 3, process)
    assert "Env runners: 1." in scale(run, 1)
    wait_until(lambda: last(run, RUNNERS) == 1, process)

    wait_until(lambda: len(runner_pids(process.pid)) == 1, process)  # the others have ended
    (pid,) = runner_pids(process.pid)
    os.kill(pid, signal.SIGKILL)
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 1, out + err
    assert f"Env runner 1 (pid {pid} on " in err  # the log line about its end
    assert "0 of 1 env runners are left" in err.replace("\n", " ")
    assert "distrl train run --resume" in err.replace("\n", " ")
    stopped_after = len(read_progress(run / "progress.jsonl"))
    kept = [checkpoint_iteration(each) for each in list_checkpoints(run / "checkpoints")]
    assert kept == [stopped_after, 1]

    recipe = (run / "recipe.toml").read_text()
    end = stopped_after + 3
    (run / "recipe.toml").write_text(recipe.replace("iterations = 100000", f"iterations = {end}"))
    process = start("train", "run", "--resume", cwd=tmp_path)
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, out + err
    rows = read_progress(run / "progress.jsonl")
    assert [row["iteration"] for row in rows] == list(range(1, end + 1))
    assert [row[RUNNERS] for row in rows[-3:]] == [1, 1, 1]
    episodes = [row["env_runners/num_episodes_lifetime"] for row in rows]
    assert episodes == [32 * row["iteration"] for row in rows]
    assert json.loads((run / "eval.json").read_text())["after"] is not None
