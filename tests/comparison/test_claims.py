"""The sentences say what the intervals say."""

from __future__ import annotations

from rllib_distrl.comparison.claims import claims
from rllib_distrl.comparison.results import arrange
from tests.comparison.made_records import record, records


def test_above_below_and_undecided_by_hand() -> None:
    # pass@4 is the average + 0.4 and pass@2 at equal average is 0.575 + (its middle) / 4 - x / 4.
    averages = {"base": [0.3, 0.3], "up": [0.4, 0.5], "down": [0.2, 0.2], "both": [0.2, 0.4]}
    made = [*records(averages), record("alone", 0, 0.9)]
    found = claims(arrange(made, [*averages, "alone"], [0, 1]))
    rest = "interval holds zero: 1; too few seeds to tell: 1."
    assert found[0] == (
        "pass@2 at equal average score: above base: up +3.7 [+2.5, +5.0]; "
        f"below: down -2.5 [-2.5, -2.5]; {rest}"
    )
    assert found[1] == (
        "avg@4 after training: above base: up +15.0 [+10.0, +20.0]; "
        f"below: down -10.0 [-10.0, -10.0]; {rest}"
    )
    assert [line.partition(":")[0] for line in found[2:]] == ["pass@4 after training"]


def test_nothing_above_is_said() -> None:
    found = claims(arrange(records({"a": [0.2, 0.4], "b": [0.3, 0.4]}), ["a", "b"], [0, 1]))
    assert found[1] == "avg@4 after training: above a: none; interval holds zero: 1."
