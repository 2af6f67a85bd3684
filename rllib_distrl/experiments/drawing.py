"""What the figures of a comparison share: a recipe's look, labels at lines, dots and whiskers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rllib_distrl.evaluation.plots import spread_labels
from rllib_distrl.experiments.results import Row
from rllib_distrl.experiments.statistics import PairedTest
from rllib_distrl.viewer.charts import COLOURS, GREY, INK, MARKERS, Chart, chart

_HUES = COLOURS[:6]  # the baseline has the ink
_DASHES = ("-", "--", ":", "-.")
_LABEL_SIZE = 8.5
_WHISKER_COLUMNS = 4
_WHISKER_INCHES = (2.3, 0.27)  # width of a panel, height of a row

TestOf = Callable[[Row, str], PairedTest | None]


def row_style(number: int) -> dict[str, Any]:
    """Colour, marker and line of a recipe: ink for the baseline, then six hues, dashed after."""
    if number == 0:
        return {"color": INK, "marker": MARKERS[0], "linestyle": "-"}
    turn, hue = divmod(number - 1, len(_HUES))
    return {
        "color": _HUES[hue],
        "marker": MARKERS[1 + hue],
        "linestyle": _DASHES[turn % len(_DASHES)],
    }


def label_ends(panel: Any, ends: Sequence[tuple[str, float, float, str]]) -> None:
    """Names lines at the right edge, moved apart where the names would overlap.

    Args:
        panel: Axes with everything drawn; its limits are kept from here on.
        ends: (name, x, y, colour) of each line's last point.
    """
    bottom, top = panel.get_ylim()
    panel.set_ylim(bottom, top)
    panel.set_xlim(panel.get_xlim())
    height = panel.figure.get_size_inches()[1] * panel.get_position().height * 72
    shares = (np.asarray([y for _, _, y, _ in ends]) - bottom) / (top - bottom)
    places = spread_labels(shares, 1.25 * _LABEL_SIZE / height)
    for (name, x, y, colour), place in zip(ends, places, strict=True):
        panel.annotate(
            name, xy=(x, y), xycoords="data", xytext=(1.04, place), textcoords="axes fraction",
            va="center", ha="left", fontsize=_LABEL_SIZE, color=colour, annotation_clip=False,
            parse_math=False,
            arrowprops={"arrowstyle": "-", "color": colour, "alpha": 0.5, "linewidth": 0.7,
                        "shrinkA": 1, "shrinkB": 3, "relpos": (0.0, 0.5)},
        )  # fmt: skip


def whiskers(rows: Sequence[Row], metrics: Sequence[str], test_of: TestOf) -> Chart:
    """One panel per metric, one line per recipe: difference to the baseline in points of %."""
    columns = min(_WHISKER_COLUMNS, len(metrics))
    figure, axes = chart([f"{metric}, points" for metric in metrics], columns=columns)
    width, height = _WHISKER_INCHES
    deep = -(-len(metrics) // columns)
    figure.set_size_inches(2.0 + width * columns, deep * (0.9 + height * len(rows)))
    for number, (panel, metric) in enumerate(zip(axes, metrics, strict=True)):
        for place, row in enumerate(rows):
            if test := test_of(row, metric):
                _whisker(panel, test, place)
        panel.axvline(0.0, color=GREY, linewidth=1.0)
        labels = [row.name for row in rows] if number % columns == 0 else [""] * len(rows)
        panel.set_yticks(range(len(rows)), labels=labels, parse_math=False)
        panel.set_ylim(len(rows) - 0.5, -0.5)
        panel.locator_params(axis="x", nbins=5)
        panel.grid(axis="y", visible=False)
    return figure


def _whisker(panel: Any, test: PairedTest, place: int) -> None:
    found = test.difference
    colour = GREY if found.holds_zero else COLOURS[0] if found.mean > 0 else COLOURS[1]
    inside = colour if test.clear else "white"
    width = 1.8 if test.clear else 1.0
    panel.plot([100 * found.low, 100 * found.high], [place, place], color=colour, linewidth=width)
    panel.plot([100 * found.mean], [place], "o", color=colour, markerfacecolor=inside, markersize=5)
    panel.annotate(
        f"{100 * found.mean:+.1f}", xy=(1.02, place), xycoords=("axes fraction", "data"),
        va="center", ha="left", fontsize=8, color=colour, annotation_clip=False,
    )  # fmt: skip
