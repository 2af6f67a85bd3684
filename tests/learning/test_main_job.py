"""The main job, as a user runs it: it learns, on every seed, because of its advantages."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "configs" / "countdown"
AT_ONCE = 2  # each takes one core


def gain_of(recipe: str, out: Path, seed: int) -> float:
    """Points of avg@64 that the run gained on test problems."""
    command = [sys.executable, "-m", "rllib_distrl.cli", "train", str(RECIPES / recipe)]
    subprocess.run([*command, f"run.seed={seed}", "--out", str(out)], check=True, cwd=ROOT)
    result = json.loads((out / "eval.json").read_text())
    return 100 * (result["after"]["avg@64"] - result["before"]["avg@64"])


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_main_job_gains_fifteen_points_and_nothing_without_advantages(tmp_path: Path) -> None:
    from rllib_distrl.model.loading import resolve

    resolve("builtin:countdown")  # made once, before two ask for it
    jobs = [("distrl.toml", 0), ("distrl.toml", 1), ("distrl.toml", 2), ("zero_advantage.toml", 0)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        runs = [
            pool.submit(gain_of, recipe, tmp_path / str(number), seed)
            for number, (recipe, seed) in enumerate(jobs)
        ]
        *gains, nothing = [run.result() for run in runs]
    assert min(gains) >= 15, gains
    assert abs(nothing) < 2
