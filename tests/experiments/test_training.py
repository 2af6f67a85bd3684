"""Where training ends."""

from __future__ import annotations

import pytest

from rllib_distrl.experiments.training import RunLength
from rllib_distrl.settings import RunSettings

STEPS = "num_env_steps_sampled_lifetime"


def test_iterations_end_a_run_without_a_budget() -> None:
    length = RunLength.of(RunSettings(iterations=3))
    assert [length.reached({"iteration": i, STEPS: 10**9}) for i in (0, 2, 3)] == [
        False,
        False,
        True,
    ]
    assert str(length) == "3 iterations"


@pytest.mark.parametrize("key", [STEPS, f"env_runners/{STEPS}"])
def test_the_first_iteration_that_reaches_the_budget_ends_a_run(key: str) -> None:
    length = RunLength.of(RunSettings(iterations=1, budget_tokens=500))
    rows = [{"iteration": i, key: 200 * i} for i in range(5)]
    assert [length.reached(row) for row in rows] == [False, False, False, True, True]
    assert not length.reached({"iteration": 7})
    assert length.share_done(1, 200) == pytest.approx(0.4)
    assert length.share_done(9, 600) == 1.0
