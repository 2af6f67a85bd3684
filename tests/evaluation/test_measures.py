"""The numbers of an evaluation from a table of samples, and further ones, worked by hand."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest

from rllib_distrl.evaluation.measures import (
    Rate,
    audit,
    audit_samples,
    best_of_n_kl,
    dead_groups,
    distinct_n,
    entropy_at,
    fit_entropy,
    per_problem,
    read_labels,
    summarise,
)
from rllib_distrl.maths.pass_k import default_ks
from rllib_distrl.method.token_table import TokenTable


def samples(*problems):
    """Each problem is a list of (score, answer, finish_reason)."""
    rows = [
        {
            "problem": p,
            "sample": s,
            "score": score,
            "status": "no_answer" if answer is None else "correct" if score == 1 else "wrong",
            "finish_reason": finish,
            "answer": answer,
            "text_hash": f"{p}-{s // 2}",
            "tokens": 10 * (p + 1),
        }
        for p, samples in enumerate(problems)
        for s, (score, answer, finish) in enumerate(samples)
    ]
    return pd.DataFrame(rows)


TWO = samples(
    [(1.0, "24", "stop"), (0.0, "23", "stop"), (1.0, "24", "stop"), (0.0, None, "length")],
    [(0.0, "7", "stop"), (0.0, "7", "stop"), (1.0, "9", "stop"), (0.0, None, "length")],
)


def test_each_problem_by_hand():
    table = per_problem(TWO, (1, 2, 4))
    assert table["avg@4"].tolist() == [0.5, 0.25]
    assert table["pass@2"].tolist() == pytest.approx([5 / 6, 0.5])
    assert table["pass@4"].tolist() == [1.0, 1.0]
    assert table["maj@4"].tolist() == [1.0, 0.0]  # 24 against 23; 7 twice against 9.
    assert table["distinct_correct"].tolist() == [1.0, 1.0]
    assert table["truncated"].tolist() == table["unparsable"].tolist() == [0.25, 0.25]
    assert table["tokens"].tolist() == [10.0, 20.0]
    assert not [name for name in table if name.startswith("best")]


def test_distinct_correct_by_text_tells_equal_answers_apart():
    # The correct samples 0 and 2 of the first problem have the same answer but not the same text.
    assert per_problem(TWO, (1,), distinct_by="completion")["distinct_correct"].tolist() == [2, 1]


def test_graded_scores_get_best_at_k_and_only_full_marks_pass():
    frame = samples([(0.5, "a", "stop"), (1.0, "b", "stop"), (0.0, "c", "stop")])
    table = per_problem(frame, (1, 2))
    assert table["avg@3"].tolist() == pytest.approx([0.5])
    assert table["pass@1"].tolist() == pytest.approx([1 / 3])
    assert table["best@2"].tolist() == pytest.approx([(1.0 + 0.5 + 1.0) / 3])


def test_votes_may_be_grouped_by_equivalence():
    frame = samples([(1.0, "1/2", "stop"), (1.0, "0.5", "stop"), (0.0, "3", "stop")])
    assert per_problem(frame, (3,))["maj@3"].tolist() == pytest.approx([2 / 3])
    same = per_problem(frame, (3,), equivalent=lambda a, b: {a, b} == {"1/2", "0.5"})
    assert same["maj@3"].tolist() == [1.0]


def test_the_order_of_rows_does_not_matter():
    shuffled = TWO.sample(frac=1.0, random_state=0)
    assert summarise(shuffled, (1, 2)) == summarise(TWO, (1, 2))


def test_summary_counts_and_brackets():
    summary = summarise(TWO, (2,))
    assert summary["pass@2"] == pytest.approx((5 / 6 + 0.5) / 2)
    assert summary["problems"] == 2 and summary["samples"] == 4
    assert summary["status"] == {"wrong": 3, "correct": 3, "no_answer": 2}
    # Four are drawn of 1/2, 5/6, 0 and 1. Three zeros and 1/2 or less are 5 of 256 draws, with
    # 5/6 in place of 1/2 it is four more; above two ones and two 5/6 there are as few.
    assert summary["intervals"]["pass@2"] == pytest.approx([5 / 24, 11 / 12])


def test_unequal_pools_and_empty_tables_are_refused():
    with pytest.raises(ValueError, match="3 to 4 samples"):
        per_problem(TWO.iloc[:-1], (1,))
    with pytest.raises(ValueError, match="no samples"):
        per_problem(TWO.iloc[:0], (1,))
    with pytest.raises(ValueError, match="k must lie"):
        per_problem(TWO, (5,))


def test_default_ks_are_powers_of_two_and_the_pool():
    assert default_ks(1) == (1,)
    assert default_ks(64) == (1, 2, 4, 8, 16, 32, 64)
    assert default_ks(100) == (1, 2, 4, 8, 16, 32, 64, 100)


def test_missing_answers_do_not_form_a_majority():
    frame = samples([(1.0, "24", "stop"), (0.0, None, "length"), (0.0, None, "length")])
    for answers in (frame["answer"].astype(object), frame["answer"].astype("str")):
        assert per_problem(frame.assign(answer=answers), (3,))["maj@3"].tolist() == [1.0]


def test_what_is_graded_correct_passes_whatever_its_score():
    frame = samples([(0.7, "a", "stop"), (0.2, "b", "stop")])
    frame["status"] = ["correct", "wrong"]  # correct_from = 0.5
    table = per_problem(frame, (1, 2))
    assert table["pass@1"].tolist() == [0.5] and table["pass@2"].tolist() == [1.0]
    assert table["best@1"].tolist() == pytest.approx([0.45])
    assert summarise(frame, (1,))["scores"] == [0.2, 0.7]


def test_no_majority_where_grades_name_no_answers():
    frame = samples([(1.0, None, "stop"), (0.0, None, "stop")])
    assert "maj@1" in per_problem(frame, (1,))  # Of completions without an answer.
    frame["status"] = ["correct", "wrong"]
    assert not [name for name in per_problem(frame, (1, 2)) if name.startswith("maj")]


def test_distinct_grams_over_all_grams():
    # 12 23 | 12 23 31 | none: three different ones among five.
    assert distinct_n([[1, 2, 3], [1, 2, 3, 1], [9]], 2) == pytest.approx(3 / 5)
    assert distinct_n([[1, 2, 3], [1, 2, 3]], 3) == pytest.approx(1 / 2)
    assert math.isnan(distinct_n([[1], []], 2))


def test_dead_groups_are_those_without_a_difference():
    marks = [1, 1, 1, 0, 0]
    groups = list(itertools.combinations(marks, 2))
    expected = sum(len(set(group)) == 1 for group in groups) / len(groups)
    found = dead_groups(5, np.array([3, 0, 5]), 2)
    assert found.tolist() == pytest.approx([expected, 1.0, 1.0])


def test_the_best_of_n_is_as_far_as_the_densities_say():
    assert best_of_n_kl(1) == 0.0
    # Of uniform scores the best of 4 has density 4 x³: ∫ 4 x³ ln(4 x³) dx.
    x = (np.arange(200_000) + 0.5) / 200_000
    density = 4 * x**3
    assert best_of_n_kl(4) == pytest.approx(float((density * np.log(density)).mean()), abs=1e-6)


def test_returns_are_fitted_by_entropy():
    entropy = np.log([1.0, 2.0, 3.0])
    fit = fit_entropy(entropy, [0.9, 0.7, 0.5])
    assert (fit.a, fit.b, fit.explained) == pytest.approx((0.2, 1.1, 1.0))
    assert fit.ceiling == pytest.approx(0.9)
    # Slope (−1)(.9) + (1)(.4) over 2 = −.25, mean .6 at 2; R² = 2 · .0625 / .14.
    rough = fit_entropy(entropy, [0.9, 0.5, 0.4])
    assert (rough.a, rough.b) == pytest.approx((0.25, 1.1))
    assert rough.explained == pytest.approx(0.125 / 0.14)
    for bad in ([1.0, 1.0, 1.0], [1.0, 2.0]):
        with pytest.raises(ValueError, match="three iterations of different entropy"):
            fit_entropy(bad, [0.0] * len(bad))


def test_entropy_at_words_that_think_again():
    frame = pd.DataFrame(
        {
            "token": [[1, 2, 3], [4, 5]],
            "text": [["so", " Wait", "."], ["but", "x"]],
            "entropy": [[0.1, 0.8, 0.2], [0.4, 0.9]],
        }
    )
    assert entropy_at(TokenTable(frame)) == (pytest.approx(0.6), 2)
    assert entropy_at(TokenTable(frame), ["x"]) == (pytest.approx(0.9), 1)
    assert math.isnan(entropy_at(TokenTable(frame), ["never"])[0])


def test_an_audit_counts_both_errors():
    passed = [True, True, False, False, True]
    right = [True, False, False, True, True]
    found = audit(passed, right)
    assert found.false_positive_rate.value == 1 / 2
    assert found.false_negative_rate.value == pytest.approx(1 / 3)
    assert Rate.of(0, 10).high == pytest.approx(0.2775, abs=1e-4)  # Wilson's, z²/(n + z²)
    assert Rate.of(0, 0).high == 1.0
    with pytest.raises(ValueError, match="5 and 4"):
        audit(passed, right[:4])


LABELS = pd.DataFrame({"problem": [0, 0, 1, 2], "sample": [0, 1, 0, 0], "right": [1, 0, 1, 0]})


def test_labelled_samples_are_compared_with_their_grades(tmp_path):
    LABELS.to_csv(tmp_path / "a.csv")
    LABELS.astype({"right": bool}).to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    LABELS.to_parquet(tmp_path / "a.parquet")
    samples = pd.DataFrame(
        {
            "problem": [0, 0, 1, 1, 2],
            "sample": [0, 1, 0, 1, 0],
            "status": ["correct", "correct", "wrong", "correct", "no_answer"],
        }
    )
    for name in ("a.csv", "a.jsonl", "a.parquet"):
        found = audit_samples(samples, read_labels(tmp_path / name))
        assert (found["right"], found["wrong"]) == (2, 2)
        assert found["false_positive_rate"]["value"] == 1 / 2  # (0, 1) of (0, 1) and (2, 0)
        assert found["false_negative_rate"]["value"] == 1 / 2  # (1, 0) of (0, 0) and (1, 0)
    only_right = read_labels(tmp_path / "a.csv").query("right")
    assert audit_samples(samples, only_right)["false_positive_rate"]["value"] is None
    with pytest.raises(ValueError, match=r"no sample 0 of problem 2: .*another evaluation"):
        audit_samples(samples[:-1], read_labels(tmp_path / "a.csv"))


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (LABELS.drop(columns="right"), "no column 'right'"),
        (LABELS.assign(right=["yes"] * 4), "right is 'yes' in row 0"),
        (LABELS.assign(sample=0), "labels sample 0 of problem 0 twice"),
    ],
)
def test_labels_that_say_nothing_are_refused(tmp_path, labels, words):
    labels.to_csv(tmp_path / "labels.csv")
    with pytest.raises(ValueError, match=words):
        read_labels(tmp_path / "labels.csv")
    with pytest.raises(ValueError, match=r"--audit is .*must be a .csv, .jsonl or .parquet file"):
        read_labels(tmp_path / "missing.csv")
