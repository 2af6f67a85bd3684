"""The mathematics of the shared cases on which graders have failed, by kind, and mutated golds."""

import time
from collections import defaultdict

import pytest

from distrl_envs.grading import MathGrader
from distrl_envs.grading.extraction import extract_answer
from tests.grading.conftest import SHARED, present, read_lines
from tests.grading.mutations import exceptions, mutation_pairs

KEPT: dict[str, str] = {}
"""Cases that are graded otherwise than labelled, with the reason."""
CHOICES = {r"\text{(B)}", r"\text{(C)}", r"\text{(E)}"}
"""Golds that are a letter: whatever text stands beside the letter, the letter decides."""


@pytest.fixture(scope="module")
def grader_cases():
    cases = read_lines(present(SHARED / "grader_cases.jsonl"))
    return [case for case in cases if case["id"].startswith("math-")]


def test_the_shared_cases_by_kind(grader, grader_cases):
    kinds = defaultdict(list)
    inputs = [case["input"] for case in grader_cases]
    grades = grader.grade_many([i["completion"] for i in inputs], [i["gold"] for i in inputs])
    for case, grade in zip(grader_cases, grades, strict=True):
        agrees = (grade.status == "correct") == (case["expected"] == "correct")
        kinds[case["kind"]].append(agrees or case["id"])
    failed = {kind: [one for one in found if one is not True] for kind, found in kinds.items()}
    assert sum(len(found) for found in kinds.values()) >= 100
    assert {one for found in failed.values() for one in found} == set(KEPT)


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_mutated_golds_are_wrong(grader, benchmark_golds, every):
    golds = [gold for _, gold in benchmark_golds][::every]
    pairs = mutation_pairs(golds)
    found = exceptions(grader, pairs)
    assert len(pairs) > 7 * len(golds) - len(golds)
    assert [pair for pair in found if pair[1] not in CHOICES or "million" not in pair[0]] == []
    assert len(found) / len(pairs) < 0.001


DEGENERATE = {
    "blanks in a box": (r"\boxed{1", " ", "2}"),
    "line ends in a box": (r"\boxed{1", "\n", "2}"),
    "backslashes": (r"\boxed{1", "\\", "2}"),
    "nested braces": (r"\boxed{" + "{" * 5, "{", "42}"),
    "nested boxes": ("", r"\boxed{", "42"),
    "unclosed text": (r"\boxed{", r"\text{", "1"),
    "an answer that never comes": ("So the final answer", "\n", ""),
    "answers": ("", "answer is ", ""),
    "stars": ("answer ", "**", ""),
    "commas": (r"\boxed{1", ",1", "}"),
    "digits": (r"\boxed{", "7", "}"),
    "points": (r"\boxed{1", ".", "}"),
    "signs": (r"\boxed{", "-", "1}"),
    "dollars": ("", "$1$ ", ""),
    "boxes in a list": ("", r"\boxed{1} and ", r"\boxed{2}"),
    "thoughts": ("", "<think>", "42"),
    "letters": (r"\boxed{", "ab ", "}"),
    "units": (r"\boxed{5 ", r"\text{ m}", "}"),
    "texts in texts": (r"\boxed{\text{a", r"\text{and}", "}"),
    "fonts in fonts": (r"\boxed{", r"\mathrm{m\text{", "}"),
    "quotes": (r"\boxed{", "['1',", "}"),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_the_callers_time_grows_linearly(grader, name):
    start, piece, end = DEGENERATE[name]

    def seconds(n):
        text = start + piece * (n // len(piece)) + end
        started = time.process_time()
        grader.grade(text, "42")
        return time.process_time() - started

    seconds(1_000)
    small, large = seconds(100_000), seconds(400_000)
    assert large < 8 * max(small, 0.02)


@pytest.mark.parametrize("name", DEGENERATE)
def test_short_degenerate_answers_take_no_longer_than_the_timeout(name):
    start, piece, end = DEGENERATE[name]
    with MathGrader(timeout=1.0, workers=1) as own:
        own.grade(r"\boxed{\sin^2 x}", "1")  # The worker has started.
        started = time.monotonic()
        own.grade(start + piece * (1_900 // len(piece)) + end, "x+1")
        assert time.monotonic() - started < 10.0


def test_bracketed_depths_are_read():
    assert extract_answer(r"\boxed{" + "{" * 30_000 + "42" + "}" * 30_001)
    with MathGrader(workers=1) as own:
        assert own.grade(r"\boxed{" + "{" * 30_000 + "42" + "}" * 30_001, "42").score == 1.0


def test_thinking_that_never_ends_holds_no_answer(grader):
    draft = r"<think>Perhaps \boxed{42}, but wait"
    assert grader.grade(draft, "42").status == "no_answer"
    assert MathGrader(ignore_unfinished_thinking=False).grade(draft, "42").score == 1.0
    assert grader.grade(r"<think>\boxed{41}</think>The answer is 42.", "42").score == 1.0


def test_an_answer_pattern_may_be_greedy():
    grader = MathGrader(answer_pattern="Answer: (.+)")
    assert grader.grade("Answer: 41\nAnswer: 42\nI hope it is right.", "42").score == 1.0
    over_lines = MathGrader(answer_pattern="<answer>(.*?)</answer>")
    assert over_lines.grade("<answer>1</answer> <answer>\n2\n</answer>", "2").score == 1.0


def test_a_gold_that_is_a_list_in_pythons_notation(grader):
    assert grader.grade(r"\boxed{1}", "['1', '2']").score == 1.0
    assert grader.grade(r"\boxed{1,2}", "['1', '2']").score == 1.0
    assert grader.grade(r"\boxed{3}", "['1', '2']").score == 0.0


@pytest.mark.parametrize(
    "gold, answer, score",
    [(r"\frac{1}{2}", r"\int_0^1 x\,dx", 1.0), (r"\frac{1}{3}", r"\int_0^1 x\,dx", 0.0),
     ("55", r"\sum_{k=1}^{10} k", 1.0), (r"\sum_{k=1}^{n} k", r"\sum_{k=1}^{n} k^2", 0.0)],
)  # fmt: skip
def test_calculus_is_left_to_math_verify(grader, gold, answer, score):
    assert grader.grade(rf"\boxed{{{answer}}}", gold).score == score
