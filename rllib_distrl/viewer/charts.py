"""The look of all figures, and a figure that notebooks show by themselves."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from rllib_distrl.evaluation.plots import COLOURS, GREY, GRID, INK, MARKERS
from rllib_distrl.runs.reading import Run

__all__ = ["COLOURS", "GREY", "GRID", "INK", "MARKERS", "Chart", "as_runs", "chart", "smooth"]

PANEL_INCHES = (3.9, 2.7)
# A page in the dark replaces these by its own.
_PAGE_COLOURS = {INK: "var(--ink)", GREY: "var(--soft)", GRID: "var(--line)"}


class Chart(Figure):
    """A matplotlib figure that a notebook shows when it is the value of a cell."""

    def _repr_png_(self) -> bytes:
        image = io.BytesIO()
        self.savefig(image, format="png", dpi=110, facecolor="white")
        return image.getvalue()

    def to_svg(self, name: str) -> str:
        """The figure as an SVG element whose ink and grid follow the colours of the page.

        Args:
            name: Makes the ids of its parts unique within the page.

        Returns:
            `<svg …>…</svg>`, with texts as text.
        """
        text = io.StringIO()
        FigureCanvasSVG(self)
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
            self.savefig(text, format="svg", transparent=True, metadata={"Date": None})
        svg = text.getvalue()
        svg = svg[svg.index("<svg") :]
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
        # Every figure numbers its parts alike: figure_1, axes_1 …
        svg = re.sub(r'\bid="', f'id="{name}-', svg)
        svg = re.sub(r'(href="#|url\(#)', rf"\1{name}-", svg)
        for colour, variable in _PAGE_COLOURS.items():
            svg = svg.replace(colour.lower(), variable)
        return svg


def chart(
    titles: Sequence[str], *, columns: int = 3, height: float = 1.0
) -> tuple[Chart, list[Any]]:
    """An empty figure with one panel per title.

    Args:
        titles: Of the panels.
        columns: Most panels side by side.
        height: Of a panel, relative to the usual.

    Returns:
        The figure and its axes, in the order of `titles`.
    """
    columns = min(columns, max(len(titles), 1))
    rows = -(-len(titles) // columns)
    width, tall = PANEL_INCHES
    figure = Chart(figsize=(width * columns, tall * height * rows), layout="constrained")
    axes = []
    for number, title in enumerate(titles):
        panel = figure.add_subplot(rows, columns, number + 1)
        panel.set_title(
            title, fontsize=10, color=INK, loc="left", fontweight="bold", parse_math=False
        )
        panel.set_facecolor("none")
        panel.grid(color=GRID, linewidth=0.8)
        panel.set_axisbelow(True)
        panel.tick_params(length=0, labelsize=8, colors=GREY)
        panel.xaxis.label.set(color=GREY, fontsize=9)
        panel.yaxis.label.set(color=GREY, fontsize=9)
        for side, spine in panel.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(GREY)
        axes.append(panel)
    return figure, axes


def legend(figure: Chart, axes: Sequence[Any]) -> None:
    """One legend below the panels, each label once."""
    entries: dict[str, Any] = {}
    for panel in axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        figure.legend(
            list(entries.values()), list(entries), loc="outside lower center",
            ncols=min(len(entries), 5), frameon=False, fontsize=9, labelcolor=INK,
        )  # fmt: skip


def smooth(values: Iterable[float]) -> np.ndarray:
    """A centred running mean over a twentieth of the points; gaps stay out of it."""
    import pandas as pd

    series = pd.Series(list(values), dtype="float64")
    means = series.rolling(max(1, len(series) // 20), center=True, min_periods=1).mean()
    return np.asarray(means, dtype=np.float64)


def as_runs(runs: Run | Iterable[Run]) -> list[Run]:
    """One run or several, as a list.

    Raises:
        ValueError: If there is none.
    """
    found = [runs] if isinstance(runs, Run) else list(runs)
    if not found:
        raise ValueError("there is nothing to plot: give at least one run")
    return found
