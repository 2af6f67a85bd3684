"""The pass@k plot: one curve per run, with bootstrap bands."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rllib_distrl.evaluation.result import EvalResult
from rllib_distrl.evaluation.summary import SampleTable
from rllib_distrl.files import replaced_file
from rllib_distrl.maths.pass_k import FloatArray, bootstrap_interval, default_ks, pass_at_k

# Okabe and Ito's colours, told apart with any common colour vision; yellow is left out because it
# vanishes on white. Markers carry the difference on paper without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK, GREY, GRID = "#222222", "#666666", "#E6E6E6"
# Smallest vertical distance of two labels, as a share of the axis.
LABEL_GAP = 0.055
# A letter of a label, as a share of the figure's width, and the letters of "  91.5".
LETTER_WIDTH = 0.0112
VALUE_LETTERS = 6


@dataclass(frozen=True)
class Curve:
    """pass@k of one run.

    Attributes:
        label: Its name in the plot.
        ks: (K,) ascending.
        mean: (K,) in [0, 1].
        low: (K,) lower end of the band.
        high: (K,) upper end of the band.
    """

    label: str
    ks: tuple[int, ...]
    mean: FloatArray
    low: FloatArray
    high: FloatArray


def pass_k_curve(
    label: str, result: EvalResult, ks: Sequence[int] | None = None, *, level: float = 0.95
) -> Curve:
    """pass@k of ``result`` with a bootstrap band over problems.

    Args:
        label: name in the plot.
        result: graded samples.
        ks: where to draw; powers of two up to the number of samples when None.
        level: of the band.

    Returns:
        The curve.
    """
    table = SampleTable(result.frame)
    points = tuple(ks) if ks is not None else default_ks(table.n)
    values = np.stack([pass_at_k(table.n, table.correct, k) for k in points], axis=1)
    low, high = bootstrap_interval(values, level=level, shares=True)
    return Curve(label, points, values.mean(axis=0), low, high)


def plot_pass_k(
    curves: Sequence[Curve] | Mapping[str, EvalResult],
    path: Path | str,
    *,
    title: str = "Solved within k samples",
    subtitle: str = "",
) -> Path:
    """Draws curves over one another and saves them as an image.

    Args:
        curves: at least one; or results by label.
        path: where to; its ending is the format.
        title: the headline.
        subtitle: a second line, for what was evaluated.

    Returns:
        ``path``.

    Raises:
        ValueError: no curves.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if isinstance(curves, Mapping):
        curves = [pass_k_curve(label, result) for label, result in curves.items()]
    if not curves:
        raise ValueError("there is nothing to plot: give at least one curve")
    figure = Figure(figsize=(7.2, 4.5), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    longest = max(len(curve.label) for curve in curves)
    width = max(0.45, 0.875 - LETTER_WIDTH * (longest + VALUE_LETTERS))
    axes = figure.add_axes((0.085, 0.125, width, 0.70))
    for index, curve in enumerate(curves):
        colour = COLOURS[index % len(COLOURS)]
        marker = MARKERS[index % len(MARKERS)]
        axes.fill_between(curve.ks, curve.low, curve.high, color=colour, alpha=0.14, linewidth=0)
        axes.plot(
            curve.ks, curve.mean, color=colour, marker=marker, markersize=5, linewidth=1.8,
            markeredgecolor="white", markeredgewidth=0.7, zorder=3, clip_on=False,
        )  # fmt: skip
    _style(axes, curves)
    _label_ends(axes, curves)
    figure.text(0.085, 0.945, title, fontsize=13, fontweight="bold", color=INK)
    note = "shaded: 95 % bootstrap interval over problems"
    line = f"{subtitle} · {note}" if subtitle else note
    figure.text(0.085, 0.888, line, fontsize=9, color=GREY)
    return _save(figure, Path(path))


def _style(axes: Any, curves: Sequence[Curve]) -> None:
    """Log2 k axis with plain numbers, percentages, and only a horizontal grid."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    ticks = sorted({k for curve in curves for k in curve.ks if k & (k - 1) == 0})
    largest = max(max(curve.ks) for curve in curves)
    axes.set_xscale("log", base=2)
    axes.set_xlim(1 / 1.06, largest * 1.06)
    axes.set_ylim(0.0, min(1.0, 1.12 * max(float(curve.high.max()) for curve in curves)) or 1.0)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda k, _: f"{k:.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}"))
    axes.set_xlabel("k, samples per problem", fontsize=10, color=INK)
    axes.set_ylabel("pass@k (% of problems)", fontsize=10, color=INK)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=9, colors=GREY)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color("#BBBBBB")


def _label_ends(axes: Any, curves: Sequence[Curve]) -> None:
    """Names each curve beside its last point, moved apart where they would overlap."""
    bottom, top = axes.get_ylim()
    ends = np.array([curve.mean[-1] for curve in curves], dtype=np.float64)
    heights = spread_labels((ends - bottom) / (top - bottom), LABEL_GAP)
    for index, (curve, height, end) in enumerate(zip(curves, heights, ends, strict=True)):
        colour = COLOURS[index % len(COLOURS)]
        axes.annotate(
            f"{curve.label}  {100 * end:.1f}",
            xy=(curve.ks[-1], end), xycoords="data",
            xytext=(1.04, height), textcoords="axes fraction", va="center", ha="left",
            fontsize=9.5, color=colour, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "alpha": 0.5, "linewidth": 0.8,
                        "shrinkA": 1, "shrinkB": 4, "relpos": (0.0, 0.5)},
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


def _save(figure: Any, path: Path) -> Path:
    with replaced_file(path) as partial:
        figure.savefig(partial)
    return path
