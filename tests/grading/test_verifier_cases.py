"""Agreement with the labelled cases of other graders, and every disagreement with its reason."""

from collections import Counter

import pytest

from benchmarks.graders import REQUIRED_MODES, agrees, case_outcomes

KEPT = {
    "vc-0034": "prose inside the box: 'Answer $$ 9 $$' is not the number 9",
    "vc-0035": "prose inside the box: 'Answer … = 10/9' names no variable",
    "vc-0110": "1/3 is not about 1.3: an approximation that does not hold leaves two answers",
}
"""Cases of the required modes that are graded otherwise than labelled."""


@pytest.fixture(scope="module")
def outcomes(grader, verifier_cases):
    return case_outcomes(grader, verifier_cases)


@pytest.mark.parametrize("mode", REQUIRED_MODES)
def test_agreement(outcomes, mode):
    agreed = [agrees(case, grade) for case, grade, _ in outcomes if case["mode"] == mode]
    assert len(agreed) >= 80
    assert sum(agreed) / len(agreed) >= 0.96


def test_disagreements_are_those_that_are_kept(outcomes):
    found = {case["id"] for case, grade, _ in outcomes
             if case["mode"] in REQUIRED_MODES and not agrees(case, grade)}  # fmt: skip
    assert found == set(KEPT)


def test_plain_integers_agree_entirely(outcomes):
    integers = [(case, grade) for case, grade, _ in outcomes
                if case["mode"] in REQUIRED_MODES and case["gold"].strip("$").lstrip("-").isdigit()
                and (grade.answer or "").lstrip("-").isdigit()]  # fmt: skip
    assert len(integers) >= 50
    assert all(agrees(case, grade) for case, grade in integers)


def test_no_case_outlives_its_deadline(outcomes, grader):
    slowest = max(outcomes, key=lambda outcome: outcome[2])
    assert slowest[2] < grader.timeout + 1.0, slowest


def test_statuses(outcomes):
    statuses = Counter(grade.status for _, grade, _ in outcomes)
    assert statuses["worker_died"] == 0
    assert statuses["timeout"] >= 1  # Some cases are made to hang.
    assert all((grade.score == 1.0) == (grade.status == "correct") for _, grade, _ in outcomes)


def test_every_gold_of_the_benchmarks_grades_itself_correct(grader, benchmark_golds):
    assert len(benchmark_golds) == 2866
    golds = [gold for _, gold in benchmark_golds]
    grades = grader.grade_many([rf"Thus \boxed{{{gold}}}." for gold in golds], golds)
    wrong = [row for row, grade in zip(benchmark_golds, grades, strict=True) if grade.score != 1.0]
    assert wrong == []
