"""What a pool of completions of one problem says, while training goes on."""

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from distrl_envs.task import Grade
from rllib_distrl.maths.choosing import Equivalence, group_answers, majority_at_k
from rllib_distrl.maths.pass_k import best_at_k, count_scores, distinct_correct, pass_at_k
from rllib_distrl.rllib_traps import SECONDS

CORRECT, NO_ANSWER = "correct", "no_answer"
PROBLEMS = "problems"


def pool_record(row: int, visit: int, grades: Sequence[Grade]) -> list:
    """What is kept of a pool: [row, visit, how many are correct, [[score, how many], …]]."""
    right = sum(grade.status == CORRECT for grade in grades)
    return [row, visit, right, count_scores([grade.score for grade in grades])]


def join_pools(pools: Sequence[Sequence]) -> list[list]:
    """Pools of one validation, problem by problem.

    Args:
        pools: from `pool_record`, of any number of runners in any order. A pool that is there
            twice, because a validation was held again, is the same one and counts once.

    Returns:
        [[row, how many are correct, [[score, how many], …]], …], ascending by row.
    """
    rights: Counter[int] = Counter()
    scores: dict[int, Counter[float]] = {}
    for (row, _), (right, counts) in {(p[0], p[1]): (p[2], p[3]) for p in pools}.items():
        rights[row] += right
        scores.setdefault(row, Counter()).update(dict(counts))
    return [[row, rights[row], sorted(map(list, scores[row].items()))] for row in sorted(scores)]


def pool_metrics(
    grades: Sequence[Grade], equivalent: Equivalence | None = None, *, votes: bool = True
) -> dict[str, float]:
    """The estimates that the completions of one problem give.

    Args:
        grades: of its n completions.
        equivalent: compares normalised answers in votes; equality when None.
        votes: whether the task's grades name answers, without which there is no majority.

    Returns:
        ``avg@n``; ``pass@k`` of those graded correct, ``best@k`` of the scores (the same for
        scores of 0 and 1) and ``maj@k`` for the powers of two k <= n, unbiased; the number
        ``distinct_correct`` of different right answers; the share ``unparsable``.
    """
    n = len(grades)
    scores = [grade.score for grade in grades]
    answers = [grade.answer for grade in grades]
    right = np.array([grade.status == CORRECT for grade in grades])
    labels = group_answers(answers, equivalent) if votes else []
    metrics = {f"avg@{n}": sum(scores) / n}
    for k in (1 << power for power in range(n.bit_length())):
        metrics[f"pass@{k}"] = float(pass_at_k(n, int(right.sum()), k)[0])
        metrics[f"best@{k}"] = float(best_at_k([scores], k)[0])
        if votes:
            metrics[f"maj@{k}"] = majority_at_k(labels, scores, k)
    metrics["distinct_correct"] = float(distinct_correct(answers, right))
    metrics["unparsable"] = sum(grade.status == NO_ANSWER for grade in grades) / n
    return metrics


def time_validations(config: Any) -> None:
    """Makes a configuration report `evaluation/seconds` and `evaluation/problems`.

    The seconds are without the transfer of weights; the problems are as `join_pools` has them, in
    place of the single pools under `evaluation/env_runners`.

    Args:
        config: any `AlgorithmConfig`.
    """
    config.callbacks(on_evaluate_start=_start, on_evaluate_end=_end)


def _start(algorithm: Any, **kwargs: Any) -> None:
    algorithm.validation_started = time.perf_counter()


def _end(algorithm: Any, evaluation_metrics: dict[str, Any], **kwargs: Any) -> None:
    evaluation_metrics[SECONDS] = time.perf_counter() - algorithm.validation_started
    pools = evaluation_metrics.get("env_runners", {}).pop(PROBLEMS, None)
    if isinstance(pools, list):  # NaN where there are none
        evaluation_metrics[PROBLEMS] = join_pools(pools)
