"""One HTML page about one run or several: settings, curves, calibration, time, failures."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from rllib_distrl.evaluation.measures import fit_entropy
from rllib_distrl.figures import Chart
from rllib_distrl.files import write_atomic
from rllib_distrl.runs.reading import EVALUATIONS, Run
from rllib_distrl.viewer import plots
from rllib_distrl.viewer.html import Table, report_page, section
from rllib_distrl.viewer.plots import as_runs

_NOTHING = "–"
_DEAD = "env_runners/dead_group_share"
_HALF_INCHES = 7.9  # wider figures have the page's width for themselves


def write_report(runs: Run | Iterable[Run], path: str | Path, *, title: str = "") -> Path:
    """Writes the page.

    What a run does not have is left out, and the page says so: a run may be stopped, still be
    going on, or have no critic.

    Args:
        runs: One or several; several are drawn over one another.
        path: The HTML file.
        title: The headline; the runs' names if empty.

    Returns:
        `path`.

    Raises:
        ValueError: If there are no runs.
    """
    runs = as_runs(runs)
    title = title or ", ".join(run.name for run in runs)
    sections = [_results(runs), *_figures(runs), _settings(runs), _failures(runs)]
    write_atomic(Path(path), report_page(title, sections))
    return Path(path)


def _figures(runs: list[Run]) -> list[str]:
    tables = {run.name: run.token_table for run in runs if run.has_tokens}
    valued = {name: table for name, table in tables.items() if table.has("value")}
    spread = {name: table for name, table in tables.items() if table.n_quantiles}
    return [
        _figure("Learning", "learning", plots.plot_learning_curves, runs),
        _figure("pass@k", "pass", plots.plot_pass_at_k, runs),
        _figure("Calibration of the critic", "calibration", plots.plot_calibration, runs,
                "Before each update, on returns that the critic has not seen. Coverage should be "
                "what it is called: 0.5 and 0.9."),
        _figure("PIT", "pit", plots.plot_pit, runs,
                "Flat: calibrated. A hump: the distribution is too wide. Horns: too narrow."),
        _figure("Reliability", "reliability", plots.plot_reliability, valued,
                "Tokens of the trained policy on validation problems; larger dots: more tokens."),
        _figure("Does the spread know where the value is wrong?", "spread",
                plots.plot_spread_against_error, spread,
                "States that several completions share. The correlation given V is the one to "
                "read: the plain one mostly repeats the noise of sampling."),
        _figure("Optimism", "optimism", plots.plot_optimism, runs),
        _figure("Sampler against learner", "mismatch", plots.plot_mismatch, runs),
        _figure("Time", "time", plots.plot_timing, runs),
        _figure("What became of the completions", "grades", plots.plot_grades, runs),
    ]  # fmt: skip


def _figure(title: str, name: str, plot: Callable[[Any], Chart], data: Any, words: str = "") -> str:
    """A section with a figure, or with the reason why there is none."""
    try:
        figure = plot(data)
    except ValueError as error:
        return section(title, f"<p>Not shown: {html.escape(str(error))}</p>", half=True)
    return section(title, figure.to_svg(name), words, half=figure.get_figwidth() < _HALF_INCHES)


def _results(runs: list[Run]) -> str:
    names = dict.fromkeys(
        name for run in runs for when in EVALUATIONS for name in run.evaluations.get(when, {})
    )
    rows = [
        ("algorithm", [run.settings["run"]["algorithm"] for run in runs]),
        ("iterations", [str(len(run.iterations)) for run in runs]),
        (
            "tokens sampled",
            [_last(run, "num_env_steps_sampled_lifetime", "{:,.0f}") for run in runs],
        ),
        ("training time", [_training_time(run) for run in runs]),
        ("return by entropy, R = b − a e^H", [_entropy_fit(run) for run in runs]),
        ("groups of equal returns (last)", [_last(run, _DEAD, "{:.0%}") for run in runs]),
    ]
    for name in names:
        rows.append((f"{name}, before → after (%)", [_before_after(run, name) for run in runs]))
    return section("Result", _table(runs, rows, mark=False))


def _before_after(run: Run, name: str) -> str:
    shares = (run.evaluations.get(when, {}).get(name) for when in EVALUATIONS)
    return " → ".join(_NOTHING if share is None else f"{100 * share:.1f}" for share in shares)


def _entropy_fit(run: Run) -> str:
    """a, b and R² of `measures.fit_entropy` over the iterations."""
    names = ["learners/default_policy/entropy", "env_runners/episode_return_mean"]
    if not set(names) <= set(run.iterations):
        return _NOTHING
    told = run.iterations[names].dropna()
    try:
        fit = fit_entropy(told[names[0]].tolist(), told[names[1]].tolist())
    except ValueError:
        return _NOTHING
    return f"a {fit.a:.3g}, b {fit.b:.3g}, R² {fit.explained:.2f}"


def _training_time(run: Run) -> str:
    """`h:mm:ss`."""
    seconds = _last(run, "time_total_s", "{:.0f}")
    return seconds if seconds == _NOTHING else str(timedelta(seconds=int(seconds)))


def _last(run: Run, key: str, form: str) -> str:
    if key not in run.iterations or run.iterations[key].dropna().empty:
        return _NOTHING
    return form.format(float(run.iterations[key].dropna().iloc[-1]))


def _settings(runs: list[Run]) -> str:
    flat = [_dotted(run.settings) for run in runs]
    about = [
        _dotted(
            {
                "versions": run.meta.get("versions", {}),
                "commit": run.meta.get("commit"),
                "machine": run.meta.get("machine", {}),
                "command": " ".join(run.meta["sessions"][0]["command"]),
                "sessions": len(run.meta["sessions"]),
            }
        )
        for run in runs
    ]
    body = _table(runs, _aligned(flat), mark=True)
    more = _table(runs, _aligned(about), mark=True)
    words = "Rows in which the runs differ are marked." if len(runs) > 1 else ""
    summary = "<details><summary>Versions, machine, command</summary>"
    return section("Settings", f"{body}{summary}{more}</details>", words)


def _aligned(columns: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    keys = dict.fromkeys(key for column in columns for key in column)
    return [(key, [str(column.get(key, _NOTHING)) for column in columns]) for key in keys]


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _dotted(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _table(runs: list[Run], rows: Iterable[tuple[str, list[str]]], *, mark: bool) -> str:
    head = ["", *(run.name for run in runs)]
    return Table(head, [[name, *cells] for name, cells in rows], wraps=True, mark=mark).to_html()


def _failures(runs: list[Run]) -> str:
    keys = {
        "runners restarted": "fault_tolerance/num_remote_worker_restarts",
        "runners dropped": "fault_tolerance/num_env_runners_dropped_lifetime",
    }
    rows = [(words, [_last(run, key, "{:.0f}") for run in runs]) for words, key in keys.items()]
    rows.append(("times resumed", [str(len(run.meta["sessions"]) - 1) for run in runs]))
    body = _table(runs, rows, mark=False)
    for run in runs:
        if run.folder.error_file.is_file():
            text = run.folder.error_file.read_text(encoding="utf-8", errors="replace")
            failed = f"<p>{html.escape(run.name)} failed:</p>"
            body += f'{failed}<pre class="error">{html.escape(text)}</pre>'
    return section("Failures", body)
