"""The numbers of an evaluation from a table of samples, worked by hand."""

import pandas as pd
import pytest

from rllib_distrl.evaluation.measures import per_problem, summarise
from rllib_distrl.maths.pass_k import default_ks


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
