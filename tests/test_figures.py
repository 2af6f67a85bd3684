"""The pass@k plot: its numbers, its labels, and that something is drawn."""

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rllib_distrl.evaluation.result import EvalResult
from rllib_distrl.figures import plot_pass_k, spread_labels
from rllib_distrl.settings import EvalSettings


def result(seed, problems=20, n=16):
    rng = np.random.default_rng(seed)
    scores = rng.random((problems, n)) < rng.random((problems, 1)) ** 2
    frame = pd.DataFrame(
        {
            "problem": np.repeat(np.arange(problems), n),
            "sample": np.tile(np.arange(n), problems),
            "score": scores.astype(float).ravel(),
        }
    )
    return EvalResult(frame, EvalSettings(problems=problems, n=n))


def test_a_curve_is_the_summary_with_a_band_around_it():
    one = result(0)
    curve = one.curve("one")
    assert curve.ks == (1, 2, 4, 8, 16)
    assert curve.mean[0] == pytest.approx(one.frame["score"].mean())
    assert (curve.low <= curve.mean).all() and (curve.mean <= curve.high).all()
    assert (np.diff(curve.mean) > 0).all()


def test_several_runs_are_drawn_in_their_colours(tmp_path):
    import matplotlib.image

    path = plot_pass_k({"PPO": result(1), "DistRL": result(2)}, tmp_path / "deep" / "plot.png")
    image = matplotlib.image.imread(path)[..., :3]
    assert image.shape[0] > 400 and image.shape[1] > 800
    for colour in ("#0072B2", "#D55E00"):
        rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        assert (np.abs(image - rgb).max(axis=-1) < 0.02).sum() > 200
    assert [p.name for p in path.parent.iterdir()] == ["plot.png"]


def test_a_run_that_never_passes_is_drawn(tmp_path):
    nothing = result(0)
    nothing.frame["score"] = 0.0
    assert plot_pass_k({"zero": nothing}, tmp_path / "plot.png").is_file()


def test_no_curves_are_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_pass_k([], tmp_path / "plot.png")


def test_labels_move_as_little_as_possible_by_hand():
    assert spread_labels(np.array([0.2, 0.8]), 0.1).tolist() == [0.2, 0.8]
    assert spread_labels(np.array([0.5, 0.5]), 0.1) == pytest.approx([0.45, 0.55])
    assert spread_labels(np.array([0.98, 1.0]), 0.1) == pytest.approx([0.9, 1.0])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_labels_never_overlap_and_keep_their_order(heights):
    placed = spread_labels(np.array(heights), 0.055)
    assert placed.max() <= 1.0 + 1e-12
    order = np.argsort(heights, kind="stable")
    assert all(b - a >= 0.055 - 1e-9 for a, b in pairwise(placed[order]))
