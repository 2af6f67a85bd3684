"""The figures of a comparison; an ablation gets one panel per part of the method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import EngFormatter

from rllib_distrl.comparison.matched import front_metrics
from rllib_distrl.comparison.record import Record
from rllib_distrl.comparison.results import Results, Row
from rllib_distrl.comparison.tables import main_metrics
from rllib_distrl.viewer.charts import COLOURS, GREY, INK, MARKERS, Chart, chart, legend

_GRID_POINTS = 40
_AVERAGE = "avg@"

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


def _style(number: int) -> dict[str, Any]:
    """Colour, marker and line of a row; seven colours, then the same ones dashed."""
    dashes = ("-", "--", ":", "-.")
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": dashes[number // len(COLOURS) % len(dashes)],
    }


def _draw(panel: Any, rows: Sequence[Row], series: Series, *, markers: bool) -> None:
    for number, row in enumerate(rows):
        found = [series(record) for record in row.records if series(record)]
        if not found:
            continue
        x, values = _on_common_grid(found)
        style = _style(number)
        if not markers:
            style["marker"] = ""
        panel.plot(x, values.mean(0), label=row.name, linewidth=1.7, markersize=4, **style)
        panel.fill_between(
            x, values.min(0), values.max(0), color=style["color"], alpha=0.12, linewidth=0
        )


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
            _draw(panel, rows, lambda record: record.curve["return"], markers=False)
            panel.legend(frameon=False, fontsize=7, labelcolor=INK)
            _label_tokens(panel)
        return figure
    titles: dict[str, Series] = {
        "Mean return": lambda record: record.curve["return"],
        "Entropy (nats)": lambda record: record.curve["entropy"],
    }
    for metric in _validated(results):
        titles[f"Validation {metric}"] = lambda record, m=metric: record.validated(m)
    figure, axes = chart(list(titles), columns=2)
    for panel, series in zip(axes, titles.values(), strict=True):
        _draw(panel, results.rows, series, markers=False)
        _label_tokens(panel)
    legend(figure, axes)
    return figure


def _label_tokens(panel: Any) -> None:
    panel.set_xlabel("tokens")
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))


def _validated(results: Results) -> list[str]:
    """The average and the largest pass@k of the validations while training."""
    known = results.validation_metrics
    average = [name for name in known if name.startswith(_AVERAGE)]
    return average + [name for name in known if name.startswith("pass@")][-1:]


def plot_pass_k(results: Results) -> Chart:
    """pass@k over k with 95 % bootstrap bands over the seeds."""
    groups = _panels(results)
    figure, axes = chart(
        [part or "Solved within k samples" for part in groups],
        height=1.4 if len(groups) == 1 else 1,
    )
    ks = [int(name.partition("@")[2]) for name in results.metrics if name.startswith("pass@")]
    if len(groups) == 1:
        figure.set_size_inches(7.2, 4.3)
    for panel, rows in zip(axes, groups.values(), strict=True):
        for number, row in enumerate(rows):
            estimates = [found for k in ks if (found := row.estimate(f"pass@{k}"))]
            bands = 100 * np.asarray([[e.low, e.mean, e.high] for e in estimates]).T
            style = _style(number)
            panel.plot(ks, bands[1], label=row.name, linewidth=1.7, markersize=4, **style)
            panel.fill_between(
                ks, bands[0], bands[2], color=style["color"], alpha=0.12, linewidth=0
            )
        panel.set_xscale("log", base=2)
        panel.set_xticks(ks, labels=[str(k) for k in ks])
        panel.set_xlabel("k, samples per problem")
        panel.set_ylabel("pass@k (% of problems)")
        if len(groups) > 1:
            panel.legend(frameon=False, fontsize=7, labelcolor=INK)
    if len(groups) == 1:
        legend(figure, axes)
    return figure


def plot_differences(results: Results) -> Chart:
    """Dots and whiskers: the paired difference to the baseline, in points of %."""
    metrics = [name for name in main_metrics(results) if "@" in name]
    figure, axes = chart([f"{name} (points)" for name in metrics], columns=4)
    rows = results.rows[1:]
    width, _ = figure.get_size_inches()
    figure.set_size_inches(max(width * 0.8, 6.0), 1.3 + 0.28 * len(rows))
    for number, (panel, metric) in enumerate(zip(axes, metrics, strict=True)):
        for place, row in enumerate(rows):
            _whisker(panel, results, row, metric, place)
        panel.axvline(0.0, color=GREY, linewidth=1.0)
        labels = [row.name for row in rows] if number == 0 else [""] * len(rows)
        panel.set_yticks(range(len(rows)), labels=labels)
        panel.set_ylim(len(rows) - 0.5, -0.5)
        panel.grid(axis="y", visible=False)
    return figure


def _whisker(panel: Any, results: Results, row: Row, metric: str, place: int) -> None:
    test = results.against_baseline(row, metric)
    if test is None:
        return
    found = test.difference
    clear = found.low > 0 or found.high < 0
    colour = COLOURS[0] if clear and found.mean > 0 else COLOURS[1] if clear else GREY
    panel.plot([100 * found.low, 100 * found.high], [place, place], color=colour, linewidth=1.8)
    panel.plot([100 * found.mean], [place], "o", color=colour, markersize=5)


def plot_front(results: Results) -> Chart:
    """pass@k over the average score along training: higher at the same place is better."""
    metrics = front_metrics(results)
    groups = _panels(results)
    titles = [f"{metric} {part}".strip() for part in groups for metric in metrics]
    figure, axes = chart(titles, columns=2)
    drawn = ((metric, rows) for rows in groups.values() for metric in metrics)
    for panel, (metric, rows) in zip(axes, drawn, strict=True):
        for number, row in enumerate(rows):
            paths = [record.front(metric) for record in row.records if record.front(metric)]
            shortest = min((len(path) for path in paths), default=0)
            if shortest:
                means = 100 * np.asarray([path[:shortest] for path in paths]).mean(0)
                panel.plot(means[:, 0], means[:, 1], label=row.name, markersize=4, **_style(number))
        panel.set_xlabel("average score (%), validation")
    legend(figure, axes)
    return figure
