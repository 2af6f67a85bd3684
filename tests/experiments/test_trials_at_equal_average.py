"""Trials at equal average scores, by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rllib_distrl.experiments.sweep import at_equal_average, read_validations
from rllib_distrl.recipe import recipe_from_tables

LR, SEED = "training.lr", "run.seed"
RECIPE = recipe_from_tables({"environment": {"env": "distrl_envs:distrl/Countdown-v0"}}, "made")


def trial(out: Path, lr: float, seed: int, path: list[tuple[float, float]]) -> None:
    """Reports of an average score and pass@4 each, with one between them that did not validate."""
    space = {LR: lr, SEED: seed}
    config = {"recipe": RECIPE.to_dict(), "name": "made", "metric": "x", "space": space}
    rows = []
    for number, (average, passed) in enumerate(path, start=1):
        validated = {
            "evaluation/env_runners/avg@8": average,
            "evaluation/env_runners/pass@4": passed,
            "evaluation/env_runners/pass@8": 1.0,
        }
        rows.append({"tokens": 100 * number, "config": config, **validated})
        rows.append({"tokens": 100 * number + 50, "config": config})
    folder = out / "tune" / f"trial-{lr}-{seed}"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_trials_are_read_at_a_level_and_averaged(tmp_path: Path) -> None:
    trial(tmp_path, 1e-3, 0, [(0.1, 0.8), (0.3, 0.6)])  # .7 at .2, .6 at .3
    trial(tmp_path, 1e-3, 1, [(0.2, 0.5), (0.4, 0.3)])  # .5 at .2, .4 at .3
    trial(tmp_path, 1e-4, 0, [(0.1, 0.9), (0.25, 0.9)])  # .9 at .2, never at .3
    validations = read_validations(tmp_path, [LR, SEED], ["pass@4"])
    assert validations[1]["settings"] == {LR: 1e-3, SEED: 0}
    assert validations[1]["validation"][1] == {"tokens": 200, "avg@8": 0.3, "pass@4": 0.6}
    table = at_equal_average(validations, [LR], [0.2, 0.3])
    assert table[LR].tolist() == [1e-4, 1e-3]
    assert table["trials"].tolist() == [1, 2]
    assert table["reached"].tolist() == [0.5, 1.0]
    assert table["pass@4"].tolist() == pytest.approx([0.9, (0.7 + 0.6 + 0.5 + 0.4) / 4])


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    trial(tmp_path, 1e-3, 0, [(0.1, 0.8)])
    with pytest.raises(ValueError, match=r"has validated pass@16\. Set eval\.interval"):
        read_validations(tmp_path, [LR], ["pass@16"])
    with pytest.raises(ValueError, match=r"'training\.learning_rate' is none"):
        read_validations(tmp_path, ["training.learning_rate"], ["pass@4"])
