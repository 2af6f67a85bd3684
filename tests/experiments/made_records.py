"""Records as runs would leave them, with numbers that can be worked by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rllib_distrl.experiments.results import FAILED, FINISHED, Record

RECIPE = {"eval": {"problems": 10, "n": 4, "split": "test"}}


def record(name: str, seed: int, average: float, **more: Any) -> Record:
    """A finished run whose pass@2 and pass@4 are its average + 0.2 and + 0.4."""
    fields: dict[str, Any] = {
        "part": "",
        "digest": "d",
        "budget_tokens": 1_000,
        "status": FINISHED,
        "recipe": RECIPE,
        "commit": "c0ffee",
        "metrics": {
            "avg@4": average,
            "pass@1": average,
            "pass@2": average + 0.2,
            "pass@4": average + 0.4,
            "distinct_correct": 2.0,
            "entropy": 0.5,
        },
        "tokens": 1_050,
        "iterations": 7,
        "updates": 28,
        "seconds": 10.5,
        "wall_seconds": 30.0,
        "curve": {
            "return": [[150.0, 0.1], [1_050.0, average]],
            "entropy": [[150.0, 0.8], [1_050.0, 0.5]],
        },
        "validation": [
            {"tokens": 450.0, "avg@2": average - 0.2, "pass@1": average - 0.2, "pass@2": 0.6},
            {"tokens": 900.0, "avg@2": average + 0.2, "pass@1": average + 0.2, "pass@2": 0.5},
        ],
    }
    return Record(name=name, seed=seed, **{**fields, **more})


def failed(name: str, seed: int, error: str) -> Record:
    """A failed run."""
    return Record(name, "", seed, "d", 1_000, FAILED, error)


def records(averages: dict[str, Sequence[float]], **more: Any) -> list[Record]:
    """Runs with seeds 0, 1, …"""
    return [
        record(name, seed, average, **more)
        for name, values in averages.items()
        for seed, average in enumerate(values)
    ]
