"""The training loop: where it ends, and who ends it."""

from __future__ import annotations

from typing import Any

import pytest

from rllib_distrl.experiments.training import RunLength, Training
from rllib_distrl.rllib_traps import OPTIMIZER_STEPS
from rllib_distrl.settings import RunSettings
from tests.helpers import distrl_config

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


@pytest.mark.usefixtures("ray_session")
def test_training_stops_where_it_is_asked_to_and_goes_on_to_its_end(build: Any) -> None:
    training = Training(build(distrl_config(prompts=2)), RunLength(3))
    seen: list[int] = []

    def note(row: dict[str, Any]) -> None:
        seen.append(row["iteration"])

    training.run(after=note, stopping=lambda: training.row["iteration"] == 2)
    assert (seen, training.over) == ([1, 2], False)
    training.run(after=note)
    assert (seen, training.over) == ([1, 2, 3], True)
    training.run(before=lambda: pytest.fail("it was over"))
    assert training.row["learners/default_policy/entropy"] > 0.0
    # An iteration of 4 completions is one minibatch.
    assert training.row[OPTIMIZER_STEPS] == 3
