"""Which results hold an evaluation of their own, and how long it took."""

import pytest

from rllib_distrl.algorithm.validation_clock import time_validations, without_repeats
from tests.helpers import distrl_config

pytestmark = pytest.mark.usefixtures("ray_session")


def test_an_evaluation_is_timed_and_reported_once(build):
    config = distrl_config().evaluation(
        evaluation_interval=2,
        evaluation_duration=4,
        evaluation_duration_unit="episodes",
        evaluation_config={"env_config": {"split": "validation"}},
    )
    time_validations(config)
    algo = build(config)
    first, second, third = (algo.train() for _ in range(3))
    assert "evaluation" not in without_repeats(first)
    runners = second["evaluation"]["env_runners"]
    assert without_repeats(second)["evaluation"]["env_runners"] == runners
    # Sampling is a part of the evaluation, and that of the iteration.
    assert runners["sample"] <= second["evaluation"]["seconds"] <= second["time_this_iter_s"]
    # Ray 2.60 reports it once more.
    assert third["evaluation"]["env_runners"]["pass@1"] == runners["pass@1"]
    # Four problems, one completion each, in place of what the runner has logged of them.
    problems = second["evaluation"]["problems"]
    assert [(row, right) for row, right, _ in problems] == [
        (row, sum(n for score, n in scores if score == 1.0))
        for row, (_, _, scores) in enumerate(problems)
    ]
    assert [sum(n for _, n in scores) for _, _, scores in problems] == [1] * 4
    assert sum(right for _, right, _ in problems) / 4 == pytest.approx(runners["pass@1"])
    assert "problems" not in runners
    assert "evaluation" not in without_repeats(third)
    assert without_repeats(third)["env_runners"] == third["env_runners"]
