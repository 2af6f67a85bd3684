"""Figures of training, several runs overlaid: curves, pass@k, mismatch, time, grades.

And of the critic: is its distribution right, and does its spread mean anything?
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rllib_distrl.evaluation.measures import SampleTable
from rllib_distrl.figures import (
    COLOURS,
    GREY,
    INK,
    Chart,
    chart,
    draw_pass_k,
    legend,
    line_style,
    smooth,
)
from rllib_distrl.maths.pass_k import pass_k_curve
from rllib_distrl.maths.rank_correlation import ignorance_metrics
from rllib_distrl.method.token_table import TokenTable
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


Tables = TokenTable | Mapping[str, TokenTable]
_PIT = f"{_LEARNER}quantile_pit_"
CALIBRATION = {
    "Coverage of the central 50 %": f"{_LEARNER}quantile_coverage_50",
    "Coverage of the central 90 %": f"{_LEARNER}quantile_coverage_90",
    "Largest deviation of the PIT from uniform": f"{_LEARNER}quantile_pit_ks",
    "Explained variance of the value": f"{_LEARNER}quantile_explained_variance",
    "CRPS": f"{_LEARNER}quantile_crps",
    "Spread": f"{_LEARNER}quantile_spread",
    "Bias of the value": f"{_LEARNER}quantile_bias",
}
_BINS = 10
# Continuations that a state must have for its mean return to say something.
_LEAST_CONTINUATIONS = 4


def plot_calibration(runs: Run | Iterable[Run]) -> Chart:
    """Coverage, explained variance, CRPS, spread and bias of the critic over the iterations."""
    return plot_metrics(runs, CALIBRATION)


def plot_pit(runs: Run | Iterable[Run]) -> Chart:
    """Where returns fell in the predicted distribution, in the last tenth of training.

    Flat is calibrated; a hump in the middle is too wide, horns at the ends too narrow.

    Raises:
        ValueError: If no run has a quantile critic.
    """
    figure, (panel,) = chart(["Returns within the predicted distribution (PIT)"])
    figure.set_size_inches(5.6, 3.1)
    bins = 0
    for number, run in enumerate(as_runs(runs)):
        # As many as were logged: the constant of the learner would come with torch.
        keys = [key for key in run.iterations if key.removeprefix(_PIT).isdigit()]
        keys.sort(key=lambda key: int(key.removeprefix(_PIT)))
        if keys:
            bins = len(keys)
            last = run.iterations[keys].dropna().tail(max(1, len(run.iterations) // 10))
            panel.stairs(last.mean().to_numpy(), np.linspace(0, 1, bins + 1), linewidth=1.8,
                         color=COLOURS[number % len(COLOURS)], label=run.name)  # fmt: skip
    if not bins:
        raise ValueError("no run has a quantile critic")
    panel.axhline(1 / bins, color=GREY, linestyle="--", linewidth=1, label="calibrated")
    panel.set_xlabel("predicted probability of a lower return")
    panel.set_ylabel("share of returns")
    legend(figure, [panel])
    return figure


def plot_reliability(tables: Tables) -> Chart:
    """Mean return against predicted value, over bins of tokens; on the diagonal is right.

    Raises:
        ValueError: If a table has no values.
    """
    figure, (panel,) = chart(["Reliability of the value"])
    figure.set_size_inches(4.6, 3.6)
    ends = []
    for number, (name, table) in enumerate(_named(tables).items()):
        values = table.numbers("value")
        returns = np.repeat(table.completions["score"].to_numpy(dtype=np.float64), table.lengths)
        predicted, observed, share = reliability(values, returns)
        colour = COLOURS[number % len(COLOURS)]
        panel.plot(predicted, observed, color=colour, linewidth=1.4, label=name)
        panel.scatter(predicted, observed, s=8 + 160 * share, color=colour, alpha=0.7)
        ends += [*predicted, *observed]
    line = [min(ends), max(ends)]
    panel.plot(line, line, "--", color=GREY, linewidth=1, label="right")
    panel.set_xlabel("value (mean of a bin of tokens)")
    panel.set_ylabel("mean return")
    legend(figure, [panel])
    return figure


def reliability(
    values: np.ndarray, returns: np.ndarray, bins: int = _BINS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean value, mean return and share of the tokens in each of equally wide bins of the value.

    Args:
        values: (M,), V.
        returns: (M,), observed returns to go.
        bins: How many; empty ones are left out.

    Returns:
        Three arrays of equal length.
    """
    edges = np.linspace(values.min(), values.max(), bins + 1)
    places = np.clip(np.digitize(values, edges[1:-1]), 0, bins - 1)
    counts = np.bincount(places, minlength=bins)
    kept = counts > 0
    predicted = np.bincount(places, values, bins)[kept] / counts[kept]
    observed = np.bincount(places, returns, bins)[kept] / counts[kept]
    return predicted, observed, counts[kept] / len(values)


def plot_spread_against_error(tables: Tables) -> Chart:
    """Spread against |value − mean return| at states that several completions went through.

    Read the partial correlation given the value: without it the spread mostly repeats how noisy
    sampling is at that value.

    Raises:
        ValueError: If a table has no quantiles, or no state with enough continuations.
    """
    named = _named(tables)
    figure, axes = chart(list(named))
    for panel, table in zip(axes, named.values(), strict=True):
        spread, values, returns = shared_states(table)
        panel.scatter(spread, np.abs(values - returns), s=9, color=COLOURS[0], alpha=0.35,
                      linewidth=0)  # fmt: skip
        found = ignorance_metrics(spread, values, returns)
        words = [
            f"{label} {found[f'quantile_spread_error_{key}']:.2f}"
            for label, key in (("rank corr.", "correlation"), ("given V", "partial_correlation"))
            if f"quantile_spread_error_{key}" in found
        ]
        panel.text(0.98, 0.97, "\n".join([*words, f"{len(spread)} states"]), color=INK, fontsize=8,
                   ha="right", va="top", transform=panel.transAxes)  # fmt: skip
        panel.set_xlabel("spread (std of the quantiles)")
        panel.locator_params(axis="x", nbins=4)
        panel.set_ylabel("|value − mean return|")
    return figure


def shared_states(
    table: TokenTable, least: int = _LEAST_CONTINUATIONS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Spread, value and mean return at states that at least `least` completions share.

    Raises:
        ValueError: If there are none.
    """
    spread, value = table.numbers("spread"), table.numbers("value")
    states: dict[tuple[int, bytes], list[tuple[int, float]]] = defaultdict(list)
    start = 0
    columns = ("problem", "token", "score")
    for problem, ids, score in zip(*(table.completions[c] for c in columns), strict=True):
        for t in range(len(ids)):
            states[problem, np.asarray(ids[:t]).tobytes()].append((start + t, float(score)))
        start += len(ids)
    kept = [members for members in states.values() if len(members) >= least]
    if not kept:
        raise ValueError(f"no state has {least} completions: sample more per problem")
    places = [members[0][0] for members in kept]
    returns = np.array([np.mean([score for _, score in members]) for members in kept])
    return spread[places], value[places], returns


def plot_completion(table: TokenTable, number: int) -> Chart:
    """The fan of quantiles along one completion, against its return.

    Args:
        table: With quantiles.
        number: Row of `table.completions`.

    Raises:
        ValueError: If there are no quantiles.
    """
    if not table.n_quantiles:
        raise ValueError(f"this token table has no quantiles: {table.why_missing('quantiles')}")
    row = table.completions.iloc[number]
    quantiles = np.asarray(row["quantiles"], dtype=np.float64).reshape(-1, table.n_quantiles)
    taus = (np.arange(table.n_quantiles) + 0.5) / table.n_quantiles
    levels = (0.05, 0.25, 0.5, 0.75, 0.95)
    at = np.array([[np.interp(tau, taus, theta) for tau in levels] for theta in quantiles])
    figure, (panel,) = chart([f"{row['prompt'][:60]} → {row['status']}"])
    figure.set_size_inches(max(5.0, min(14.0, 0.32 * len(at))), 3.0)
    steps = np.arange(len(at) + 1) - 0.5
    for low, high, alpha, label in ((0, 4, 0.18, "5–95 %"), (1, 3, 0.32, "25–75 %")):
        panel.stairs(at[:, high], steps, baseline=at[:, low], fill=True, color=COLOURS[0],
                     alpha=alpha, label=label)  # fmt: skip
    panel.stairs(at[:, 2], steps, baseline=None, color=COLOURS[0], linewidth=1.8, label="median")
    panel.axhline(row["score"], color=INK, linestyle="--", linewidth=1.2, label="final return")
    if len(at) <= 60:
        texts = [text.strip()[:8].replace("$", r"\$") for text in row["text"]]
        panel.set_xticks(range(len(at)), labels=texts, rotation=0 if len(at) < 30 else 90)
    panel.set_ylabel("return")
    legend(figure, [panel])
    return figure


def _named(tables: Tables) -> dict[str, TokenTable]:
    named = {"this policy": tables} if isinstance(tables, TokenTable) else dict(tables)
    if not named:
        raise ValueError("there is nothing to plot: give at least one token table")
    return named
