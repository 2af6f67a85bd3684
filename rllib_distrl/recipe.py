"""Recipes: a training run as TOML data.

Three tables are ours: `[run]`, `[rollout]` and `[eval]`. Every other table is one of RLlib's
builder methods and is applied as `getattr(config, table)(**values)`, so RLlib's documentation of
`AlgorithmConfig` is the documentation of a recipe.

Files and folders that a recipe names are found beside it, and written down absolute: so a run goes
on from any folder, and the name of a local model never becomes an id on the hub.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distrl_envs.data import HUB_PREFIX
from rllib_distrl.files import content_hash, model_hash
from rllib_distrl.recipe_schema import (
    BUILDER_TABLES,
    builder_parameters,
    check_environment,
    check_names,
    check_value,
    is_none,
    nearest,
)
from rllib_distrl.settings import EvalTable, RolloutSettings, RunSettings

if TYPE_CHECKING:
    from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

OWN_TABLES = ("run", "rollout", "eval")
_OVERRIDE = re.compile(r"(?P<path>[A-Za-z_]\w*(\.[A-Za-z_]\w*)+)=(?P<value>.*)", re.DOTALL)
_BARE_WORD = re.compile(r"[A-Za-z_./~][^\s\"'\[\]{}=#,]*")


@dataclass(frozen=True)
class Recipe:
    """A validated recipe.

    Attributes:
        run: The `[run]` table.
        rollout: The `[rollout]` table.
        eval: The `[eval]` table.
        tables: {builder method: its keyword arguments}, as the recipe gives them.
    """

    run: RunSettings
    rollout: RolloutSettings
    eval: EvalTable
    tables: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def env_id(self) -> str:
        """The Gymnasium id of the environment, in its `module:id` form."""
        return self.tables["environment"]["env"]

    @property
    def env_config(self) -> dict[str, Any]:
        """The environment's keyword arguments that the recipe gives."""
        return dict(self.tables["environment"].get("env_config", {}))

    def build_config(self) -> AlgorithmConfig:
        """Returns the validated RLlib configuration; starts neither Ray nor a model.

        Raises:
            ValueError: Where RLlib or the algorithm refuses the combination of settings, where
                there is no such model, its tokenizer has no EOS or its window is too short.
        """
        from rllib_distrl.algorithm.registry import algorithm_config
        from rllib_distrl.algorithm.wiring import check_window, wire_language_model
        from rllib_distrl.model.loading import load_tokenizer
        from rllib_distrl.rollout.pool_metrics import time_validations

        load_tokenizer(self.run.model)
        check_window(self.run.model, self.rollout.max_completion_tokens)
        config = algorithm_config(self.run.algorithm)
        config.debugging(seed=self.run.seed)
        # RLlib's means are over the last 100 episodes, whatever the size of an iteration.
        episodes = self.rollout.prompts_per_iteration * self.rollout.num_generations
        config.reporting(metrics_num_episodes_for_smoothing=episodes)
        if self.eval.interval:
            config.evaluation(**self._validation_settings())
        time_validations(config)
        for table in BUILDER_TABLES:
            if table in self.tables:
                _apply(config, table, self.tables[table])
        config = wire_language_model(config, self.run.model, self.rollout)
        config.validate()
        return config

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Returns the recipe with our tables' defaults filled in, ready for TOML."""
        own = {
            table: {k: v for k, v in getattr(self, table).to_dict().items() if v is not None}
            for table in OWN_TABLES
        }
        return _plain(own | dict(self.tables))

    def to_toml(self) -> str:
        """Returns the resolved recipe as TOML text that `load_recipe` reads back."""
        import tomli_w

        return tomli_w.dumps(self.to_dict())

    @property
    def eval_settings(self) -> EvalTable:
        """The `[eval]` table with what it leaves to the other tables filled in."""
        filled = {
            "max_tokens": self.rollout.max_completion_tokens,
            "seed": self.run.seed,
            "max_batch_size": self.rollout.max_batch_size,
        }
        missing = {key: v for key, v in filled.items() if getattr(self.eval, key) is None}
        return self.eval.changed(**missing)

    def _validation_settings(self) -> dict[str, Any]:
        """RLlib's evaluation on the validation split, sampled as in training."""
        episodes = self.eval.validation_problems * self.rollout.evaluation_generations
        return {
            "evaluation_interval": self.eval.interval,
            "evaluation_duration": episodes,
            "evaluation_duration_unit": "episodes",
            "evaluation_config": {
                "env_config": {"split": "validation"},
                "explore": True,
                "metrics_num_episodes_for_smoothing": episodes,
            },
        }


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads, overrides and checks a recipe.

    Args:
        path: A TOML file.
        overrides: `table.key=value` items; the value is TOML, and a bare word is a string.

    Raises:
        ValueError: For an unreadable file, an unknown table or key (naming the nearest one), a
            value of the wrong type, or a number outside its bounds.
    """
    path = Path(path)
    return recipe_from_tables(read_recipe(path, overrides), name=path.stem)


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The tables of a recipe, unchecked, with its paths absolute.

    Those that the recipe names are looked for beside it, those of overrides in the working
    directory.

    Raises:
        ValueError: For an unreadable file, an override that cannot be applied or a path that could
            be either of two.
    """
    tables = read_toml(path)
    replaced = {override.partition("=")[0] for override in overrides}
    locate(tables, path.parent, leave=frozenset(replaced))
    override_tables(tables, overrides)
    locate(tables, Path.cwd())
    return tables


def recipe_from_tables(tables: Mapping[str, Any], name: str) -> Recipe:
    """Checks the tables of a parsed recipe; `name` stands in where `[run]` has none.

    Raises:
        ValueError: See `load_recipe`.
    """
    from rllib_distrl.algorithm.registry import algorithm_config

    for table, values in tables.items():
        _check_table(table, values)
    run = RunSettings(**tables.get("run", {}))
    run = run.model_copy(update={"name": run.name or name})
    run.check_machine()
    rollout = RolloutSettings(**tables.get("rollout", {}))
    rollout.check_machine()
    evaluation = EvalTable(**tables.get("eval", {}))
    config = algorithm_config(run.algorithm)
    builders = {table: tables[table] for table in BUILDER_TABLES if table in tables}
    for table, values in builders.items():
        _check_builder_table(config, table, values)
    _check_seed(builders)
    check_environment(builders.get("environment", {}))
    return Recipe(run=run, rollout=rollout, eval=evaluation, tables=builders)


def read_toml(path: Path) -> dict[str, Any]:
    """Reads a TOML file.

    Raises:
        ValueError: If it is missing, is not a file, or is not TOML.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder. Give a recipe file, for example {path}/NAME.toml.")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"There is no recipe at {path}.{_similar_file(path)}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}.") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None


def _similar_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f" The folder {path.parent} does not exist."
    name = nearest(path.name, (p.name for p in path.parent.glob("*.toml")))
    return f" The nearest file is {path.parent / name}." if name else ""


def override_tables(tables: dict[str, Any], overrides: Sequence[str]) -> None:
    """Applies `table.key=value` items to the tables of a recipe, in place.

    Raises:
        ValueError: For an item that cannot be read or applied.
    """
    for override in overrides:
        _override(tables, override)


def _override(tables: dict[str, Any], text: str) -> None:
    match = _OVERRIDE.fullmatch(text)
    if match is None:
        raise ValueError(
            f"Cannot read the override {text!r}. "
            "Write table.key=value, for example training.lr=3e-4."
        )
    *parents, key = match["path"].split(".")
    target: Any = tables
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise ValueError(f"Cannot apply {text!r}: {parent!r} is not a table in this recipe.")
    target[key] = _toml_value(match["path"], match["value"].strip())


def _toml_value(path: str, text: str) -> Any:
    """Parses a TOML value; a bare word is a string."""
    try:
        parsed = tomllib.loads(f"value = {text}")
        if list(parsed) == ["value"]:
            return parsed["value"]
    except tomllib.TOMLDecodeError:
        if _BARE_WORD.fullmatch(text):
            return text
        if "," in text and not text.startswith(("[", "{")):  # eval.k=1,2
            return _toml_value(path, f"[{text}]")
    raise ValueError(f"{path}: cannot read the value {text!r}. Quote strings, as in '\"a b\"'.")


def _check_table(table: str, values: Any) -> None:
    known = (*OWN_TABLES, *BUILDER_TABLES)
    if not isinstance(values, Mapping):
        raise ValueError(
            f"{table!r} stands outside of any table. Put it below a header such as [run]."
        )
    if table not in known:
        raise ValueError(f"Unknown table [{table}]. The nearest one is [{nearest(table, known)}].")


def _check_builder_table(config: Any, table: str, values: Mapping[str, Any]) -> None:
    parameters = builder_parameters(config, table)
    check_names(f"[{table}]", values, parameters)
    for key, value in values.items():
        check_value(f"{table}.{key}", value, parameters[key], getattr(config, key, None))
    if table == "evaluation":
        known = {k for name in BUILDER_TABLES for k in builder_parameters(config, name)}
        check_names("[evaluation.evaluation_config]", values.get("evaluation_config", {}), known)


def _check_seed(tables: Mapping[str, Any]) -> None:
    if "seed" in tables.get("debugging", {}):
        raise ValueError("debugging.seed is set by run.seed. Remove debugging.seed.")


def _apply(config: AlgorithmConfig, table: str, values: Mapping[str, Any]) -> None:
    parameters = builder_parameters(config, table)
    arguments = {
        key: None if is_none(value, parameters[key]) else _plain(value)
        for key, value in values.items()
    }
    try:
        getattr(config, table)(**arguments)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"[{table}]: RLlib refuses these values: {error}.") from error


def _plain(value: Any) -> Any:
    """A deep copy made of dicts and lists, so that RLlib never edits the recipe."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


_FILES = (".jsonl", ".csv", ".parquet")
# Settings whose value may be a path, in any table.
_PATHS = ("data", "model", "tokenizer", "samples", "critic_checkpoint")
# Those whose content decides what is learned.
_CONTENT = ("data", "samples")
_MODELS = ("model", "tokenizer")


def locate(tables: dict[str, Any], folder: Path, leave: frozenset[str] = frozenset()) -> None:
    """Makes the paths of a recipe absolute, in place.

    A relative path is looked for beside the recipe, then in the working directory. What is in
    neither stays as it is: it may be an id on the hub.

    Args:
        tables: Of the recipe.
        folder: That the recipe lies in.
        leave: Dotted names of settings that are left alone.

    Raises:
        ValueError: If both folders hold the name, and not the same thing under it.
    """
    for table, key, dotted in _paths(tables, ""):
        if dotted not in leave:
            table[key] = _located(dotted, table[key], folder)


def content_hashes(tables: Mapping[str, Any]) -> dict[str, str]:
    """Hashes of the data and models that a recipe learns from, by "table.key" of the setting.

    What is on the hub has none: the hub's address says what it is.
    """
    found = {}
    for table, key, dotted in _paths(tables, ""):
        place = _split_hub(table[key])[1]
        if key in _MODELS and Path(place).is_absolute() and (digest := model_hash(place)):
            found[dotted] = digest
        decides = any(name in _CONTENT for name in dotted.split("."))
        if decides and Path(place).is_absolute() and Path(place).exists():
            found[dotted] = content_hash(Path(place))
    return found


def _paths(node: Any, prefix: str, within: bool = False) -> Iterator[tuple[Any, str, str]]:
    """Tables that hold a path, its key, and its dotted name; `data` may be a table of paths."""
    for key, value in node.items():
        dotted, meant = f"{prefix}{key}", within or key in _PATHS
        if isinstance(value, Mapping):
            yield from _paths(value, f"{dotted}.", key == "data")
        elif isinstance(value, str) and (meant or value.endswith(_FILES)):
            yield node, key, dotted


def _located(dotted: str, text: str, folder: Path) -> str:
    prefix, place, split = _split_hub(text)
    path = Path(place).expanduser()
    if not place or path.is_absolute():
        return f"{prefix}{path}{split}" if place else text
    beside, here = folder.absolute() / path, Path.cwd() / path
    found = [candidate for candidate in (beside, here) if candidate.exists()]
    if len(found) == 2 and not beside.samefile(here):
        raise ValueError(
            f"{dotted} = {text!r} is both {beside} (beside the recipe) and {here} (in the working "
            "directory). Write the one that is meant as an absolute path."
        )
    return f"{prefix}{_normal(found[0])}{split}" if found else text


def _split_hub(text: str) -> tuple[str, str, str]:
    """`hf:./folder/split` in its three parts; other data on the hub has no place here."""
    if not text.startswith(HUB_PREFIX):
        return "", text, ""
    address = text.removeprefix(HUB_PREFIX)
    if not address.startswith(("/", "./", "../", "~")):
        return text, "", ""
    place, _, split = address.rpartition("/")
    return HUB_PREFIX, place, f"/{split}"


def _normal(path: Path) -> Path:
    """Without `.` and `..`; links stay, for a link may be meant to move."""
    return Path(*path.parts) if ".." not in path.parts else path.parent.resolve() / path.name
