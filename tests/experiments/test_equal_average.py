"""Equal average score along training: which levels, which seeds, and the numbers by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from rllib_distrl.experiments.decisions import (
    at_level,
    decide,
    equal_average_metrics,
    levels,
    mean_at_levels,
)
from rllib_distrl.experiments.pages import equal_average_table, sections
from rllib_distrl.experiments.results import Record, Results, arrange
from rllib_distrl.experiments.statistics import estimate
from tests.experiments.made_records import record, records

# Average scores along training: a 0.1 to 0.5 with both seeds, b 0.2 to 0.6 and 0.3 to 0.7, while
# pass@2 falls from 0.6 to 0.5. So a has 0.625 - x / 4 at the average x, b 0.65 - x / 4 and
# 0.675 - x / 4.
AVERAGES: dict[str, Sequence[float]] = {"a": [0.3, 0.3], "b": [0.4, 0.5]}

Rights = tuple[tuple[int, ...], tuple[int, ...]]  # right samples of each problem, first and last


@pytest.fixture
def found() -> Results:
    return arrange(records(AVERAGES), ["a", "b"], [0, 1])


def test_levels_are_round_and_shared(found: Results) -> None:
    assert levels(found) == [0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5]
    assert equal_average_metrics(found) == ["pass@2"]
    apart = arrange(records({"a": [0.2], "b": [0.7]}), ["a", "b"], [0])
    assert levels(apart) == []
    assert equal_average_table(apart, decide(apart)) is None
    blind = arrange(records({"a": [0.2], "b": [0.2]}, validation=[]), ["a", "b"], [0])
    assert equal_average_table(blind, decide(blind)) is None
    once = arrange(records({"a": [0.3, 0.3], "b": [0.4, 0.9]}), ["a", "b"], [0, 1])
    assert levels(once) and equal_average_table(once, decide(once)) is None


def test_differences_by_hand(found: Results) -> None:
    baseline, row = found.rows
    at = at_level(found, row, "pass@2", 0.3)
    assert (at.pairs, at.seeds) == (2, 2)
    assert at.value is not None
    assert at.value.mean == pytest.approx((0.575 + 0.6) / 2)
    assert at.by_seed == {0: pytest.approx(0.025), 1: pytest.approx(0.05)}
    own = at_level(found, baseline, "pass@2", 0.3)
    assert own.value is not None
    assert own.value.mean == pytest.approx(0.55)
    assert own.by_seed == {0: 0.0, 1: 0.0}


def test_a_level_that_a_seed_does_not_reach_is_counted_not_extrapolated(found: Results) -> None:
    row = found.rows[1]
    at = at_level(found, row, "pass@2", 0.25)
    assert (at.pairs, at.seeds, at.difference) == (1, 2, None)
    beyond = at_level(found, row, "pass@2", 0.6)
    assert (beyond.pairs, beyond.value, beyond.difference) == (0, None, None)


def test_the_mean_over_levels_weighs_seeds_alike(found: Results) -> None:
    # Seed 0 reaches seven levels and seed 1 five; their differences are 0.025 and 0.05.
    over = mean_at_levels(found, found.rows[1], "pass@2", levels(found))
    assert over.by_seed == {0: pytest.approx(0.025), 1: pytest.approx(0.05)}
    test = decide(found).at_equal_average(found.rows[1], "pass@2")
    assert test is not None
    assert (test.difference.mean, test.p) == (pytest.approx(0.0375), 0.5)


def test_only_seeds_of_both_are_paired() -> None:
    made = [*records({"a": [0.3, 0.3]}), record("b", 1, 0.4), record("b", 2, 0.4)]
    found = arrange(made, ["a", "b"], [0, 1, 2])
    at = at_level(found, found.rows[1], "pass@2", 0.3)
    assert (at.pairs, at.seeds, at.difference) == (1, 1, None)


def made_by_problem(rights: dict[str, list[Rights]]) -> list[Record]:
    """Runs with two validations of four problems x two samples, whose means are what is said."""
    scores = {0: [[0.0, 2]], 1: [[0.0, 1], [1.0, 1]], 2: [[1.0, 2]]}
    made = []
    for name, runs in rights.items():
        for seed, (first, last) in enumerate(runs):
            validation, problems = [], []
            for tokens, right in ((450.0, first), (900.0, last)):
                average = sum(right) / 8
                solved = sum(r > 0 for r in right) / 4
                means = {"avg@2": average, "pass@1": average, "pass@2": solved}
                validation.append({"tokens": tokens, **means})
                problems.append([[row, r, scores[r]] for row, r in enumerate(right)])
            more = {"validation": validation, "validation_problems": problems}
            made.append(record(name, seed, 0.3, **more))
    return made


def test_where_problems_are_kept_they_are_drawn_again_with_the_seeds() -> None:
    flat, steep = ((1, 1, 0, 0), (2, 2, 1, 1)), ((2, 0, 0, 0), (2, 2, 2, 2))
    runs: dict[str, list[Rights]] = {"a": [flat, flat, steep], "b": [steep, steep, steep]}
    found = arrange(made_by_problem(runs), ["a", "b"], [0, 1, 2])
    assert found.problems_validated
    # A line from .25 to .75 of the average takes a's pass@2 from .5 to 1; a problem at the average
    # .5 is in the middle of both validations, less its own lead in the average times the slope 1.
    at = found.rows[0].records[0].problems_at_levels([0.5], "pass@2")
    assert at.tolist() == [pytest.approx([1 - 0.25, 1 - 0.25, 0.5 + 0.25, 0.5 + 0.25])]
    test = decide(found).at_equal_average(found.rows[1], "pass@2")
    assert test is not None
    over = mean_at_levels(found, found.rows[1], "pass@2", levels(found))
    assert over.problems is not None and over.problems.shape == (3, 4)
    assert over.problems.mean(1) == pytest.approx(list(over.by_seed.values()))
    assert test.difference == estimate(list(over.by_seed.values()), over.problems)
    assert "over seeds and validation problems" in words(found)


@pytest.mark.parametrize("spoil", ["none", "fewer", "others"])
def test_where_some_run_does_not_keep_them_intervals_are_over_the_seeds(spoil: str) -> None:
    flat = ((1, 1, 0, 0), (2, 2, 1, 1))
    runs: dict[str, list[Rights]] = {"a": [flat, flat], "b": [flat, flat]}
    made = made_by_problem(runs)
    kept = made[-1].validation_problems
    other = {
        "none": [],
        "fewer": kept[:1],
        "others": [[[row + 1, *rest] for row, *rest in problems] for problems in kept],
    }
    made[-1] = replace(made[-1], validation_problems=other[spoil])
    found = arrange(made, ["a", "b"], [0, 1])
    assert not found.problems_validated
    assert mean_at_levels(found, found.rows[1], "pass@2", [0.5]).problems is None
    assert "Student's over the seeds" in words(found)
    assert "not all records keep the same ones" in words(found)


def words(found: Results) -> str:
    return next(s.words for s in sections(found) if s.title == "At equal average score")


def test_the_table(found: Results) -> None:
    table = equal_average_table(found, decide(found))
    assert table is not None
    assert table.head[:5] == ["recipe", "metric", "mean over levels", "at 20 %", "at 25 %"]
    baseline, row = (dict(zip(table.head, line, strict=True)) for line in table.lines)
    assert baseline["at 30 %"] == "55.0 [55.0, 55.0]; 2 of 2"
    assert row["at 30 %"] == "+3.8 [-12.1, +19.6]; 2 of 2"
    assert row["at 25 %"] == "–; 1 of 2"
