"""Figures of comparisons: what a reader sees where there are many rows."""

from __future__ import annotations

import pytest

from rllib_distrl.experiments.decisions import decide
from rllib_distrl.experiments.figures import plot_differences
from rllib_distrl.experiments.results import arrange
from tests.experiments.made_records import records


@pytest.mark.parametrize(("others", "marker"), [(3, "o"), (30, "<")])
def test_among_many_rows_one_that_lies_far_outside_does_not_set_the_scale(
    others: int, marker: str
) -> None:
    near = {f"near-{i}": [0.50, 0.53] for i in range(others)}
    averages = {"base": [0.5, 0.52], **near, "far": [0.1, 0.09]}
    found = arrange(records(averages), list(averages), [0, 1])
    panel = plot_differences(found, decide(found)).axes[0]
    points = [line for line in panel.get_lines() if line.get_marker() in ("o", "<", ">")]
    assert [line.get_marker() for line in points] == ["o"] * others + [marker]
    assert (panel.get_xlim()[0] < -40) == (marker == "o")
    assert points[0].get_xdata() == pytest.approx([0.5])  # points of %: 0 and 1 in the mean
