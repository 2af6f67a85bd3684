"""Real runs of a tiny model: one that finishes, one that cannot, and the second time around."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from rllib_distrl.experiments.comparison import Comparison, make_plan
from rllib_distrl.experiments.results import Record, measure_samples, score_counts, thinned
from rllib_distrl.runs.log import read_progress
from tests.helpers import start_python

ROOT = Path(__file__).parents[2]
RECIPE = """
[run]
model = "builtin:countdown-tiny"
[rollout]
prompts_per_iteration = 8
num_generations = 4
max_completion_tokens = 24
evaluation_generations = 2
[eval]
problems = 4
n = 4
k = [1]
interval = 2
validation_problems = 3
[environment]
env = "distrl_envs:distrl/Countdown-v0"
[training]
minibatch_size = 16
"""
VARIANTS = """
recipe = "tiny.toml"
[variants]
good = {}
# More than a float32 holds: the loss is infinite.
bad = { training = { vf_loss_coeff = 1e300 } }
"""
SETTINGS = ("--seeds", "2", "--budget-tokens", "5000", "--jobs", "2")


def compare(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    script, variants = ROOT / "tune" / "compare.py", folder / "variants.toml"
    settings = (*SETTINGS, "--out", folder / "out", *arguments)
    return start_python(script, variants, *settings, stderr=subprocess.STDOUT)


def check_validations(good: dict[str, Any], run: Path) -> None:
    """Every second iteration, on top of the training's tokens and time."""
    rows = [json.loads(line) for line in (run / "progress.jsonl").read_text().splitlines()]
    assert good["tokens"] == sum(
        r["learners/default_policy/num_module_steps_trained"] for r in rows
    )
    sampled = [row["num_env_steps_sampled_lifetime"] for row in rows]
    assert [v["tokens"] for v in good["validation"]] == sampled[1::2]
    assert good["validation"][0].keys() == {
        "tokens", "avg@2", "pass@1", "pass@2", "best@1", "best@2"
    }  # fmt: skip
    for means, problems in zip(good["validation"], good["validation_problems"], strict=True):
        counts = [score * n for _, _, scores in problems for score, n in scores]
        assert sum(counts) / (2 * len(problems)) == pytest.approx(means["avg@2"])
    seconds = sum(row["time_this_iter_s"] for row in rows)
    assert 0.0 < good["validation_seconds"] < seconds
    assert good["seconds"] + good["validation_seconds"] == pytest.approx(seconds)
    # Two minibatches of 16 in an iteration of 32 completions.
    assert good["updates"] == 2 * len(rows) == 2 * good["iterations"]


def interrupt(folder: Path, how: signal.Signals, iterations: int) -> None:
    """Starts the comparison and stops it once the second good run has come so far."""
    process = compare(folder)
    log = folder / "out" / "runs" / "good-seed1" / "progress.jsonl"
    give_up = time.monotonic() + 200
    while len(read_progress(log)) < iterations and time.monotonic() < give_up:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(how)
    out, _ = process.communicate(timeout=100)
    assert process.returncode == (130 if how == signal.SIGTERM else -how), out
    assert ("Stopped. The same command continues." in out) == (how == signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_comparison_is_stopped_and_continues(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(RECIPE)
    (tmp_path / "variants.toml").write_text(VARIANTS)
    records = tmp_path / "out" / "runs"
    interrupt(tmp_path, signal.SIGTERM, 2)
    first = {path.name: path.read_text() for path in records.glob("good-*.json")}
    assert first.keys() == {"good-seed0.json"}
    interrupt(tmp_path, signal.SIGKILL, 4)

    process = compare(tmp_path)
    out, _ = process.communicate(timeout=280)
    assert process.returncode == 1, out
    assert "2 of 4 runs failed" in out
    for name, text in first.items():
        assert (records / name).read_text() == text
        assert "good seed 0: avg@4" not in out
    assert "Resuming after iteration" in (tmp_path / "out/logs/good-seed1.log").read_text()
    found = {path.stem: json.loads(path.read_text()) for path in records.glob("*.json")}
    assert found.keys() == {f"{name}-seed{seed}" for name in ("good", "bad") for seed in (0, 1)}
    for seed in (0, 1):
        good, bad = found[f"good-seed{seed}"], found[f"bad-seed{seed}"]
        assert good["status"] == "finished"
        assert 5_000 <= good["tokens"] < 5_000 + 8 * 4 * 24
        assert good["metrics"].keys() == {
            "avg@4", "pass@1", "pass@2", "pass@4", "best@1", "best@2", "best@4",
            "distinct_correct", "entropy",
        }  # fmt: skip
        assert good["recipe"]["run"]["seed"] == seed
        check_validations(good, records / f"good-seed{seed}")
        assert bad["status"] == "failed"
        # In the third, or later where it was stopped in between and counts anew.
        assert bad["error"].startswith("exit code 1: error: Training stopped in iteration")
        assert "3 optimiser steps in a row were refused" in bad["error"]
    page = (tmp_path / "out" / "results.md").read_text()
    assert "## Failed runs" in page


def test_other_settings_under_the_same_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(RECIPE)
    (tmp_path / "variants.toml").write_text(VARIANTS)
    plan = make_plan([tmp_path / "variants.toml"], [], seeds=2, first_seed=0, budget_tokens=900)
    comparison = Comparison(plan, tmp_path / "out")
    file = comparison.record_file(plan.baseline, 1)
    Record("good", "", 1, "another", 900, "finished").write(file)
    with pytest.raises(ValueError, match=r"good-seed1\.json was made with other settings"):
        Comparison(plan, tmp_path / "out")
    Record("good", "", 1, plan.baseline.digest, 900, "finished").write(file)
    assert [r.seed for r in Comparison(plan, tmp_path / "out").records()] == [1]


def test_what_is_finished_is_not_run_again(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(RECIPE)
    (tmp_path / "variants.toml").write_text(VARIANTS)
    plan = make_plan([tmp_path / "variants.toml"], [], seeds=2, first_seed=0, budget_tokens=900)
    comparison = Comparison(plan, tmp_path / "out")
    for contender, seed in plan.jobs():
        made = Record(contender.name, "", seed, contender.digest, 900, "finished")
        made.write(comparison.record_file(contender, seed))
    comparison.run(1, lambda record: pytest.fail(f"{record.name} was run"))
    assert len(comparison.records()) == 4


def graded_samples() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "problem": [0, 0, 1, 1],
            "sample": [0, 1, 0, 1],
            "score": [1.0, 0.25, 0.5, 0.5],
            "status": ["correct", "wrong", "wrong", "wrong"],
            "finish_reason": ["stop"] * 4,
            "answer": ["24"] * 4,
            "text_hash": ["p", "q", "r", "s"],
            "tokens": [4, 6, 5, 5],
            "logp_sum": [-1.0, -2.0, -3.0, -4.0],
        }
    )


def test_measures_by_hand() -> None:
    frame = graded_samples()
    assert measure_samples(frame) == {
        "avg@2": 0.5625, "pass@1": 0.25, "pass@2": 0.5, "best@1": 0.5625, "best@2": 0.75,
        "distinct_correct": 0.5, "entropy": 0.5,
    }  # fmt: skip
    status = ["correct", "wrong", "correct", "correct"]
    right = measure_samples(frame.assign(score=[1.0, 0.0, 1.0, 1.0], status=status))
    assert right["pass@2"] == right["best@2"] == 1.0
    assert right["distinct_correct"] == 1.5


def test_the_scores_of_each_problem_are_kept() -> None:
    assert score_counts(graded_samples()) == [[[0.25, 1], [1.0, 1]], [[0.5, 2]]]


def test_curves_are_thinned_to_means_of_neighbours() -> None:
    rows = [{"num_env_steps_sampled_lifetime": 10 * i, "x": float(i)} for i in range(1, 101)]
    found = thinned([*rows[:50], {"x": None}, *rows[50:]], "x")
    assert len(found) == 50
    assert found[0] == [20.0, 1.5]
    assert found[-1] == [1000.0, 99.5]
    assert thinned([], "x") == []
