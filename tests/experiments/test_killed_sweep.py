"""A sweep whose driver is killed, and its resumption; the command line, with a trial that fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pandas as pd
import pytest

from tests.experiments.test_sweep import RECIPE
from tests.helpers import start_python

ROOT = Path(__file__).parents[2]
METRIC = "evaluation/env_runners/best@4"
# One quantile and a bonus do not go together: that trial fails.
SPACE = f"""
[sweep]
metric = "{METRIC}"
search = "grid"
[space]
"training.n_quantiles" = {{ choice = [4, 1, 5, 6] }}
"""
# 14 iterations or so of 8 completions: the last one holds no validation of its own.
SETTINGS = ("run.budget_tokens=2000", "run.checkpoint_interval=3", "eval.interval=3",
            "eval.validation_problems=4", "rollout.evaluation_generations=4")  # fmt: skip


def sweep(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    script, recipe, space = ROOT / "tune/sweep.py", folder / "tiny.toml", folder / "space.toml"
    settings = (*SETTINGS, "--out", folder / "out", "--max-concurrent", "1", *arguments)
    return start_python(script, recipe, space, *settings, stderr=subprocess.STDOUT)


def reports(folder: Path) -> dict[Path, list[dict[str, object]]]:
    """What every trial has reported, by its file."""
    files = sorted((folder / "out" / "tune").glob("*/result.json"))
    return {file: [json.loads(line) for line in file.read_text().splitlines()] for file in files}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_sweep_keeps_what_is_finished_and_does_the_rest(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(RECIPE)
    (tmp_path / "space.toml").write_text(SPACE)
    killed = sweep(tmp_path)
    give_up = time.monotonic() + 280
    while time.monotonic() < give_up:
        assert killed.poll() is None, killed.communicate()
        found = [rows for rows in reports(tmp_path).values() if rows]
        if len(found) == 2 and any(rows[-1]["done"] for rows in found):
            break
        time.sleep(0.05)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate(timeout=60)
    finished = {file: rows for file, rows in reports(tmp_path).items() if rows and rows[-1]["done"]}
    assert finished
    assert not (tmp_path / "out" / "trials.parquet").exists()

    resumed = sweep(tmp_path, "--resume")
    out, _ = resumed.communicate(timeout=250)
    assert resumed.returncode == 0, out
    for file, rows in finished.items():
        assert reports(tmp_path)[file] == rows
    frame = pd.read_parquet(tmp_path / "out" / "trials.parquet")
    assert sorted(frame["training.n_quantiles"]) == [1, 4, 5, 6]
    assert frame["training.n_quantiles"].tolist()[-1] == 1
    assert "one quantile has no spread" in frame["error"].tolist()[-1]
    assert frame["error"].tolist()[:-1] == ["", "", ""]
    assert frame["tokens"][:3].between(2_000, 2_000 + 8 * 24).all()
    assert frame[METRIC][:3].between(0.0, 1.0).all()
    for path, rows in reports(tmp_path).items():
        if rows:
            # Every iteration was trained once, also those around the kill.
            reported = [row["iterations"] for row in rows]
            assert reported == [*range(3, reported[-1], 3), reported[-1]], path
            assert [row["iterations"] for row in rows if row["done"]] == reported[-1:]
