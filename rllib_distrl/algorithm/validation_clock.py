"""How long RLlib's evaluation took, in which iterations there was one, and of which problems.

Ray 2.60 repeats an evaluation's metrics in the result of the next iteration and fills them with
NaN from then on; only a result with `evaluation/seconds` has an evaluation of its own.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rllib_distrl.rollout.pool_metrics import PROBLEMS, join_pools

EVALUATION, SECONDS = "evaluation", "seconds"


def time_validations(config: Any) -> None:
    """Makes a configuration report `evaluation/seconds` and `evaluation/problems`.

    The seconds are without the transfer of weights; the problems are as `join_pools` has them, in
    place of the single pools under `evaluation/env_runners`.

    Args:
        config: Any `AlgorithmConfig`.
    """
    config.callbacks(on_evaluate_start=_start, on_evaluate_end=_end)


def without_repeats(result: Mapping[str, Any]) -> dict[str, Any]:
    """A training result without the evaluation of an earlier iteration."""
    if SECONDS in result.get(EVALUATION, {}):
        return dict(result)
    return {key: value for key, value in result.items() if key != EVALUATION}


def _start(algorithm: Any, **kwargs: Any) -> None:
    algorithm.validation_started = time.perf_counter()


def _end(algorithm: Any, evaluation_metrics: dict[str, Any], **kwargs: Any) -> None:
    evaluation_metrics[SECONDS] = time.perf_counter() - algorithm.validation_started
    pools = evaluation_metrics.get("env_runners", {}).pop(PROBLEMS, None)
    if isinstance(pools, list):  # NaN where there are none
        evaluation_metrics[PROBLEMS] = join_pools(pools)
