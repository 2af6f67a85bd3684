"""The figures of a comparison; an ablation gets one panel per part of the method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import EngFormatter

from rllib_distrl.experiments.decisions import Decisions, equal_average_metrics
from rllib_distrl.experiments.results import Record, Results, Row
from rllib_distrl.experiments.statistics import PairedTest
from rllib_distrl.figures import (
    COLOURS,
    GREY,
    GRID,
    INK,
    MARKERS,
    PAPER,
    Chart,
    chart,
    draw_pass_k,
    label_curves,
    legend,
)
from rllib_distrl.maths.pass_k import Curve

_HUES = COLOURS[:6]  # the baseline has the ink
_DASHES = ("-", "--", ":", "-.")
_WHISKER_COLUMNS = 4
_WHISKER_INCHES = (2.3, 0.27)  # width of a panel, height of a row
# Where more rows are drawn, the scale is theirs and not that of a few that lie far outside.
_MOST_TO_SCALE, _SCALED_SHARE, _MARGIN = 20, 0.9, 1.5

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


def whiskers(rows: Sequence[Row], metrics: Sequence[str], test_of: TestOf) -> Chart:
    """One panel per metric, one line per recipe: difference to the baseline in points of %."""
    columns = min(_WHISKER_COLUMNS, len(metrics))
    figure, axes = chart([f"{metric}, points" for metric in metrics], columns=columns)
    width, height = _WHISKER_INCHES
    deep = -(-len(metrics) // columns)
    figure.set_size_inches(2.0 + width * columns, deep * (0.9 + height * len(rows)))
    for number, (panel, metric) in enumerate(zip(axes, metrics, strict=True)):
        tests = {place: test_of(row, metric) for place, row in enumerate(rows)}
        found = {place: test for place, test in tests.items() if test}
        reach = _reach(list(found.values())) if len(rows) > _MOST_TO_SCALE else np.inf
        for place, test in found.items():
            _whisker(panel, test, place, reach)
        for place, row in enumerate(rows):
            if place and row.part != rows[place - 1].part:
                panel.axhline(place - 0.5, color=GRID, linewidth=0.8)
        panel.axvline(0.0, color=GREY, linewidth=1.0)
        labels = [row.name for row in rows] if number % columns == 0 else [""] * len(rows)
        panel.set_yticks(range(len(rows)), labels=labels, parse_math=False)
        panel.set_ylim(len(rows) - 0.5, -0.5)
        panel.locator_params(axis="x", nbins=5)
        panel.grid(axis="y", visible=False)
    return figure


def _reach(tests: Sequence[PairedTest]) -> float:
    """How far from zero, in points, a panel shows."""
    ends = [max(abs(test.difference.low), abs(test.difference.high)) for test in tests]
    return 100 * _MARGIN * float(np.quantile(ends, _SCALED_SHARE)) if ends else np.inf


def _whisker(panel: Any, test: PairedTest, place: int, reach: float) -> None:
    """One difference; what lies beyond the panel's reach is an arrow at its edge."""
    found = test.difference
    colour = GREY if found.holds_zero else COLOURS[0] if found.mean > 0 else COLOURS[1]
    inside = colour if test.clear else PAPER
    width = 1.8 if test.clear else 1.0
    low, mean, high = np.clip((100 * found.low, 100 * found.mean, 100 * found.high), -reach, reach)
    shape = "o" if abs(100 * found.mean) <= reach else "<" if found.mean < 0 else ">"
    panel.plot([low, high], [place, place], color=colour, linewidth=width)
    panel.plot([mean], [place], shape, color=colour, markerfacecolor=inside, markersize=5)
    panel.annotate(
        f"{100 * found.mean:+.1f}", xy=(1.02, place), xycoords=("axes fraction", "data"),
        va="center", ha="left", fontsize=8, color=colour, annotation_clip=False,
    )  # fmt: skip


_GRID_POINTS = 40
_AVERAGE = "avg@"
_MOST_BANDS = 5  # more recipes are drawn without bands
_MOST_TOGETHER = 7  # more recipes get a panel each where lines cross
_ROW_INCHES = 0.2  # of a label beside a panel

Series = Callable[[Record], Sequence[Sequence[float]]]


def _panels(results: Results) -> dict[str, list[Row]]:
    """{title: rows to draw together}; the baseline is in every panel of an ablation."""
    parts = dict.fromkeys(row.part for row in results.rows[1:])
    if not any(parts):
        return {"": list(results.rows)}
    return {
        part or "others": [results.baseline, *(r for r in results.rows[1:] if r.part == part)]
        for part in parts
    }


def _draw(panel: Any, rows: Sequence[Row], series: Series) -> None:
    for number, row in enumerate(rows):
        found = [series(record) for record in row.records if series(record)]
        if not found:
            continue
        x, values = _on_common_grid(found)
        style = {**row_style(number), "marker": ""}
        panel.plot(x, values.mean(0), label=row.name, linewidth=1.5, **style)
        if len(rows) <= _MOST_BANDS:
            _band(panel, x, values.min(0), values.max(0), style["color"])


def _band(panel: Any, x: Any, low: Any, high: Any, colour: str) -> None:
    panel.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)


def _on_common_grid(found: Sequence[Sequence[Sequence[float]]]) -> tuple[np.ndarray, np.ndarray]:
    """(X,) tokens that all seeds reach and (S, X) values, interpolated linearly."""
    curves = [np.asarray(points, dtype=np.float64) for points in found]
    low, high = max(c[0, 0] for c in curves), min(c[-1, 0] for c in curves)
    x = np.linspace(low, high, _GRID_POINTS)
    return x, np.stack([np.interp(x, curve[:, 0], curve[:, 1]) for curve in curves])


def plot_learning(results: Results) -> Chart:
    """Return of the training batches, entropy and validation over the tokens generated."""
    groups = _panels(results)
    if len(groups) > 1:
        figure, axes = chart([f"Mean return: {part}" for part in groups])
        for panel, rows in zip(axes, groups.values(), strict=True):
            _draw(panel, rows, lambda record: record.curve["return"])
            panel.legend(frameon=False, fontsize=7, labelcolor=INK)
            _label_tokens(panel)
        return figure
    titles: dict[str, Series] = {
        "Mean return": lambda record: record.curve["return"],
        "Entropy (nats)": lambda record: record.curve["entropy"],
    }
    for metric in _validated(results):
        titles[f"Validation {metric}"] = lambda record, m=metric: record.validated(m)
    figure, axes = chart(list(titles), columns=2, height=1.2)
    for panel, series in zip(axes, titles.values(), strict=True):
        _draw(panel, results.rows, series)
        _label_tokens(panel)
    legend(figure, axes)
    return figure


def _label_tokens(panel: Any) -> None:
    panel.set_xlabel("tokens")
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))


def _validated(results: Results) -> list[str]:
    """The average and the largest pass@k and best@k of the validations while training."""
    known = results.validation_metrics
    largest = [name for name in equal_average_metrics(results) if name.startswith("pass@")][-1:]
    largest += [name for name in equal_average_metrics(results) if name.startswith("best@")][-1:]
    return [name for name in known if name.startswith(_AVERAGE)] + largest


def plot_pass_k(results: Results) -> Chart:
    """pass@k over k (best@k too where scores are graded), with 95 % intervals."""
    groups = _panels(results)
    if len(groups) == 1:
        return _labelled_pass_k(results)
    figure, axes = chart(list(groups))
    for panel, rows in zip(axes, groups.values(), strict=True):
        _pass_k_panel(panel, rows, results, "pass@")
        panel.legend(frameon=False, fontsize=7, labelcolor=INK)
    return figure


def _labelled_pass_k(results: Results) -> Chart:
    """One wide panel per metric, with the recipes' names at the ends of their lines."""
    graded = any(name.startswith("best@") for name in results.metrics)
    kinds = {"pass@": "Solved within k samples"}
    kinds |= {"best@": "Best score of k samples"} if graded else {}
    figure, axes = chart(list(kinds.values()))
    tall = max(4.0, 1.2 + _ROW_INCHES * len(results.rows))
    figure.set_size_inches(7.2 * len(kinds), tall)
    for panel, kind in zip(axes, kinds, strict=True):
        label_curves(panel, _pass_k_panel(panel, results.rows, results, kind))
    return figure


def _pass_k_panel(panel: Any, rows: Sequence[Row], results: Results, kind: str) -> list[Curve]:
    """Draws a panel; returns its curves."""
    ks = tuple(int(name.removeprefix(kind)) for name in results.metrics if name.startswith(kind))
    curves = []
    for row in rows:
        estimates = [found for k in ks if (found := row.estimate(f"{kind}{k}"))]
        low, mean, high = np.asarray([[e.low, e.mean, e.high] for e in estimates]).T
        curves.append(Curve(row.name, ks, mean, low, high))
    styles = [row_style(number) for number in range(len(rows))]
    unit = "pass@k (% of problems)" if kind == "pass@" else "best@k (%)"
    draw_pass_k(panel, curves, styles, bands=len(rows) <= _MOST_BANDS, unit=unit)
    return curves


def plot_differences(results: Results, decisions: Decisions) -> Chart:
    """Dots and whiskers: the paired difference to the baseline after training."""
    metrics = [name for name in results.main_metrics if "@" in name]
    return whiskers(results.rows[1:], metrics, decisions.after)


def plot_equal_average(results: Results, decisions: Decisions) -> Chart:
    """Dots and whiskers: the same at equal average score, as the mean over the levels."""
    return whiskers(results.rows[1:], equal_average_metrics(results), decisions.at_equal_average)


def plot_against_average(results: Results) -> Chart:
    """A metric over the average score along training: higher at the same place is better.

    Many recipes get a panel each, with the baseline in ink and the others in grey; of the
    metrics there then is the largest k alone.
    """
    metrics = equal_average_metrics(results)
    if len(results.rows) > _MOST_TOGETHER:
        metric = metrics[-1]
        figure, axes = chart([row.name for row in results.rows[1:]], columns=5, height=0.8)
        figure.suptitle(f"{metric} (%) over average score (%)", fontsize=10, color=INK)
        for number, panel in enumerate(axes, start=1):
            _path_beside_others(panel, results, number, metric)
        figure.set_size_inches(11.5, 2.1 * -(-len(axes) // 5) + 0.4)
        return figure
    groups = _panels(results)
    figure, axes = chart(
        [f"{metric} {part}".strip() for part in groups for metric in metrics], columns=2, height=1.3
    )
    drawn = ((metric, rows) for rows in groups.values() for metric in metrics)
    for panel, (metric, rows) in zip(axes, drawn, strict=True):
        for number, row in enumerate(rows):
            x, y = _mean_path(row, metric)
            panel.plot(x, y, label=row.name, markersize=4, **row_style(number))
        panel.set_xlabel("average score (%), validation")
    legend(figure, axes)
    return figure


def _path_beside_others(panel: Any, results: Results, number: int, metric: str) -> None:
    for row in results.rows[1:]:
        panel.plot(*_mean_path(row, metric), color=GRID, linewidth=1.0)
    panel.plot(*_mean_path(results.baseline, metric), markersize=3, **row_style(0))
    style = {**row_style(number), "linestyle": "-"}
    panel.plot(*_mean_path(results.rows[number], metric), markersize=4, linewidth=2.0, **style)


def _mean_path(row: Row, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Average score and metric in %, mean over the seeds validation by validation."""
    paths = [
        record.against_average(metric) for record in row.records if record.against_average(metric)
    ]
    shortest = min((len(path) for path in paths), default=0)
    if not shortest:
        return np.empty(0), np.empty(0)
    means = 100 * np.asarray([path[:shortest] for path in paths]).mean(0)
    return means[:, 0], means[:, 1]
