"""What a sweep's trials validated along training, read where their average scores are the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rllib_distrl.experiments.record import AVERAGE, validated
from rllib_distrl.experiments.statistics import ValidationFit
from rllib_distrl.experiments.sweep import TRIALS
from rllib_distrl.experiments.trial import TOKENS, trial_recipe


def read_fronts(out: Path, settings: Sequence[str], metrics: Sequence[str]) -> list[dict[str, Any]]:
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
    fronts: Sequence[dict[str, Any]], by: Sequence[str], levels: Sequence[float]
) -> pd.DataFrame:
    """Every metric where trials have the same average scores, on a `ValidationFit` of each.

    Args:
        fronts: From `read_fronts`.
        by: Settings that make a row; trials that share them (seeds) are averaged.
        levels: Average scores in [0, 1].

    Returns:
        A row per combination, the best in its first metric first: `by` (lists and tables as JSON),
        `trials`, `reached` (share of trials x levels that have a value), and the mean of each
        metric over those.
    """
    rows = []
    for front in fronts:
        path = front["validation"]
        average = next(name for name in path[0] if name.startswith(AVERAGE))
        fit = ValidationFit(*(tuple(p[name] for p in path) for name in (TOKENS, average)))
        shown = {key: _shown(front["settings"][key]) for key in by}
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
