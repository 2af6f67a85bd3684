"""Further measures, worked by hand."""

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
    read_labels,
)
from rllib_distrl.method.token_table import TokenTable


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
