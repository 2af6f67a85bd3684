"""What a pool of completions of one problem says, while training goes on."""

from collections.abc import Sequence

import numpy as np

from distrl_envs.task import Grade
from rllib_distrl.maths.majority import Equivalence, group_answers, majority_at_k
from rllib_distrl.maths.pass_k import best_at_k, distinct_correct, pass_at_k

CORRECT, NO_ANSWER = "correct", "no_answer"


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
