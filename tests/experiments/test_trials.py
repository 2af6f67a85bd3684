"""Spaces are checked against the recipe before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from rllib_distrl.experiments.trials import load_space, with_settings
from rllib_distrl.recipe import Recipe, load_recipe

RECIPE = """
[run]
model = "builtin:countdown-tiny"
[environment]
env = "distrl_envs:distrl/Countdown-v0"
[environment.env_config]
split = "train"
[training]
lr = 1e-3
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    (tmp_path / "a.toml").write_text(RECIPE)
    return load_recipe(tmp_path / "a.toml")


def load(recipe: Recipe, folder: Path, text: str):
    (folder / "space.toml").write_text(text)
    return load_space(folder / "space.toml", recipe)


def test_domains(recipe: Recipe, tmp_path: Path) -> None:
    space = load(
        recipe,
        tmp_path,
        """
        [sweep]
        seed = 3
        [space]
        "training.lr" = { log_uniform = [1e-4, 1e-2] }
        "training.lambda_" = { uniform = [0.9, 1.0] }
        "training.n_quantiles" = { integer = [2, 4] }
        "training.critic" = { choice = ["shared", "detached"] }
        """,
    )
    domains = space.param_space()
    draws = {key: {domain.sample() for _ in range(200)} for key, domain in domains.items()}
    assert draws["training.n_quantiles"] == {2, 3, 4}
    assert draws["training.critic"] == {"shared", "detached"}
    assert all(1e-4 <= value <= 1e-2 for value in draws["training.lr"])
    # Half of log-uniform draws lie below the geometric middle, a tenth of uniform ones would.
    assert 60 < sum(value < 1e-3 for value in draws["training.lr"]) < 140
    assert all(0.9 <= value <= 1.0 for value in draws["training.lambda_"])


def test_a_grid_is_made_of_choices(recipe: Recipe, tmp_path: Path) -> None:
    text = '[sweep]\nsearch = "grid"\n[space]\n"training.lr" = { choice = [1e-4, 1e-3] }'
    assert load(recipe, tmp_path, text).param_space() == {
        "training.lr": {"grid_search": [1e-4, 1e-3]}
    }


def test_settings_reach_into_tables_and_leave_the_recipe_alone(recipe: Recipe) -> None:
    changed = with_settings(
        recipe.to_dict(), {"environment.env_config.split": "test", "training.lr": 0.5}, "a"
    )
    assert changed.env_config == {"split": "test"}
    assert changed.tables["training"]["lr"] == 0.5
    assert recipe.env_config == {"split": "train"}
    assert recipe.tables["training"]["lr"] == 1e-3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[space]", "is empty. Name a setting"),
        ('[space]\n"training.lrr" = { choice = [1] }', "Unknown key 'lrr' .* nearest one is 'lr'"),
        ('[space]\n"trainin.lr" = { choice = [1] }', r"Unknown table \[trainin\]"),
        ("[space]\nlr = { choice = [1] }", "'lr' names no table. Write \"training.lr\""),
        ('[space]\n"training.lr" = { choice = ["high"] }', "wanted a number or a list, got 'high'"),
        ('[space]\n"training.lr" = { choise = [1] }', "nearest one is 'choice'"),
        ('[space]\n"training.lr" = 0.1', "wanted one of choice, uniform"),
        ('[space]\n"training.lr" = { choice = [] }', "choice wants a list"),
        ('[space]\n"training.lr" = { uniform = [2.0, 1.0] }', "two bounds, the smaller first"),
        ('[space]\n"training.lr" = { log_uniform = [0.0, 1.0] }', "wants bounds above 0"),
        ('[space]\n"training.lr" = { integer = [0.5, 1] }', "integer wants two bounds"),
        ('[sweep]\nsearch = "greed"\n[space]', "Did you mean 'grid'"),
        ("[sweep]\ntrials = 0\n[space]\na = 1", "sweep.trials is 0; it must be >= 1"),
        (
            '[sweep]\nsearch = "grid"\n[space]\n"training.lr" = { uniform = [0.1, 1.0] }',
            "is uniform, but search = 'grid'",
        ),
        (
            '[sweep]\nsearch = "optuna"\nscheduler = "pbt"\n'
            '[space]\n"training.lr" = { uniform = [0.1, 1.0] }',
            "needs search = 'random'",
        ),
    ],
)
def test_what_is_refused(recipe: Recipe, tmp_path: Path, text: str, message: str) -> None:
    tables = text if text.startswith("[sweep]") else f"[sweep]\n{text}"
    with pytest.raises(ValueError, match=message):
        load(recipe, tmp_path, tables)
