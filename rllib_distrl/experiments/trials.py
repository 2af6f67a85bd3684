"""Trials of a sweep: what they search, `SPACE.toml`, Ray Tune's part in that, and one of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray import tune

from rllib_distrl.experiments.training import Row, RunLength, Training
from rllib_distrl.recipe import Recipe, read_toml, recipe_from_tables
from rllib_distrl.recipe_schema import check_names
from rllib_distrl.runs.log import tokens_generated
from rllib_distrl.settings import SweepSettings

ITERATIONS, TOKENS = "iterations", "tokens"  # what trials report of their length
KINDS = ("choice", "uniform", "log_uniform", "integer")
_TABLES = ("sweep", "space")
_REDUCTION = 3  # ASHA keeps the best third at each rung
_NEVER = 10**12  # tokens
MISSING_METRIC = "missing_metric"
_REPORT = "report.json"


@dataclass(frozen=True)
class Range:
    """The values of one setting.

    Attributes:
        kind: "choice" of the values; "uniform", "log_uniform" or "integer" between two of them,
            both included.
        values: The choices, or the two bounds.
    """

    kind: str
    values: tuple[Any, ...]

    def domain(self, *, grid: bool) -> Any:
        """The same for Ray Tune."""
        if self.kind == "choice":
            choices = list(self.values)
            return tune.grid_search(choices) if grid else tune.choice(choices)
        low, high = self.values
        if self.kind == "integer":
            return tune.randint(low, high + 1)
        return (tune.loguniform if self.kind == "log_uniform" else tune.uniform)(low, high)


@dataclass(frozen=True)
class Space:
    """A checked `SPACE.toml`.

    Attributes:
        settings: The `[sweep]` table.
        ranges: {"table.key": what it may be}.
    """

    settings: SweepSettings
    ranges: Mapping[str, Range] = field(default_factory=dict)

    def param_space(self) -> dict[str, Any]:
        """{setting: Ray Tune's domain}."""
        grid = self.settings.search == "grid"
        return {key: found.domain(grid=grid) for key, found in self.ranges.items()}


def load_space(path: Path, recipe: Recipe) -> Space:
    """Reads a space and checks it against the recipe whose settings it varies.

    Args:
        path: A TOML file with the tables `[sweep]` and `[space]`; in the latter
            `"training.lr" = { log_uniform = [1e-4, 1e-3] }`.
        recipe: The recipe.

    Raises:
        ValueError: For an unknown setting (naming the nearest), a value that it cannot have, a
            range that is none, or a combination of search and scheduler that does not go.
    """
    tables = read_toml(path)
    check_names(str(path), tables, _TABLES)
    settings = SweepSettings(**tables.get("sweep", {}))
    listed = tables.get("space", {})
    if not listed:
        raise ValueError(f'{path}: [space] is empty. Name a setting: "training.lr" = {{...}}.')
    ranges = {key: _range(key, given) for key, given in listed.items()}
    _check_methods(settings, ranges)
    for key, found in ranges.items():
        for value in found.values:
            with_settings(recipe.to_dict(), {key: value}, recipe.run.name)
    return Space(settings, ranges)


def with_settings(
    tables: Mapping[str, Mapping[str, Any]], values: Mapping[str, Any], name: str
) -> Recipe:
    """Returns the recipe of `tables` with some settings replaced.

    Args:
        tables: Of the recipe.
        values: {"table.key": value}; deeper keys reach into tables such as `env_config`.
        name: Stands in where `[run]` has none.

    Raises:
        ValueError: For an unknown setting or a value that it cannot have.
    """
    changed: dict[str, Any] = {table: dict(settings) for table, settings in tables.items()}
    for path, value in values.items():
        *parents, key = path.split(".")
        if not parents:
            raise ValueError(f'[space] {path!r} names no table. Write "training.{path}" = ...')
        target = changed
        for parent in parents:
            target[parent] = dict(target.get(parent, {}))
            target = target[parent]
        target[key] = value
    try:
        return recipe_from_tables(changed, name)
    except ValueError as error:
        shown = ", ".join(f"{key} = {value!r}" for key, value in values.items())
        raise ValueError(f"[space] {shown}: {error}") from error


def _range(key: str, given: Any) -> Range:
    where = f"[space] {key!r}"
    if not isinstance(given, Mapping) or len(given) != 1:
        raise ValueError(f"{where}: wanted one of {', '.join(KINDS)}, as {{ choice = [1, 2] }}.")
    ((kind, values),) = given.items()
    check_names(where, [kind], KINDS)
    if not isinstance(values, list) or not values:
        raise ValueError(f"{where}: {kind} wants a list, got {values!r}.")
    if kind != "choice":
        _check_bounds(where, kind, values)
    return Range(kind, tuple(values))


def _check_bounds(where: str, kind: str, values: list[Any]) -> None:
    wanted = int if kind == "integer" else (int, float)
    plain = all(isinstance(v, wanted) and not isinstance(v, bool) for v in values)
    if len(values) != 2 or not plain or values[0] >= values[1]:
        raise ValueError(f"{where}: {kind} wants two bounds, the smaller first, got {values!r}.")
    if kind == "log_uniform" and values[0] <= 0:
        raise ValueError(f"{where}: log_uniform wants bounds above 0, got {values!r}.")


def _check_methods(settings: SweepSettings, ranges: Mapping[str, Range]) -> None:
    if settings.search == "grid":
        for key, found in ranges.items():
            if found.kind != "choice":
                raise ValueError(
                    f"[space] {key!r} is {found.kind}, but search = 'grid' tries lists of values. "
                    "Write { choice = [...] }, or search = 'random'."
                )
    if settings.scheduler == "pbt" and settings.search != "random":
        raise ValueError(
            f"scheduler = 'pbt' changes settings itself and needs search = 'random', got "
            f"{settings.search!r}."
        )


def search_algorithm(space: Space, max_concurrent: int) -> Any:
    """The searcher.

    Args:
        space: What to search.
        max_concurrent: Trials at once; 0: no bound. Tune's own `max_concurrent_trials` is ignored
            beside a `BasicVariantGenerator` (Ray 2.60, tune.py:803), so it is set here.

    Raises:
        ValueError: If it is not installed.
    """
    settings = space.settings
    if settings.search != "optuna":
        from ray.tune.search.basic_variant import BasicVariantGenerator

        return BasicVariantGenerator(random_state=settings.seed, max_concurrent=max_concurrent)
    try:
        import optuna
    except ModuleNotFoundError:
        raise ValueError(
            "search = 'optuna' needs Optuna: pip install 'rllib-distrl[optuna]'. Or choose "
            "search = 'random'."
        ) from None
    from ray.tune.search import ConcurrencyLimiter
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    searcher = OptunaSearch(seed=settings.seed)
    return ConcurrencyLimiter(searcher, max_concurrent) if max_concurrent else searcher


def scheduler(space: Space, recipe: Recipe) -> Any:
    """The scheduler; "asha" compares trials at equal tokens if they have a budget of them."""
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining

    settings = space.settings
    budget = recipe.run.budget_tokens
    if settings.scheduler == "asha":
        longest = budget or recipe.run.iterations
        grace = min(settings.grace_tokens if budget else settings.grace_iterations, longest)
        return ASHAScheduler(
            time_attr=TOKENS if budget else ITERATIONS,
            # The budget ends a trial itself, and may be passed within an iteration.
            max_t=_NEVER if budget else longest,
            grace_period=grace,
            reduction_factor=_REDUCTION,
        )
    if settings.scheduler == "pbt":
        return PopulationBasedTraining(
            time_attr=ITERATIONS,
            perturbation_interval=settings.perturbation_interval,
            hyperparam_mutations={"space": space.param_space()},
        )
    return FIFOScheduler()


class RecipeTrial(tune.Trainable):
    """Trains a recipe's algorithm; reports after every validation, or after every iteration.

    Its config holds `recipe` (tables), `name`, `metric` and `space` ({"table.key": value}).
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Builds the algorithm."""
        self._recipe = trial_recipe(config)
        self._report: dict[str, Any] = {ITERATIONS: 0, "done": False}
        algo = self._recipe.build_config().build_algo()
        self._training = Training(algo, RunLength.of(self._recipe.run))

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Becomes another trial in the same process, which saves the imports."""
        self._training.algo.stop()
        self.setup(new_config)
        return True

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> Any:
        """What the algorithm asks for, so that no more trials run than fit."""
        try:
            algorithm_config: Any = trial_recipe(config).build_config()
        except ValueError:  # `setup` raises it again, where it fails one trial and not the sweep
            return tune.PlacementGroupFactory([{"CPU": 1}])
        return algorithm_config.algo_class.default_resource_request(algorithm_config)

    def step(self) -> dict[str, Any]:
        """Trains up to the next validation, or to the end and validates there.

        A trial that was over when it was saved trains no more; it reports the same again.
        """
        if self._report["done"]:
            return self._report
        training = self._training
        for _ in range(self._recipe.eval.interval or 1):
            training.step()
            if training.over:
                break
        row = training.validate() if self._recipe.eval.interval else training.row
        self._report = self._reported(row, over=training.over)
        return self._report

    def _reported(self, row: Row, *, over: bool) -> dict[str, Any]:
        tokens = tokens_generated(row) or 0
        kept: Row = {key: value for key, value in row.items() if value is not None}
        iterations = kept.pop("iteration")
        for name in ("done", "training_iteration", "pid", "timestamp"):
            kept.pop(name, None)  # Tune's own
        missing = self.config["metric"] not in kept
        if missing:
            kept[MISSING_METRIC] = ", ".join(sorted(kept))
            kept[self.config["metric"]] = float("nan")
        return {**kept, ITERATIONS: iterations, TOKENS: tokens, "done": over or missing}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Writes the algorithm's state and what it reported last."""
        self._training.algo.save_to_path(str(Path(checkpoint_dir).resolve() / "algorithm"))
        (Path(checkpoint_dir) / _REPORT).write_text(json.dumps(self._report), encoding="utf-8")

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Continues from there."""
        folder = Path(checkpoint)
        self._training.algo.restore_from_path(str((folder / "algorithm").resolve()))
        self._report = json.loads((folder / _REPORT).read_text(encoding="utf-8"))
        self._training.row = {"iteration": self._report[ITERATIONS]}

    def cleanup(self) -> None:
        """Stops the algorithm's actors."""
        self._training.algo.stop()


class StopWithoutMetric(tune.Stopper):
    """Ends the whole sweep at the first trial that does not report the metric."""

    def __init__(self) -> None:
        self._missing = False

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Looks at a trial's report."""
        self._missing = self._missing or MISSING_METRIC in result
        return self._missing

    def stop_all(self) -> bool:
        """Whether the sweep ends."""
        return self._missing


def trial_recipe(config: dict[str, Any]) -> Recipe:
    """The recipe of a trial's config."""
    return with_settings(config["recipe"], config["space"], config["name"])
