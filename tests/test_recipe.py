"""Recipes: what is accepted, what is refused and with which words."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal

import pytest

from rllib_distrl.recipe import Recipe, load_recipe
from rllib_distrl.recipe_schema import builder_parameters, check_value, nearest, toml_types

# Those of a pretrained model need its package: tests/pretrained builds them.
CONFIGS = sorted(
    path
    for folder in ("countdown", "games")
    for path in (Path(__file__).parents[1] / "configs" / folder).glob("*.toml")
)
MINIMAL = """
[run]
algorithm = "PPO"
model = "builtin:countdown-tiny"
[rollout]
max_completion_tokens = 24
[environment]
env = "distrl_envs:distrl/Countdown-v0"
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(MINIMAL)
    return path


def test_defaults_and_name(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    assert recipe.run.name == "small"
    assert recipe.run.algorithm == "PPO"
    assert recipe.eval.k == (1, 8)
    assert recipe.env_id == "distrl_envs:distrl/Countdown-v0"


@pytest.mark.parametrize(
    ("text", "table", "key", "value"),
    [
        ("training.minibatch_size=1e3", "training", "minibatch_size", 1000),
        ("training.lr=1e-5", "training", "lr", 1e-5),
        ("training.lr=1", "training", "lr", 1),
        ("training.lr=[[0, 1e-3], [100, 1e-4]]", "training", "lr", [[0, 1e-3], [100, 1e-4]]),
        ("training.use_kl_loss=false", "training", "use_kl_loss", False),
        ("training.grad_clip=none", "training", "grad_clip", "none"),
        ("env_runners.num_cpus_per_env_runner=0.5", "env_runners", "num_cpus_per_env_runner", 0.5),
        ("training.grad_clip_by=norm", "training", "grad_clip_by", "norm"),
        ("environment.env_config.task_config.numbers=3", "environment", "env_config",
         {"task_config": {"numbers": 3}}),
    ],
)  # fmt: skip
def test_override(recipe_file: Path, text: str, table: str, key: str, value: Any) -> None:
    assert load_recipe(recipe_file, [text]).tables[table][key] == value


def test_override_of_our_tables(recipe_file: Path) -> None:
    recipe = load_recipe(
        recipe_file,
        ["run.model=Qwen/Qwen2.5-Math-7B", "eval.k=1,2,4", "eval.n=4", "run.budget_tokens=1e6"],
    )
    assert recipe.run.model == "Qwen/Qwen2.5-Math-7B"
    assert repr(recipe.run.budget_tokens) == "1000000"
    assert recipe.eval.k == (1, 2, 4)


def test_toml_round_trip(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["training.lr=1e-5", "run.name=other", "eval.k=[2]"])
    copy = recipe_file.with_name("copy.toml")
    copy.write_text(recipe.to_toml())
    assert load_recipe(copy) == recipe
    assert tomllib.loads(copy.read_text())["training"]["lr"] == 1e-5


ERRORS = {
    "trainng.lr=1": ["[trainng]", "[training]"],
    "training.lrr=1": ["'lrr'", "[training]", "'lr'"],
    "run.iteratons=1": ["'iteratons'", "'iterations'"],
    "rollout.num_generation=1": ["'num_generation'", "'num_generations'"],
    "environment.env_config.slit=train": ["'slit'", "'split'"],
    "evaluation.evaluation_config.explor=true": ["'explor'", "'explore'"],
    "training.num_sgd_iter=3": ["'num_sgd_iter'"],
    "training.lr=true": ["training.lr", "a number", "true"],
    "training.lr=abc": ["training.lr", "a number", "'abc'"],
    "training.lr=nan": ["training.lr", "nan"],
    "training.lr=[[0, nan]]": ["training.lr[0][1]", "nan"],
    "training.use_kl_loss=1": ["training.use_kl_loss", "true or false", "1"],
    "training.use_kl_loss=True": ["true or false", "'True'", "true and false"],
    "training.num_epochs=1.5": ["training.num_epochs", "an integer", "1.5"],
    "training.learner_class=x": ["training.learner_class", "Python object"],
    "run.iterations=1.5": ["run.iterations", "an integer", "1.5"],
    "run.iterations=0": ["run.iterations", ">= 1", "0"],
    "run.seed=-1": ["run.seed", "[0, ", "-1"],
    "run.name=../up": ["run.name", "'../up'"],
    "run.algorithm=DistRLL": ["'DistRLL'", "DistRL"],
    "eval.k=[1, 100]": ["pass@100", "64"],
    "eval.k=[1, true]": ["eval.k[1]", "an integer"],
    "eval.split=tst": ["eval.split", "'tst'", "'test'"],
    "eval.top_p=0": ["eval.top_p", "0"],
    "rollout.temperature=0": ["temperature", "0"],
    "debugging.seed=3": ["run.seed", "debugging.seed"],
    "environment.env=distrl_envs:distrl/Countdwn-v0": ["Countdwn", "distrl/Countdown-v0"],
    "environment.env=no_such_module:X-v0": ["no_such_module"],
    "environment.env=": ["environment.env"],
    "lr=3": ["'lr=3'", "table.key=value"],
    "training.lr": ["'training.lr'", "table.key=value"],
    "training.lr=[1,": ["training.lr", "[1,"],
    "run.model=a b": ["run.model", "Quote"],
    "run.model.x=1": ["'model' is not a table"],
    "training.lr=2026-01-01": ["training.lr", "2026"],
}


@pytest.mark.parametrize("override", ERRORS)
def test_errors_name_what_was_got_and_the_remedy(recipe_file: Path, override: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_recipe(recipe_file, [override])
    for part in ERRORS[override]:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("lr = 1\n" + MINIMAL, ["'lr'", "outside of any table"]),
        ("[run\n", ["small.toml", "TOML"]),
        ("[run]\nseed = 1\n", ["environment.env is missing"]),
    ],
)
def test_errors_of_files(recipe_file: Path, text: str, parts: list[str]) -> None:
    recipe_file.write_text(text)
    with pytest.raises(ValueError) as caught:
        load_recipe(recipe_file)
    for part in parts:
        assert part in str(caught.value)


def test_a_missing_file_names_the_nearest(recipe_file: Path) -> None:
    with pytest.raises(ValueError, match=r"small\.toml"):
        load_recipe(recipe_file.with_name("smal.toml"))
    with pytest.raises(ValueError, match="is a folder"):
        load_recipe(recipe_file.parent)


def test_builder_parameters_follow_the_parent_and_leave_deprecated_ones_out() -> None:
    from ray.rllib.algorithms.ppo import PPOConfig

    parameters = builder_parameters(PPOConfig(), "training")
    assert {"clip_param", "lr", "train_batch_size_per_learner"} <= parameters.keys()
    assert not {"num_sgd_iter", "vf_share_layers", "self", "kwargs"} & parameters.keys()


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        (int, {int}),
        (float | None, {float}),
        (list[list[float]] | float, {list, float}),
        (dict[str, Any] | None, {dict}),
        (Literal["a", "b"], {str}),
        (type, set()),
    ],
)
def test_toml_types(annotation: Any, expected: set[type]) -> None:
    assert toml_types(annotation) == expected


def test_the_default_decides_where_the_annotation_is_silent() -> None:
    check_value("a.b", 2, Any, default=1)
    check_value("a.b", {"x": 1}, Any, default=None)
    with pytest.raises(ValueError, match="an integer"):
        check_value("a.b", "2", Any, default=1)


def test_nearest() -> None:
    assert nearest("epoch", ["lr", "num_epochs", "gamma"]) == "num_epochs"
    assert nearest("x", []) == ""


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_shipped_recipe_builds(path: Path) -> None:
    recipe = load_recipe(path, ["run.model=builtin:countdown-tiny"])
    config = recipe.build_config()
    assert config.seed == recipe.run.seed
    assert config.env == recipe.env_id


def test_validation_and_tables_reach_the_config(recipe_file: Path) -> None:
    overrides = [
        "eval.interval=5",
        "eval.validation_problems=7",
        "evaluation.evaluation_duration=9",
        "training.grad_clip=none",
        "run.seed=3",
    ]
    config = load_recipe(recipe_file, overrides).build_config()
    assert (config.evaluation_interval, config.evaluation_duration) == (5, 9)
    assert config.grad_clip is None
    assert config.seed == 3
    evaluation = config.get_evaluation_config_object()
    assert evaluation is not None
    assert evaluation.env_config["split"] == "validation"
    assert evaluation.env_config["max_completion_tokens"] == 24
    assert "split" not in config.env_config


def test_build_config_does_not_change_the_recipe(recipe_file: Path) -> None:
    recipe: Recipe = load_recipe(recipe_file, ["environment.env_config.max_prompt_tokens=20"])
    before = recipe.to_toml()
    recipe.build_config()
    assert recipe.to_toml() == before


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["run.algorithm=DistRL", "training.minibatch_size=100"], ["100", "256"]),
        (["training.minibatch_size=5000"], ["minibatch_size", "5000", "4000"]),
        (["run.model=./no/such/folder"], ["no/such/folder"]),
        (["rollout.max_completion_tokens=1000000"], ["1000000"]),
        (["training.grad_clip_by=foo"], ["grad_clip_by", "foo"]),
    ],
)
def test_impossible_combinations(recipe_file: Path, overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        load_recipe(recipe_file, overrides).build_config()
    for part in parts:
        assert part in str(caught.value)


DATA_RECIPE = """
[run]
model = "builtin:countdown-tiny"
[environment]
env = "distrl_envs:distrl/Math-v0"
[environment.env_config.task_config]
data = "rows.jsonl"
"""


def data_of(recipe: Recipe) -> object:
    return recipe.env_config["task_config"]["data"]


def test_paths_are_beside_the_recipe_then_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "work").mkdir()
    file = tmp_path / "recipes" / "own.toml"
    file.write_text(DATA_RECIPE)
    monkeypatch.chdir(tmp_path / "work")
    assert data_of(load_recipe(file)) == "rows.jsonl"  # nowhere: the task says so
    here, beside = tmp_path / "work" / "rows.jsonl", tmp_path / "recipes" / "rows.jsonl"
    here.write_text("{}")
    assert data_of(load_recipe(file)) == str(here)
    beside.write_text("{}")
    with pytest.raises(ValueError, match=r"'rows.jsonl' is both .*recipes.*work.*absolute"):
        load_recipe(file)
    key = "environment.env_config.task_config.data"
    assert data_of(load_recipe(file, [f"{key}=./rows.jsonl"])) == str(here)
    here.unlink()
    assert data_of(load_recipe(file)) == str(beside)
    tables = load_recipe(file, [f'{key}={{train = "rows.jsonl", test = "hf:gsm8k/test"}}'])
    assert data_of(tables) == {"train": "rows.jsonl", "test": "hf:gsm8k/test"}
    assert data_of(load_recipe(file, [f"{key}=hf:../recipes/test"])) == (
        f"hf:{tmp_path / 'recipes'}/test"
    )


def test_the_folder_of_a_local_model_is_stored_and_a_hub_id_is_not_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    file = tmp_path / "own.toml"
    file.write_text(DATA_RECIPE)
    monkeypatch.chdir(tmp_path)
    local = load_recipe(file, ["run.model=mine"])
    assert local.run.model == str(tmp_path / "mine")
    assert load_recipe(file, ["run.model=org/mine"]).run.model == "org/mine"
    stored = tmp_path / "run" / "recipe.toml"
    stored.parent.mkdir()
    stored.write_text(local.to_toml())
    monkeypatch.chdir(stored.parent)
    assert load_recipe(stored).run.model == str(tmp_path / "mine")
