"""Recipes as a user runs them: they learn, because of their advantages."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
AT_ONCE = 2  # each takes one core
SHORT = ("eval.interval=0", "eval.problems=100", "eval.token_problems=0")


def gain_of(recipe: str, out: Path, *overrides: str) -> float:
    """Points of avg@64 that the run gained on test problems."""
    command = [sys.executable, "-m", "rllib_distrl.cli", "train", str(ROOT / "configs" / recipe)]
    subprocess.run([*command, *overrides, "--out", str(out)], check=True, cwd=ROOT)
    result = json.loads((out / "eval.json").read_text())
    return 100 * (result["after"]["avg@64"] - result["before"]["avg@64"])


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_recipes_gain_and_nothing_without_advantages(tmp_path: Path) -> None:
    from rllib_distrl.model.loading import resolve

    resolve("builtin:countdown")  # made once, before two ask for it
    with ThreadPoolExecutor(AT_ONCE) as pool:
        main_job, nothing, game = (
            pool.submit(gain_of, recipe, tmp_path / Path(recipe).stem, *overrides)
            for recipe, *overrides in (
                ("countdown/distrl.toml", "run.iterations=100", *SHORT),
                ("countdown/zero_advantage.toml", "run.iterations=25", *SHORT),
                ("games/blackjack.toml", "run.iterations=60"),
            )
        )
    assert main_job.result() >= 4  # a quarter of it; the whole one gains 16
    assert abs(nothing.result()) < 2
    assert game.result() >= 3  # it gains 6 to 7.5
