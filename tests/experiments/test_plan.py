"""What may be compared with what."""

from __future__ import annotations

from pathlib import Path

import pytest

from rllib_distrl.experiments.comparison import Plan, make_plan, recipe_digest
from rllib_distrl.method.pipeline import Method
from rllib_distrl.method.registry import KINDS, names, resolve

RECIPE = """
[run]
model = "builtin:countdown-tiny"
[rollout]
prompts_per_iteration = 8
num_generations = 4
max_completion_tokens = 24
[environment]
env = "distrl_envs:distrl/Countdown-v0"
[training]
lr = 1e-3
shapers = [{ name = "length_power", alpha = 0.5 }]
"""
VARIANTS = """
recipe = "a.toml"
[base]
training = { minibatch_size = 16 }
[variants]
plain = {}
"kappa-0.5" = { part = "κ", training = { quantile_huber_kappa = 0.5, shapers = [] } }
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.toml").write_text(RECIPE)
    (tmp_path / "b.toml").write_text(RECIPE.replace("1e-3", "2e-3"))
    (tmp_path / "variants.toml").write_text(VARIANTS)
    return tmp_path


def plan(folder: Path, *files: str, seeds: int = 2, budget: int = 1000, **more: str) -> Plan:
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in more.items()]
    return make_plan(
        [folder / file for file in files],
        overrides,
        seeds=seeds,
        first_seed=5,
        budget_tokens=budget,
    )


def test_recipes_get_the_budget_and_seeds_come_one_after_the_other(folder: Path) -> None:
    found = plan(folder, "a.toml", "b.toml", training__gamma="0.5")
    assert [(c.name, seed) for c, seed in found.jobs()] == [("a", 5), ("b", 5), ("a", 6), ("b", 6)]
    for contender in found.contenders:
        assert contender.recipe.run.budget_tokens == 1000
        assert contender.recipe.tables["training"]["gamma"] == 0.5
    assert len({contender.digest for contender in found.contenders}) == 2


def test_variants_replace_settings_whole(folder: Path) -> None:
    plain, kappa = plan(folder, "variants.toml").contenders
    assert (plain.name, plain.part, kappa.name, kappa.part) == ("plain", "", "kappa-0.5", "κ")
    assert plain.recipe.tables["training"]["minibatch_size"] == 16
    assert plain.recipe.tables["training"]["shapers"] == [{"name": "length_power", "alpha": 0.5}]
    assert kappa.recipe.tables["training"]["shapers"] == []
    assert kappa.recipe.tables["training"]["lr"] == 1e-3


def test_a_variant_may_have_a_recipe_of_its_own(folder: Path) -> None:
    own = VARIANTS + 'other = { recipe = "b.toml", training = { gamma = 0.5 } }\n'
    (folder / "variants.toml").write_text(own)
    *_, other = plan(folder, "variants.toml").contenders
    training = other.recipe.tables["training"]
    assert (training["lr"], training["gamma"], training["minibatch_size"]) == (2e-3, 0.5, 16)


def test_the_digest_is_of_the_settings_but_not_of_the_seed(folder: Path) -> None:
    first = plan(folder, "a.toml", "b.toml", run__seed="1").baseline.digest
    assert plan(folder, "a.toml", "b.toml", run__seed="2").baseline.digest == first
    assert plan(folder, "a.toml", "b.toml", budget=1001).baseline.digest != first
    tables = plan(folder, "a.toml", "b.toml").baseline.recipe.to_dict()
    assert recipe_digest(tables) == first
    # A run of an earlier version lacks the settings that were added since.
    del tables["eval"]["token_problems"]
    assert recipe_digest(tables) == first
    tables["eval"]["n"] = 32
    assert recipe_digest(tables) != first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 1}, "1 seed.* no interval .*--seeds 2 or more"),
        ({"budget": 0}, "--budget-tokens: wanted at least 1, got 0"),
        ({"files": ("a.toml",)}, "nothing to compare with: give at least two recipes"),
        ({"files": ("a.toml", "a.toml")}, "Two recipes are called 'a'"),
        ({"training__lrr": "1"}, "Unknown key 'lrr'"),
        ({"training__minibatch_size": "7"}, "a: minibatch_size=7 does not divide"),
    ],
)
def test_what_cannot_be_compared(folder: Path, change: dict, message: str) -> None:
    files = change.pop("files", ("a.toml", "b.toml"))
    with pytest.raises(ValueError, match=message):
        plan(folder, *files, **change)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Countdown-v0", "Arithmetic-v0", "cannot be compared: environment.env is .*Countdown"),
        ("[run]", "[run]\nbudget_tokens = 77", "other has run.budget_tokens = 77, but all"),
        ("max_completion_tokens = 24", "max_completion_tokens = 25", "is 24 in .* 25 in the sec"),
        ("[training]", "[eval]\nn = 16\n[training]", "eval.n is 64 in the first and 16 in the sec"),
    ],
)
def test_tasks_evaluations_and_budgets_agree(
    folder: Path, old: str, new: str, message: str
) -> None:
    (folder / "other.toml").write_text(RECIPE.replace(old, new))
    with pytest.raises(ValueError, match=message):
        plan(folder, "a.toml", "other.toml")


def test_files_of_variants_are_checked(folder: Path) -> None:
    for text, message in {
        'recipe = "a.toml"': "needs recipe = .* and tables",
        VARIANTS.replace("plain = {}", "plain = { lr = 1 }"): "'lr' is not a table",
        VARIANTS.replace("gamma", "gama").replace("minibatch_size", "minibatch"): r"\[variants.pl",
        VARIANTS.replace("[base]", "[bases]"): "Unknown key 'bases'",
        VARIANTS.replace("plain =", '"a/b" ='): "'a/b' cannot name a folder",
    }.items():
        (folder / "bad.toml").write_text(text)
        with pytest.raises(ValueError, match=message):
            plan(folder, "bad.toml")


def test_a_control_may_promise_that_its_environment_is_the_same_task(folder: Path) -> None:
    control = VARIANTS + "control = { environment = { env_config = { seed = 1 } } }\n"
    for text, message in {
        control: "plain and control cannot be compared: environment.env_config is",
        control.replace("} } }", "} }, same_task = 1 }"): "same_task is 1; it must be true or fal",
    }.items():
        (folder / "bad.toml").write_text(text)
        with pytest.raises(ValueError, match=message):
            plan(folder, "bad.toml")
    (folder / "good.toml").write_text(control.replace("} } }", "} }, same_task = true }"))
    seeds = {c.name: c.recipe.env_config.get("seed") for c in plan(folder, "good.toml").contenders}
    assert seeds == {"plain": None, "kappa-0.5": None, "control": 1}


TUNE = Path(__file__).parents[2] / "tune"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["critic_batches", "critic_information", "sao", "unruly", "wide_law"]
)
def test_small_comparisons_can_be_planned(name: str) -> None:
    planned = make_plan([TUNE / f"{name}.toml"], [], seeds=8, first_seed=0, budget_tokens=60_000)
    assert len(planned.jobs()) == 8 * len(planned.contenders) >= 16


NOT_COMPARED = {"noise_backward", "noise_forward", "ucb_source"}


@pytest.mark.slow
def test_every_method_is_in_the_file_that_compares_them_and_can_be_planned() -> None:
    planned = make_plan([TUNE / "methods.toml"], [], seeds=4, first_seed=0, budget_tokens=200_000)
    assert len(planned.jobs()) == 4 * len(planned.contenders) > 300
    used: dict[str, set[str]] = {}
    for contender in planned.contenders:
        config = contender.recipe.build_config()
        if not hasattr(config, "rollout_settings"):
            continue
        method = Method.from_config(config)
        named = ("head", "prompt_sampler", "allocator")
        others = [resolve(kind, getattr(config, kind)) for kind in named]
        for stage in (*method.stages, *method.controllers, *others):
            used.setdefault(stage.method.kind, set()).add(stage.name)
    for kind in KINDS:
        if kind not in ("read_out", "bonus_statistic", "importance_correction", "branching"):
            assert set(names(kind)) - used[kind] <= NOT_COMPARED
