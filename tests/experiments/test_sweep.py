"""Real Tune, a real tiny model: grid, Optuna, ASHA, PBT, failures, resuming, names."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from rllib_distrl.experiments.sweep import SweepResult, read_trials, run_sweep
from rllib_distrl.experiments.trials import Space, load_space
from rllib_distrl.recipe import Recipe, load_recipe

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]
RECIPE = """
[run]
model = "builtin:countdown-tiny"
iterations = 4
[rollout]
prompts_per_iteration = 4
num_generations = 2
max_completion_tokens = 24
[environment]
env = "distrl_envs:distrl/Countdown-v0"
[training]
minibatch_size = 8
"""
METRIC = "learners/default_policy/entropy"


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    (tmp_path / "tiny.toml").write_text(RECIPE)
    return load_recipe(tmp_path / "tiny.toml")


def space(recipe: Recipe, folder: Path, ranges: str, **settings: object) -> Space:
    given = {"metric": METRIC, "mode": "min", **settings}
    lines = [f"{key} = {value!r}" for key, value in given.items()]
    text = "\n".join(["[sweep]", *lines, "[space]", ranges])
    (folder / "space.toml").write_text(text)
    return load_space(folder / "space.toml", recipe)


def sweep(recipe: Recipe, folder: Path, ranges: str, **settings: object) -> SweepResult:
    return run_sweep(recipe, space(recipe, folder, ranges, **settings), folder / "out")


GRID = '"training.lr" = { choice = [1e-4, 1e-2] }\n"training.n_quantiles" = { choice = [1, 4] }'


def test_a_grid_with_trials_that_fail_and_its_resumption(recipe: Recipe, tmp_path: Path) -> None:
    found = sweep(recipe, tmp_path, GRID, search="grid")
    frame = found.frame
    # One quantile and a bonus do not go together: those two fail, and say so.
    assert frame["training.n_quantiles"].tolist() == [4, 4, 1, 1]
    assert frame["iterations"].tolist() == [4, 4, 0, 0]
    assert (frame["error"][:2] == "").all()
    assert frame["error"][2:].str.contains("one quantile has no spread").all()
    assert frame[METRIC][0] < frame[METRIC][1]
    assert frame["tokens"][0] > 0
    assert found.best.tables["training"]["lr"] == frame["training.lr"][0]
    assert found.tied == 1
    assert load_recipe(tmp_path / "out" / "best.toml").to_dict() == found.best.to_dict()
    pd.testing.assert_frame_equal(read_trials(tmp_path / "out"), frame)

    with pytest.raises(ValueError, match="already holds a sweep"):
        sweep(recipe, tmp_path, GRID, search="grid")
    same = space(recipe, tmp_path, GRID, search="grid")
    again = run_sweep(recipe, same, tmp_path / "out", resume=True).frame
    columns = ["training.lr", METRIC, "iterations", "folder"]
    pd.testing.assert_frame_equal(again[columns][:2], frame[columns][:2])
    other = space(recipe, tmp_path, GRID, search="grid", seed=5)
    with pytest.raises(ValueError, match="started with another recipe or space"):
        run_sweep(recipe, other, tmp_path / "out", resume=True)
    with pytest.raises(ValueError, match="no sweep to resume"):
        run_sweep(recipe, same, tmp_path / "elsewhere", resume=True)


def test_a_trial_that_fails_in_training_is_listed(recipe: Recipe, tmp_path: Path) -> None:
    # More than a float32 holds: the loss is infinite, and the third refused step is one too many.
    # The other two come equally far.
    found = sweep(
        recipe, tmp_path, '"training.vf_loss_coeff" = { choice = [1e300, 0.5, 0.25] }',
        search="grid", metric="iterations_since_restore", mode="max",
    )  # fmt: skip
    frame = found.frame
    assert frame["training.vf_loss_coeff"].tolist() == [0.5, 0.25, 1e300]
    assert frame["iterations"].tolist() == [4, 4, 3]
    assert frame["error"][:2].tolist() == ["", ""]
    assert "optimiser steps in a row were refused" in frame["error"][2]
    assert found.best.tables["training"]["vf_loss_coeff"] == 0.5
    assert found.tied == 2


def test_asha_compares_at_equal_tokens(recipe: Recipe, tmp_path: Path) -> None:
    # One after the other, or the second one might be the first at the rung. Eight completions of
    # at most 24 tokens an iteration, or 64: 400 tokens are three iterations or more, or one or two.
    budget = replace(recipe, run=recipe.run.model_copy(update={"budget_tokens": 3_000}))
    given = space(
        budget, tmp_path, '"rollout.num_generations" = { choice = [2, 16] }', search="grid",
        scheduler="asha", metric="iterations_since_restore", mode="max", grace_tokens=400,
    )  # fmt: skip
    frame = run_sweep(budget, given, tmp_path / "out", max_concurrent=1).frame
    assert (frame["error"] == "").all()
    assert frame["rollout.num_generations"].tolist() == [2, 16]
    # The second one is stopped at the first rung, neither before nor much after it.
    assert frame["tokens"][0] >= 3_000
    assert 400 <= frame["tokens"][1] < 400 + 64 * 24
    first, second = (_clock(Path(folder)) for folder in frame["folder"])
    assert max(first) <= min(second)


def _clock(trial: Path) -> list[int]:
    lines = (trial / "result.json").read_text().splitlines()
    return [json.loads(line)["timestamp"] for line in lines]


def test_a_metric_that_never_appears_ends_the_sweep(recipe: Recipe, tmp_path: Path) -> None:
    message = "'learners/default_policy/entrpy' is not among .* nearest is 'learners/default_p"
    with pytest.raises(ValueError, match=message):
        sweep(recipe, tmp_path, GRID.replace("[1, 4]", "[4]"), search="grid",
              metric="learners/default_policy/entrpy")  # fmt: skip


def test_optuna_draws_and_asha_stops(recipe: Recipe, tmp_path: Path) -> None:
    found = sweep(
        recipe, tmp_path, '"training.lr" = { log_uniform = [1e-5, 1e-2] }',
        search="optuna", scheduler="asha", trials=5, grace_iterations=1,
    )  # fmt: skip
    assert found.frame["training.lr"].between(1e-5, 1e-2).all()
    assert found.frame["training.lr"].nunique() == 5
    # Of those at the first rung, after one iteration, only the best third of all so far go on.
    assert found.frame["iterations"].max() == 4
    assert found.frame["iterations"].min() < 4
    assert (found.frame["error"] == "").all()


def test_pbt_changes_what_the_learner_uses(recipe: Recipe, tmp_path: Path) -> None:
    # Whether a trial copies another depends on which of them is ahead: not every sweep does it.
    assert any(_pbt_changed_lr(recipe, tmp_path / str(seed), seed) for seed in range(1, 6))


def _pbt_changed_lr(recipe: Recipe, folder: Path, seed: int) -> bool:
    """Runs a sweep, checks each row's learning rate, and says whether PBT has changed one."""
    folder.mkdir()
    found = sweep(
        recipe, folder, '"training.lr" = { choice = [1e-4, 1e-3, 1e-2] }',
        search="random", scheduler="pbt", trials=2, perturbation_interval=1, seed=seed,
    )  # fmt: skip
    assert (found.frame["error"] == "").all()
    assert found.frame["iterations"].tolist() == [4, 4]
    changed = False
    for trial in found.frame["folder"]:
        rows = pd.read_json(Path(trial) / "result.json", lines=True)
        used = rows["learners/default_policy/default_optimizer_learning_rate"]
        wanted = rows["config"].map(lambda config: config["space"]["training.lr"])
        for one, other in zip(used, wanted, strict=True):
            assert math.isclose(one, other, rel_tol=1e-6), (used.tolist(), wanted.tolist())
        changed = changed or wanted.nunique() > 1
    return changed


def test_our_algorithms_have_names_in_tune(tmp_path: Path) -> None:
    from ray import tune

    import rllib_distrl
    from tests.helpers import distrl_config

    assert rllib_distrl.DistRL
    results = tune.Tuner(
        "DistRL",
        param_space=distrl_config(lr=tune.grid_search([1e-3])),
        run_config=tune.RunConfig(
            storage_path=str(tmp_path), stop={"training_iteration": 1}, verbose=0
        ),
    ).fit()
    assert not results.errors
    frame = results.get_dataframe()
    assert frame["config/lr"].tolist() == [1e-3]
    assert (frame["env_runners/num_env_steps_sampled_lifetime"] > 0).all()
