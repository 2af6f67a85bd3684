"""The plot of pass@k over k: of evaluations, of runs, of the recipes of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from rllib_distrl.figures.look import GREY, INK, PAPER, chart, label_ends, line_style
from rllib_distrl.maths.pass_k import Curve

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
        panel: Axes of `look.chart`.
        curves: At least one.
        styles: Colour, marker and line of each; those of `look.line_style` where there are none.
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
