"""Records arranged: who is compared with whom, and on which seeds."""

from __future__ import annotations

import pytest

from rllib_distrl.experiments.decisions import decide, equal_average_metrics
from rllib_distrl.experiments.pages import (
    Table,
    costs_table,
    differences_table,
    results_table,
)
from rllib_distrl.experiments.results import arrange, number
from tests.experiments.made_records import failed, record, records

AVERAGES = {"a": [0.2, 0.4], "b": [0.3, 0.4]}


def test_rows_by_contender_and_what_is_missing() -> None:
    found = arrange([*records(AVERAGES), failed("c", 0, "broke")], ["a", "b", "c"], [0, 1])
    assert [(row.name, len(row.records)) for row in found.rows] == [("a", 2), ("b", 2)]
    assert [(r.name, r.seed) for r in found.failed] == [("c", 0)]
    assert found.missing == (("c", 1),)
    estimate = found.baseline.estimate("pass@4")
    assert estimate is not None
    assert estimate.mean == pytest.approx(0.7)


def test_only_seeds_that_both_have_are_paired() -> None:
    made = [*records({"a": [0.2, 0.4, 0.6]}), record("b", 2, 0.7), record("b", 1, 0.6)]
    found = arrange(made, ["a", "b"], [0, 1, 2])
    test = decide(found).after(found.rows[1], "avg@4")
    assert test is not None
    # 0.6 − 0.4 and 0.7 − 0.6; without pairing by seed the mean would be 0.65 − 0.4.
    assert test.difference.mean == pytest.approx(0.15)
    assert test.difference.seeds == 2
    assert decide(found).after(found.baseline, "avg@4") is None
    alone = arrange([*records({"a": [0.2]}), record("b", 0, 0.7)], ["a", "b"], [0])
    assert decide(alone).after(alone.rows[1], "avg@4") is None


def test_budgets_agree_and_the_baseline_is_there() -> None:
    with pytest.raises(ValueError, match=r"different budgets of tokens: \[1000, 2000\]"):
        arrange([record("a", 0, 0.1), record("b", 0, 0.1, budget_tokens=2_000)], ["a", "b"], [0])
    with pytest.raises(ValueError, match="baseline a has no finished run"):
        arrange([failed("a", 0, "broke"), record("b", 0, 0.1)], ["a", "b"], [0])


def test_best_k_is_shown_only_where_it_differs() -> None:
    graded = {"avg@2": 0.5, "pass@1": 0.1, "pass@2": 0.2, "best@1": 0.5, "best@2": 0.6}
    binary = {**graded, "best@1": 0.1, "best@2": 0.2}
    both = {"metrics": graded, "validation": [{"tokens": 1.0, **graded}]}
    found = arrange(records({"a": [0.2], "b": [0.2]}, **both), ["a", "b"], [0])
    assert found.metrics == list(graded)
    assert found.validation_metrics == ["avg@2", "best@1", "best@2", "pass@1", "pass@2"]
    assert equal_average_metrics(found) == ["pass@2", "best@2"]
    both = {"metrics": binary, "validation": [{"tokens": 1.0, **binary}]}
    found = arrange(records({"a": [0.2], "b": [0.2]}, **both), ["a", "b"], [0])
    assert found.metrics == ["avg@2", "pass@1", "pass@2"]
    assert found.validation_metrics == found.metrics


def test_the_tables_by_hand() -> None:
    found = arrange(records(AVERAGES), ["a", "b"], [0, 1])
    table = results_table(found)
    row = dict(zip(table.head, table.lines[1], strict=True))
    # sd of 30 and 40: 10 / sqrt(2).
    assert row["avg@4"] == "35.0 ± 7.1"
    assert row["pass@4"] == "75.0 ± 7.1"
    assert row["distinct correct"] == "2.00 ± 0.00"
    assert costs_table(found).lines[1] == ["b", "100", "7", "28", "0.2", "0.5"]
    differences = differences_table(found, decide(found))
    cells = dict(zip(differences.head, differences.lines[0], strict=True))
    assert cells["avg@4"] == "+5.0 [-58.5, +68.5], p 1 → 1"
    alone = results_table(arrange(records({"a": [0.2]}), ["a"], [0]))
    assert alone.lines[0][2] == "20.0"
    parts = results_table(arrange(records(AVERAGES, part="head"), ["a", "b"], [0, 1]))
    assert parts.lines[0][1] == "head"


def test_cells_cannot_break_a_table() -> None:
    table = Table(["a|b"], [["<x>"]])
    assert table.to_markdown() == "| a\\|b |\n| --- |\n| <x> |"
    assert "<th>&lt;x&gt;</th>" in table.to_html()


def test_numbers() -> None:
    assert number("pass@8", 0.1234) == "12.3"
    assert number("pass@8", 0.1, signed=True) == "+10.0"
    assert number("entropy", 0.12345) == "0.123"
    assert number("distinct_correct", -0.5, signed=True) == "-0.50"


def test_problems_are_a_part_of_the_interval_and_of_each_metric() -> None:
    # Two problems, four samples: 1 and 3 right with a, 3 and 3 with b; half marks are not right.
    kept = {"a": [[[0.0, 3], [1.0, 1]], [[0.5, 1], [1.0, 3]]]}
    kept["b"] = [[[0.0, 1], [1.0, 3]], [[0.5, 1], [1.0, 3]]]
    made = [record(name, s, 0.5, scores=kept[name]) for name in kept for s in range(2)]
    found = arrange(made, ["a", "b"], [0, 1])
    row = found.rows[1]
    assert made[0].problem_values("avg@4").tolist() == [0.25, 0.875]
    assert made[0].problem_values("pass@2") == pytest.approx([1 - 3 / 6, 1.0])
    assert made[0].problem_values("best@4").tolist() == [1.0, 1.0]
    assert made[0].problem_values("entropy") is None
    assert found.problem_differences(row, "avg@4", [0, 1]).tolist() == [[0.5, 0.0]] * 2
    test = decide(found).after(row, "avg@4")
    # The seeds agree to the digit, so all doubt is about the problems.
    assert test.difference.sd == 0.0
    assert test.difference.low < 0 < test.difference.high
