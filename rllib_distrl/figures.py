"""The look of all figures: colours, panels, legends, names at lines' ends, and SVG for pages.

And the plot of pass@k over k, of evaluations, of runs, of the recipes of a comparison.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from rllib_distrl.files import replaced_file
from rllib_distrl.maths.pass_k import Curve, FloatArray

# Okabe and Ito's colours, told apart with any common colour vision; yellow is left out because it
# vanishes on white. Markers carry the difference on paper without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK, GREY, GRID, PAPER = "#222222", "#666666", "#E6E6E6", "#FFFFFE"
PANEL_INCHES = (3.9, 2.7)
_LEAST_SCALE = 0.75  # of a figure on a narrow page, which scrolls then: its texts stay readable
# A page in the dark replaces these by its own.
_PAGE_COLOURS = {
    INK: "var(--ink)", GREY: "var(--soft)", GRID: "var(--line)", PAPER: "var(--card)",
    COLOURS[-1]: "var(--ink)",
}  # fmt: skip
_LABEL_SIZE = 8.5
# It was a package: without a path the modules that it had would not be looked for, see `moved`.
__path__: list[str] = []


class Chart(Figure):
    """A matplotlib figure that a notebook shows when it is the value of a cell."""

    def _repr_png_(self) -> bytes:
        image = io.BytesIO()
        self.savefig(image, format="png", dpi=110, facecolor="white")
        return image.getvalue()

    def save(self, path: Path, dpi: int = 130) -> Path:
        """Writes the figure as an image, in one step; the path's ending is the format."""
        with replaced_file(path) as partial:
            self.savefig(partial, dpi=dpi, facecolor="white")
        return path

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
        least = round(96 * _LEAST_SCALE * self.get_figwidth())
        svg = svg.replace("<svg", f'<svg style="min-width: {least}px"', 1)
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


def line_style(number: int) -> dict[str, Any]:
    """Colour and marker of the line of that number."""
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}


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


def spread_labels(heights: FloatArray, gap: float) -> FloatArray:
    """Moves labels apart, as little as possible in the sense of least squares, keeping order.

    Args:
        heights: (L,) wanted positions in [0, 1].
        gap: smallest distance between neighbours.

    Returns:
        (L,) positions at least ``gap`` apart, shifted down together where they pass 1.
    """
    order = np.argsort(heights, kind="stable")
    offsets = gap * np.arange(len(order))
    # Isotonic regression by pooling: blocks of (sum, count) whose means must increase.
    blocks: list[list[float]] = []
    for value in np.asarray(heights, dtype=np.float64)[order] - offsets:
        blocks.append([value, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] >= blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += count
    pooled = np.concatenate([np.full(int(count), total / count) for total, count in blocks])
    pooled = np.minimum(pooled, 1.0 - offsets[-1])
    placed = np.empty(len(order), dtype=np.float64)
    placed[order] = pooled + offsets
    return placed


_INCHES = (7.2, 4.5)
_HEADROOM = 1.12  # above the highest band, as a share of it


class HasCurve(Protocol):
    """An evaluation."""

    def curve(self, label: str) -> Curve:
        """Its pass@k."""
        ...


def draw_pass_k(
    panel: Any,
    curves: Sequence[Curve],
    styles: Sequence[Mapping[str, Any]] = (),
    *,
    bands: bool = True,
    unit: str = "pass@k (% of problems)",
) -> None:
    """Draws curves over one another, k on a logarithmic axis, shares in %.

    Args:
        panel: Axes of `chart`.
        curves: At least one.
        styles: Colour, marker and line of each; those of `line_style` where there are none.
        bands: Whether intervals are shaded.
        unit: Of the vertical axis.
    """
    for number, curve in enumerate(curves):
        style = {**line_style(number), **(styles[number] if styles else {})}
        if bands:
            panel.fill_between(
                curve.ks, curve.low, curve.high, color=style["color"], alpha=0.13, linewidth=0
            )
        panel.plot(
            curve.ks, curve.mean, label=curve.label, linewidth=1.7, markersize=5,
            markeredgecolor=PAPER, markeredgewidth=0.6, zorder=3, clip_on=False, **style,
        )  # fmt: skip
    ks = sorted({k for curve in curves for k in curve.ks})
    powers = [k for k in ks if k & (k - 1) == 0]
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_locator(FixedLocator(powers if len(powers) > 1 else ks))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda k, _: f"{k:.0f}"))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}"))
    panel.set_xlabel("k, samples per problem")
    panel.set_ylabel(unit)


def label_curves(panel: Any, curves: Sequence[Curve]) -> None:
    """Names what `draw_pass_k` has drawn at the lines' ends, with the last value in %."""
    ends = [
        (f"{curve.label}  {100 * curve.mean[-1]:.1f}", curve.ks[-1], float(curve.mean[-1]),
         str(line.get_color()))
        for curve, line in zip(curves, panel.lines, strict=True)
    ]  # fmt: skip
    label_ends(panel, ends)


def plot_pass_k(
    curves: Sequence[Curve] | Mapping[str, HasCurve],
    path: Path | str,
    *,
    title: str = "Solved within k samples",
    subtitle: str = "",
) -> Path:
    """Draws curves over one another and saves them as an image.

    Args:
        curves: at least one; or evaluations by label.
        path: where to; its ending is the format.
        title: the headline.
        subtitle: a second line, for what was evaluated.

    Returns:
        ``path``.

    Raises:
        ValueError: no curves.
    """
    if isinstance(curves, Mapping):
        curves = [found.curve(label) for label, found in curves.items()]
    if not curves:
        raise ValueError("there is nothing to plot: give at least one curve")
    figure, (panel,) = chart([title])
    figure.set_size_inches(*_INCHES)
    draw_pass_k(panel, curves)
    top = max(float(np.max(curve.high)) for curve in curves)
    panel.set_ylim(0.0, min(1.0, _HEADROOM * top) or 1.0)
    label_curves(panel, curves)
    figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold", color=INK)
    note = "shaded: 95 % bootstrap interval over problems"
    line = f"{subtitle} · {note}" if subtitle else note
    panel.set_title(line, loc="left", fontsize=9, color=GREY, fontweight="normal", parse_math=False)
    return figure.save(Path(path), dpi=160)
