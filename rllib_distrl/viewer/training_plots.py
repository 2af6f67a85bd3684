"""Figures of training: curves, pass@k, mismatch, time, grades; several runs overlaid."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rllib_distrl.evaluation.summary import SampleTable
from rllib_distrl.figures.look import COLOURS, GREY, Chart, chart, legend, line_style, smooth
from rllib_distrl.figures.pass_k import draw_pass_k
from rllib_distrl.maths.pass_k import pass_k_curve
from rllib_distrl.runs.reading import EVALUATIONS, Run

Runs = Run | Iterable[Run]
_LEARNER = "learners/default_policy/"
_RUNNER = "env_runners/"
LEARNING = {
    "Mean return": f"{_RUNNER}episode_return_mean",
    "Mean return, validation": f"evaluation/{_RUNNER}episode_return_mean",
    "Completion length (tokens)": f"{_RUNNER}episode_len_mean",
    "Entropy (nats)": f"{_LEARNER}entropy",
    "Policy loss": f"{_LEARNER}policy_loss",
    "Critic loss": f"{_LEARNER}vf_loss",
}
MISMATCH = {
    "Ratio learner / sampler, 95th percentile": f"{_LEARNER}logp_mismatch_p95",
    "Largest ratio": f"{_LEARNER}logp_mismatch_max",
    "Share outside of the clip band": f"{_LEARNER}logp_mismatch_outside_clip",
    "Effective sample size (share)": f"{_LEARNER}logp_mismatch_ess",
}
OPTIMISM = {
    "Bonus coefficient": f"{_LEARNER}optimism_coeff",
    "Bonus / advantage (std)": f"{_LEARNER}optimism_ratio",
    "Mean spread statistic": f"{_LEARNER}optimism_stat_mean",
}
_PHASES = {
    "sampling": "timers/env_runner_sampling_timer",
    "update": "timers/learner_update_timer",
    "weight sync": "timers/synch_weights",
    "validation": "timers/evaluation_iteration",
}
_MISMATCH_RANGE = 0.02
_STATUS = f"{_RUNNER}grade_status/"
_STATUS_COLOURS = {
    "correct": "#009E73",
    "wrong": "#BBBBBB",
    "no_answer": "#E69F00",
    "too_long": "#56B4E9",
    "timeout": "#D55E00",
    "worker_died": "#CC79A7",
    "unchecked": "#F0E442",
    "verifier_error": "#0072B2",
}


def as_runs(runs: Runs) -> list[Run]:
    """One run or several, as a list.

    Raises:
        ValueError: If there is none.
    """
    found = [runs] if isinstance(runs, Run) else list(runs)
    if not found:
        raise ValueError("there is nothing to plot: give at least one run")
    return found


def plot_metrics(runs: Runs, metrics: Mapping[str, str], *, least_range: float = 0.0) -> Chart:
    """One panel per metric over the iterations, one colour per run.

    Metrics that no run has are left out.

    Args:
        runs: One or several.
        metrics: {title: column of `Run.iterations`}.
        least_range: Smallest height of an axis, so that rounding errors look like what they are.

    Raises:
        ValueError: If no run has any of them.
    """
    runs = as_runs(runs)
    known = {
        title: key
        for title, key in metrics.items()
        if any(key in run.iterations and run.iterations[key].notna().any() for run in runs)
    }
    if not known:
        raise ValueError(f"no run has any of {', '.join(metrics.values())}")
    figure, axes = chart(list(known), columns=2 if len(known) == 4 else 3)
    for panel, key in zip(axes, known.values(), strict=True):
        for number, run in enumerate(runs):
            _curve(panel, run, key, COLOURS[number % len(COLOURS)])
        panel.set_xlabel("iteration")
        panel.xaxis.get_major_locator().set_params(integer=True)
        low, high = panel.get_ylim()
        if high - low < least_range:
            middle = (low + high) / 2
            panel.set_ylim(middle - least_range / 2, middle + least_range / 2)
    if len(runs) > 1:
        legend(figure, axes)
    return figure


def _curve(panel: Any, run: Run, key: str, colour: str) -> None:
    if key not in run.iterations:
        return
    values = run.iterations[key].astype("float64").dropna()
    if len(values) == 1:
        panel.plot(values.index, values, "o", color=colour, label=run.name)
        return
    panel.plot(values.index, values, color=colour, alpha=0.22, linewidth=0.9)
    panel.plot(values.index, smooth(values), color=colour, linewidth=1.7, label=run.name)


def plot_learning_curves(runs: Runs) -> Chart:
    """Return, length, entropy and losses over the iterations."""
    return plot_metrics(runs, LEARNING)


def plot_mismatch(runs: Runs) -> Chart:
    """How far the sampler's probabilities are from the learner's."""
    return plot_metrics(runs, MISMATCH, least_range=_MISMATCH_RANGE)


def plot_optimism(runs: Runs) -> Chart:
    """The coefficient of the bonus and its weight beside the advantage."""
    return plot_metrics(runs, OPTIMISM)


def plot_pass_at_k(runs: Runs) -> Chart:
    """pass@k before (dashed) and after training, with 95 % bootstrap bands over problems.

    Raises:
        ValueError: If no run has graded completions.
    """
    figure, (panel,) = chart(["Solved within k samples"])
    figure.set_size_inches(7.2, 3.9)
    curves, styles = [], []
    for number, run in enumerate(as_runs(runs)):
        columns = ["problem", "sample", "score", "status", "finish_reason", "answer"]
        episodes = run.read_episodes(columns)
        for when in EVALUATIONS:
            part: Any = episodes[episodes["when"] == when]
            if len(part):
                table = SampleTable(part)
                curves.append(pass_k_curve(f"{run.name}, {when}", table.n, table.correct))
                dashed = {"linestyle": "--"} if when == "before" else {}
                styles.append({**line_style(number), **dashed})
    if not curves:
        raise ValueError("no run has been evaluated yet")
    draw_pass_k(panel, curves, styles)
    legend(figure, [panel])
    return figure


def plot_timing(runs: Runs) -> Chart:
    """Mean seconds per iteration and phase, one bar per run.

    Raises:
        ValueError: If no run has timed its phases.
    """
    runs = as_runs(runs)
    figure, (panel,) = chart(["Seconds per iteration"])
    figure.set_size_inches(7.2, 1.5 + 0.4 * len(runs))
    for place, run in enumerate(runs):
        start = 0.0
        for number, (phase, key) in enumerate(_PHASES.items()):
            if key in run.iterations:
                seconds = float(np.nansum(run.iterations[key].to_numpy(dtype=np.float64)))
                seconds /= len(run.iterations)
                panel.barh(place, seconds, left=start, height=0.6, label=phase,
                           color=COLOURS[number])  # fmt: skip
                start += seconds
    if not panel.patches:
        raise ValueError("no run has timed its phases")
    panel.set_yticks(range(len(runs)), labels=[run.name for run in runs])
    panel.invert_yaxis()
    panel.grid(axis="y", visible=False)
    legend(figure, [panel])
    return figure


def plot_grades(runs: Runs) -> Chart:
    """What became of the completions: shares of each status over the iterations.

    Raises:
        ValueError: If no run counts them.
    """
    counted = [run for run in as_runs(runs) if _statuses(run)]
    if not counted:
        raise ValueError("no run counts what became of its completions")
    figure, axes = chart([run.name for run in counted])
    for panel, run in zip(axes, counted, strict=True):
        names = _statuses(run)
        counts = run.iterations[[f"{_STATUS}{name}" for name in names]].astype("float64").fillna(0)
        shares = counts.to_numpy() / np.maximum(counts.to_numpy().sum(1, keepdims=True), 1)
        panel.stackplot(
            run.iterations.index, shares.T, labels=[name.replace("_", " ") for name in names],
            colors=[_STATUS_COLOURS.get(name, GREY) for name in names],
        )  # fmt: skip
        panel.set_ylim(0, 1)
        panel.set_xlabel("iteration")
        panel.xaxis.get_major_locator().set_params(integer=True)
    legend(figure, axes)
    return figure


def _statuses(run: Run) -> Sequence[str]:
    found = [key.removeprefix(_STATUS) for key in run.iterations if key.startswith(_STATUS)]
    order = list(_STATUS_COLOURS)
    return sorted(found, key=lambda name: order.index(name) if name in order else len(order))
