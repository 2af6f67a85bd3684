"""What a comparison runs: contenders, seeds and one budget of tokens for all."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rllib_distrl.recipe import (
    Recipe,
    load_recipe,
    locate,
    override_tables,
    read_recipe,
    read_toml,
    recipe_from_tables,
)
from rllib_distrl.recipe_schema import check_names
from rllib_distrl.settings import EvalTable, RolloutSettings, RunSettings

MIN_SEEDS = 2
_NAME = re.compile(r"[\w][\w.+-]*")
_VARIANTS_FILE = ("recipe", "base", "variants")
_ABOUT = ("recipe", "part", "same_task")  # of a variant, beside its settings


@dataclass(frozen=True)
class Contender:
    """One recipe of a comparison.

    Attributes:
        name: Names it in tables, figures and folders.
        recipe: Its settings; seed and budget are the comparison's.
        part: The part of the method that it varies; empty outside of ablations.
        same_task: Its file's word that its environment, where it is another, asks and grades held
            out problems as the others' do: a control that tells learners something else.
    """

    name: str
    recipe: Recipe
    part: str = ""
    same_task: bool = False

    @property
    def digest(self) -> str:
        """See `recipe_digest`."""
        return recipe_digest(self.recipe.to_dict())


def recipe_digest(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """A hash of a recipe's settings but name and seed, 12 hexadecimal digits.

    Settings of our own tables that have their default do not count, so that a setting that a later
    version adds does not make another recipe of it.

    Args:
        tables: Of the resolved recipe, as `Recipe.to_dict` gives them.
    """
    kept = {table: dict(values) for table, values in tables.items()}
    for table, cls in (("run", RunSettings), ("rollout", RolloutSettings), ("eval", EvalTable)):
        defaults = cls.defaults()
        kept[table] = {
            key: value
            for key, value in kept[table].items()
            if key not in ("name", "seed") and value != _as_toml(defaults.get(key))
        }
    text = json.dumps(kept, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def _as_toml(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class Plan:
    """Contenders times seeds.

    Attributes:
        contenders: The first is the baseline.
        seeds: Every contender runs with each of them.
        budget_tokens: Completion tokens that each run generates.
    """

    contenders: tuple[Contender, ...]
    seeds: tuple[int, ...]
    budget_tokens: int

    @property
    def baseline(self) -> Contender:
        """What the others are compared with."""
        return self.contenders[0]

    def jobs(self) -> list[tuple[Contender, int]]:
        """All runs, one seed after the other, so that an unfinished comparison is balanced."""
        return [(contender, seed) for seed in self.seeds for contender in self.contenders]


def make_plan(
    files: Sequence[Path],
    overrides: Sequence[str],
    *,
    seeds: int,
    first_seed: int,
    budget_tokens: int,
) -> Plan:
    """Reads recipes and files of variants, and checks that they can be compared.

    Args:
        files: Recipes; or files with `recipe = "…"`, a table `[base]` of settings for all
            variants, and tables `[variants.NAME]` of settings that replace the recipe's; a variant
            may name a recipe of its own, and promise `same_task` (see `Contender`).
        overrides: `table.key=value` items for all of them.
        seeds: How many.
        first_seed: They are this one and those that follow.
        budget_tokens: Of each run.

    Raises:
        ValueError: For recipes that differ in task, evaluation or budget, or share a name; for
            fewer than 2 seeds or contenders; for anything that `distrl train` would refuse.
    """
    if seeds < MIN_SEEDS:
        raise ValueError(
            f"{seeds} seed(s) give no interval and no paired test. Give --seeds {MIN_SEEDS} or "
            "more; 8 or more before believing a difference."
        )
    if budget_tokens < 1:
        raise ValueError(f"--budget-tokens: wanted at least 1, got {budget_tokens}.")
    found = [contender for file in files for contender in _read(file, overrides)]
    if len(found) < 2:
        raise ValueError("There is nothing to compare with: give at least two recipes.")
    _check_names(found)
    _check_same_task(found)
    _check_budgets(found, budget_tokens)
    contenders = tuple(_with_budget(contender, budget_tokens) for contender in found)
    for contender in contenders:
        try:
            contender.recipe.build_config()
        except ValueError as error:
            raise ValueError(f"{contender.name}: {error}") from error
    return Plan(contenders, tuple(range(first_seed, first_seed + seeds)), budget_tokens)


def _read(file: Path, overrides: Sequence[str]) -> list[Contender]:
    tables = read_toml(file)
    if "variants" in tables or "recipe" in tables:
        return _read_variants(file, tables, overrides)
    recipe = load_recipe(file, overrides)
    return [Contender(recipe.run.name, recipe)]


def _read_variants(
    file: Path, tables: Mapping[str, Any], overrides: Sequence[str]
) -> list[Contender]:
    check_names(f"{file}", tables, _VARIANTS_FILE)
    variants, source = tables.get("variants"), tables.get("recipe")
    if not isinstance(source, str) or not isinstance(variants, Mapping) or not variants:
        raise ValueError(
            f'{file}: a file of variants needs recipe = "FILE.toml" and tables [variants.NAME].'
        )
    contenders = []
    for name, changes in variants.items():
        recipe = read_recipe(file.parent / changes.get("recipe", source))
        part = changes.get("part", "")
        _replace(recipe, tables.get("base", {}), f"{file}: [base]")
        settings = {table: values for table, values in changes.items() if table not in _ABOUT}
        _replace(recipe, settings, f"{file}: [variants.{name}]")
        locate(recipe, file.parent)
        override_tables(recipe, overrides)
        locate(recipe, Path.cwd())
        try:
            resolved = recipe_from_tables(recipe, name)
        except ValueError as error:
            raise ValueError(f"{file}: [variants.{name}]: {error}") from error
        if not isinstance(promise := changes.get("same_task", False), bool):
            raise ValueError(
                f"{file}: [variants.{name}]: same_task is {promise!r}; it must be true or false."
            )
        contenders.append(Contender(name, resolved, part, promise))
    return contenders


def _replace(recipe: dict[str, Any], changes: Mapping[str, Any], where: str) -> None:
    """Puts settings into a recipe's tables in place; a setting is replaced whole."""
    for table, values in changes.items():
        if not isinstance(values, Mapping):
            raise ValueError(f"{where}: {table!r} is not a table. Write TABLE.KEY = VALUE.")
        recipe[table] = {**recipe.get(table, {}), **values}


def _with_budget(contender: Contender, budget_tokens: int) -> Contender:
    changes = {"budget_tokens": budget_tokens, "name": contender.name}
    run = contender.recipe.run.model_copy(update=changes)
    return replace(contender, recipe=replace(contender.recipe, run=run))


def _check_names(contenders: Sequence[Contender]) -> None:
    names = [contender.name for contender in contenders]
    for name in names:
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"{name!r} cannot name a folder. Use letters, digits, '-', '_', '.', '+'."
            )
        if names.count(name) > 1:
            raise ValueError(f"Two recipes are called {name!r}. Give one another run.name.")


def _task(recipe: Recipe) -> dict[str, Any]:
    """What must agree for two numbers to be comparable."""
    evaluation = recipe.to_dict()["eval"]
    kept = ("problems", "n", "split", "temperature", "top_p")
    return {
        "environment.env": recipe.env_id,
        "environment.env_config": recipe.env_config,
        "rollout.max_completion_tokens": recipe.rollout.max_completion_tokens,
        **{f"eval.{key}": evaluation[key] for key in kept},
    }


def _check_same_task(contenders: Sequence[Contender]) -> None:
    first, *others = contenders
    wanted = _task(first.recipe)
    for other in others:
        got = _task(other.recipe)
        for key, value in wanted.items():
            if other.same_task and key == "environment.env_config":
                continue
            if got[key] != value:
                raise ValueError(
                    f"{first.name} and {other.name} cannot be compared: {key} is {value!r} in the "
                    f"first and {got[key]!r} in the second. Give both the same, for example with "
                    f"{key}=... after the recipes."
                )


def _check_budgets(contenders: Sequence[Contender], budget_tokens: int) -> None:
    for contender in contenders:
        own = contender.recipe.run.budget_tokens
        if own not in (0, budget_tokens):
            raise ValueError(
                f"{contender.name} has run.budget_tokens = {own:,}, but all recipes are compared "
                f"at --budget-tokens {budget_tokens:,}. Remove it from the recipe, or compare at "
                f"that budget."
            )
