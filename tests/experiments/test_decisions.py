"""The sentences say what the intervals say."""

from __future__ import annotations

from rllib_distrl.experiments.decisions import claims as sentences
from rllib_distrl.experiments.decisions import decide
from rllib_distrl.experiments.results import Results, arrange
from tests.experiments.made_records import record, records


def claims(results: Results) -> list[str]:
    return sentences(results, decide(results))


def noisy(average: float, noise: float = 0.01) -> list[float]:
    """Eight seeds that differ a little."""
    return [average + noise * (seed % 2) for seed in range(8)]


def test_above_below_and_undecided_by_hand() -> None:
    # pass@4 is the average + 0.4. Off the baseline by .1, by −.1, and by .1 and −.1 in turn.
    averages = {
        "base": noisy(0.3, 0.0), "up": noisy(0.4), "down": noisy(0.2), "both": noisy(0.25, 0.1),
    }  # fmt: skip
    made = [*records(averages, validation=[]), record("alone", 0, 0.9, validation=[])]
    found = claims(arrange(made, [*averages, "alone"], list(range(8))))
    # t at 7 degrees of freedom is 2.365, the sd of .1 and .11 in turn .00535.
    assert found[1] == (
        "avg@4 after training: above base: up +10.5 [+10.1, +10.9]; "
        "below: down -9.5 [-9.9, -9.1]; not told apart: 1; too few seeds to tell: 1."
    )
    assert [line.partition(":")[0] for line in found[2:]] == ["pass@4 after training"]
    # Of the three comparisons' five metrics: avg and pass@4, distinct and entropy being the same.
    assert found[0].startswith("4 of 12 comparisons are clear after correction.")
    assert "Holm's bound alone leaves 0 (it needs 9 seeds to leave any of 12" in found[0]


def test_an_interval_off_zero_is_not_enough() -> None:
    # Twelve recipes of noise about as large as what one of them has: p = .0078 alone is nothing.
    shifts = [[0.02, -0.03, 0.01, 0.04, -0.02, 0.03, -0.04, 0.02][n:] for n in range(8)]
    averages = {"base": [0.3] * 8}
    averages |= {f"n{n}": [0.3 + x for x in (*s, *s[::-1], *s)][:8] for n, s in enumerate(shifts)}
    averages["some"] = [0.3 + x for x in (0.01, 0.05, 0.02, 0.09, 0.01, 0.03, 0.02, 0.01)]
    found = claims(arrange(records(averages, validation=[]), list(averages), list(range(8))))
    assert "above base: none; interval off zero, not clear: some +3.0 [+0.7, +5.3]" in found[1]


def test_the_furthest_four_are_named() -> None:
    averages = {"base": noisy(0.1, 0.0), **{f"u{n}": noisy(0.1 + n / 10, 0.0) for n in range(1, 7)}}
    averages |= {"worst": noisy(-0.1, 0.0), "bad": noisy(0.0, 0.0)}
    found = claims(arrange(records(averages, validation=[]), list(averages), list(range(8))))
    assert found[1] == (
        "avg@4 after training: above base: u6 +60.0 [+60.0, +60.0], u5 +50.0 [+50.0, +50.0], "
        "u4 +40.0 [+40.0, +40.0], u3 +30.0 [+30.0, +30.0], and 2 more; "
        "below: worst -20.0 [-20.0, -20.0], bad -10.0 [-10.0, -10.0]."
    )


def test_nothing_above_is_said() -> None:
    found = claims(arrange(records({"a": [0.2, 0.4], "b": [0.3, 0.4]}), ["a", "b"], [0, 1]))
    assert found[2] == "avg@4 after training: above a: none; not told apart: 1."


def test_six_seeds_are_enough_to_tell() -> None:
    averages = {"a": [0.1] * 6, "b": [0.2] * 6}
    found = claims(arrange(records(averages, validation=[]), ["a", "b"], list(range(6))))
    assert found[1].startswith("avg@4 after training: above a: b +10.0")
    fewer = claims(arrange(records(averages, validation=[]), ["a", "b"], [0, 1, 2, 3, 4]))
    assert "the smallest p is 0.0625" in fewer[0]
    assert "above a: none; interval off zero, not clear: b +10.0" in fewer[1]
