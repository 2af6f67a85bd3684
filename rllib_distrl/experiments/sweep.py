"""A sweep on Ray Tune: running it, its best trial, and its trials at equal average scores."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rllib_distrl.experiments.results import AVERAGE, validated
from rllib_distrl.experiments.statistics import ValidationFit
from rllib_distrl.experiments.trials import (
    ITERATIONS,
    MISSING_METRIC,
    TOKENS,
    RecipeTrial,
    Space,
    StopWithoutMetric,
    scheduler,
    search_algorithm,
    trial_recipe,
    with_settings,
)
from rllib_distrl.files import write_atomic
from rllib_distrl.recipe import Recipe
from rllib_distrl.recipe_schema import nearest

_SWEEP_FILE = "sweep.json"
TRIALS = "tune"
_ERROR = "error"
# Trials copy the checkpoints of others, which must still be there when they come to it.
_PBT_CHECKPOINTS = 4


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found.

    Attributes:
        frame: One row per trial, the best first: its settings, the metric, iterations, tokens,
            seconds, error ("" if it ended well) and folder.
        best: The recipe of the best trial.
        tied: Trials whose metric is as good as the best one's, itself included; `best` is the
            first of them, a choice that nothing measured supports where there are several.
    """

    frame: pd.DataFrame
    best: Recipe
    tied: int


def run_sweep(
    recipe: Recipe, space: Space, out: Path, *, resume: bool = False, max_concurrent: int = 0
) -> SweepResult:
    """Runs the trials, as many at once as their resources allow, and ranks them.

    Ray must be running. A failed trial does not stop the others.

    Args:
        recipe: Where the settings that are not searched come from.
        space: What to search.
        out: Gets `trials.parquet`, `best.toml` and Tune's own folder.
        resume: Continue the sweep in there: finished trials are kept, others go on from their
            checkpoints, failed ones start again.
        max_concurrent: Trials at once; 0: what the resources allow.

    Raises:
        ValueError: If `out` holds another sweep, none to resume, or one while not resuming; if no
            trial reports the metric, or none ended well.
    """
    described = {"recipe": recipe.to_dict(), "space": _described(space)}
    _check_folder(out, described, resume)
    write_atomic(out / _SWEEP_FILE, json.dumps(described, indent=1) + "\n")
    from ray.tune import ExperimentAnalysis

    _tuner(recipe, space, out, resume, max_concurrent).fit()
    trials = ExperimentAnalysis(str((out / TRIALS).resolve())).trials or []
    _check_metric(trials, space.settings.metric)
    frame = _frame(trials, space)
    frame.to_parquet(out / "trials.parquet")
    ended = _ended(frame, space)
    values = {key: _plain(ended.iloc[0][key]) for key in space.ranges}
    best = with_settings(recipe.to_dict(), values, recipe.run.name)
    write_atomic(out / "best.toml", best.to_toml())
    metric = ended[space.settings.metric]
    return SweepResult(frame, best, tied=int((metric == metric.iloc[0]).sum()))


def read_trials(out: Path) -> pd.DataFrame:
    """The frame of a finished sweep, see `SweepResult`.

    Raises:
        ValueError: If there is none.
    """
    path = out / "trials.parquet"
    if not path.is_file():
        raise ValueError(f"There is no finished sweep in {out}.")
    return pd.read_parquet(path)


def _described(space: Space) -> dict[str, Any]:
    ranges = {key: {found.kind: list(found.values)} for key, found in space.ranges.items()}
    return {"sweep": vars(space.settings), "space": ranges}


def _check_folder(out: Path, described: Mapping[str, Any], resume: bool) -> None:
    file = out / _SWEEP_FILE
    if not resume and file.is_file():
        raise ValueError(
            f"{out} already holds a sweep. Continue it with --resume, or name another."
        )
    if resume and not file.is_file():
        raise ValueError(f"There is no sweep to resume in {out}. Start it without --resume.")
    if resume and json.loads(file.read_text(encoding="utf-8")) != json.loads(json.dumps(described)):
        raise ValueError(
            f"The sweep in {out} was started with another recipe or space, see {file}. Resume with "
            "the same ones, or start another sweep with --out."
        )
    out.mkdir(parents=True, exist_ok=True)


def _tuner(recipe: Recipe, space: Space, out: Path, resume: bool, max_concurrent: int) -> Any:
    from ray import tune

    folder = (out / TRIALS).resolve()
    if resume and tune.Tuner.can_restore(str(folder)):
        return tune.Tuner.restore(
            str(folder), trainable=RecipeTrial, resume_errored=True, restart_errored=False
        )
    settings = space.settings
    pbt = settings.scheduler == "pbt"
    interval = max(1, settings.perturbation_interval // (recipe.eval.interval or 1))
    return tune.Tuner(
        RecipeTrial,
        param_space={
            "recipe": recipe.to_dict(),
            "name": recipe.run.name,
            "metric": settings.metric,
            "space": space.param_space(),
        },
        tune_config=tune.TuneConfig(
            metric=settings.metric,
            mode=settings.mode,
            search_alg=search_algorithm(space, max_concurrent),
            scheduler=scheduler(space, recipe),
            num_samples=1 if settings.search == "grid" else settings.trials,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=TRIALS,
            storage_path=str(out.resolve()),
            stop=StopWithoutMetric(),
            checkpoint_config=tune.CheckpointConfig(
                num_to_keep=_PBT_CHECKPOINTS if pbt else 1,
                checkpoint_at_end=True,
                checkpoint_frequency=interval if pbt else _checkpoint_interval(recipe),
            ),
            verbose=0,
        ),
    )


def _checkpoint_interval(recipe: Recipe) -> int:
    """Reports between checkpoints; a report comes every `eval.interval` iterations."""
    every = recipe.run.checkpoint_interval
    return max(1, every // (recipe.eval.interval or 1)) if every else 0


def _frame(trials: Sequence[Any], space: Space) -> pd.DataFrame:
    metric = space.settings.metric
    rows = [
        {
            **{key: trial.config["space"][key] for key in space.ranges},
            metric: trial.last_result.get(metric, math.nan),
            ITERATIONS: trial.last_result.get(ITERATIONS, 0),
            TOKENS: trial.last_result.get(TOKENS, 0),
            "seconds": trial.last_result.get("time_total_s", 0.0),
            _ERROR: _last_line(trial.get_error()),
            "folder": str(trial.path),
        }
        for trial in sorted(trials, key=lambda trial: trial.trial_id)  # as they were drawn
    ]
    rank = -1.0 if space.settings.mode == "max" else 1.0
    order = sorted(rows, key=lambda row: (row[_ERROR] != "", _or_last(rank * row[metric])))
    return pd.DataFrame(order)


def _or_last(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _last_line(error: BaseException | None) -> str:
    if error is None:
        return ""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def _check_metric(trials: Sequence[Any], metric: str) -> None:
    for trial in trials:
        if known := trial.last_result.get(MISSING_METRIC):
            hint = " It comes with validations: set eval.interval." * metric.startswith("eval")
            raise ValueError(
                f"sweep.metric: {metric!r} is not among what trials report.{hint} "
                f"The nearest is {nearest(metric, known.split(', '))!r}."
            )


def _ended(frame: pd.DataFrame, space: Space) -> pd.DataFrame:
    """The trials that ended well, the best first."""
    ended = frame.loc[(frame[_ERROR] == "") & frame[space.settings.metric].notna()]
    if ended.empty:
        errors = "\n".join(f"  {text}" for text in sorted(set(frame[_ERROR])))
        raise ValueError(f"No trial ended well. Their errors:\n{errors}")
    return ended


def _plain(value: Any) -> Any:
    """A Python number in place of NumPy's."""
    return value.item() if hasattr(value, "item") else value


def read_validations(
    out: Path, settings: Sequence[str], metrics: Sequence[str]
) -> list[dict[str, Any]]:
    """The validations of a sweep's trials.

    Args:
        out: Folder of the sweep, finished or not.
        settings: "table.key" of those to keep, searched or not.
        metrics: Of the validation, "pass@16" for instance; the average score comes with them.

    Returns:
        One per trial with a validation: {"settings": {"table.key": value}, "validation":
        [{"tokens": …, "avg@n": …, "pass@k": …}, …]}.

    Raises:
        ValueError: If no trial has validated these, or a setting is none of the recipe's.
    """
    found = []
    for file in sorted((out / TRIALS).glob("*/result.json")):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        validation = [kept for row in rows if (kept := _validation(row, metrics))]
        if validation:
            tables = trial_recipe(rows[-1]["config"]).to_dict()
            chosen = {path: _setting(tables, path) for path in settings}
            found.append({"settings": chosen, "validation": validation})
    if not found:
        raise ValueError(
            f"No trial of {out} has validated {', '.join(metrics)}. Set eval.interval in the "
            "sweep, and rollout.evaluation_generations to the largest k or more."
        )
    return found


def at_equal_average(
    validations: Sequence[dict[str, Any]], by: Sequence[str], levels: Sequence[float]
) -> pd.DataFrame:
    """Every metric where trials have the same average scores, on a `ValidationFit` of each.

    Args:
        validations: From `read_validations`.
        by: Settings that make a row; trials that share them (seeds) are averaged.
        levels: Average scores in [0, 1].

    Returns:
        A row per combination, the best in its first metric first: `by` (lists and tables as JSON),
        `trials`, `reached` (share of trials x levels that have a value), and the mean of each
        metric over those.
    """
    rows = []
    for trial in validations:
        path = trial["validation"]
        average = next(name for name in path[0] if name.startswith(AVERAGE))
        fit = ValidationFit(*(tuple(p[name] for p in path) for name in (TOKENS, average)))
        shown = {key: _shown(trial["settings"][key]) for key in by}
        metrics = [name for name in path[0] if name not in (TOKENS, average)]
        read = {name: fit.read(levels, [point[name] for point in path]) for name in metrics}
        rows += [{**shown, **{name: read[name][i] for name in metrics}} for i in range(len(levels))]
    frame = pd.DataFrame(rows)
    groups: Any = frame.groupby(list(by), sort=False)
    table: pd.DataFrame = groups[metrics].mean()
    first = metrics[0]
    table.insert(0, "reached", groups[first].agg(lambda column: np.mean(column.notna())))
    table.insert(0, "trials", groups.size() // len(levels))
    return table.sort_values(first, ascending=False, kind="stable").reset_index()


def _validation(row: dict[str, Any], metrics: Sequence[str]) -> dict[str, float]:
    """{"tokens": …, "avg@n": …, metric: …} of a report; empty without a validation."""
    found = validated(row)
    if not all(metric in found for metric in metrics):
        return {}
    average = next(name for name in found if name.startswith(AVERAGE))
    return {TOKENS: row[TOKENS], **{name: found[name] for name in (average, *metrics)}}


def _setting(tables: dict[str, Any], path: str) -> Any:
    value: Any = tables
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value:
            raise ValueError(f"{path!r} is none of the trials' settings.")
        value = value[key]
    return value


def _shown(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value
