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
    assert found[0].startswith("2 seeds cannot show a difference, whatever its size: the smallest")
    assert found[1] == (
        "pass@2 at equal average score: above base: up +3.7 [+2.5, +5.0]; "
        f"below: down -2.5 [-2.5, -2.5]; {rest}"
    )
    assert found[2] == (
        "avg@4 after training: above base: up +15.0 [+10.0, +20.0]; "
        f"below: down -10.0 [-10.0, -10.0]; {rest}"
    )
    assert [line.partition(":")[0] for line in found[3:]] == ["pass@4 after training"]


def test_the_furthest_four_are_named() -> None:
    averages = {"base": [0.1, 0.1], **{f"u{n}": [0.1 + n / 10] * 2 for n in range(1, 7)}}
    averages |= {"worst": [-0.1, -0.1], "bad": [0.0, 0.0]}
    found = claims(arrange(records(averages, validation=[]), list(averages), [0, 1]))
    assert found[1] == (
        "avg@4 after training: above base: u6 +60.0 [+60.0, +60.0], u5 +50.0 [+50.0, +50.0], "
        "u4 +40.0 [+40.0, +40.0], u3 +30.0 [+30.0, +30.0], and 2 more; "
        "below: worst -20.0 [-20.0, -20.0], bad -10.0 [-10.0, -10.0]."
    )


def test_nothing_above_is_said() -> None:
    found = claims(arrange(records({"a": [0.2, 0.4], "b": [0.3, 0.4]}), ["a", "b"], [0, 1]))
    assert found[2] == "avg@4 after training: above a: none; interval holds zero: 1."


def test_six_seeds_are_enough_to_tell() -> None:
    averages = {"a": [0.1] * 6, "b": [0.2] * 6}
    found = claims(arrange(records(averages, validation=[]), ["a", "b"], list(range(6))))
    assert found[0].startswith("avg@4 after training: above a: b +10.0")
    fewer = claims(arrange(records(averages, validation=[]), ["a", "b"], [0, 1, 2, 3, 4]))
    assert "the smallest p is 0.0625" in fewer[0]
