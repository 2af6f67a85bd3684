"""The main job, small: real processes, real signals, one tiny model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import MixtralConfig
from typer.testing import CliRunner

from rllib_distrl.cli.app import app
from rllib_distrl.cli.explain import said_of_weights
from rllib_distrl.recipe import Recipe
from rllib_distrl.runs.checkpoints import checkpoint_iteration, list_checkpoints
from rllib_distrl.runs.log import read_progress
from rllib_distrl.settings import EvalTable, RolloutSettings, RunSettings
from tests.helpers import start_python

RECIPE = """
[run]
algorithm = "DistRL"
model = "builtin:countdown-tiny"
iterations = 8
checkpoint_interval = 4
keep_checkpoints = 2
log_interval = 2

[rollout]
prompts_per_iteration = 8
num_generations = 4
max_completion_tokens = 24

[eval]
problems = 10
n = 8
k = [1, 4]
interval = 4
validation_problems = 8
critic_prefixes = 8
critic_continuations = 2

[environment]
env = "distrl_envs:distrl/Countdown-v0"

[training]
lr = 1e-3
minibatch_size = 16
"""
SECONDS = 150


def start(*arguments: str | Path, cwd: Path) -> subprocess.Popen[str]:
    return start_python("-m", "rllib_distrl.cli", *arguments, cwd=cwd)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from rllib_distrl.model.loading import resolve

    resolve("builtin:countdown-tiny")  # so that no run here reports its warm start
    folder = tmp_path_factory.mktemp("train")
    (folder / "tiny.toml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def finished(folder: Path) -> tuple[Path, str, str]:
    """The undisturbed run: its folder and what it printed."""
    process = start("train", "tiny.toml", cwd=folder)
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, out + err
    return folder / "runs" / "tiny-seed0", out, err


@pytest.fixture(scope="module")
def interrupted(folder: Path, finished: Any) -> tuple[Path, str, int]:
    """A run stopped by Ctrl-C to the process group, then resumed to its end."""
    run = folder / "again"
    process = start("train", "tiny.toml", "--out", "again", cwd=folder)
    give_up = time.monotonic() + SECONDS
    while not read_progress(run / "progress.jsonl") and time.monotonic() < give_up:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 130, out + err
    assert "Traceback" not in out + err
    assert "distrl train again --resume" in out
    stopped_after = len(read_progress(run / "progress.jsonl"))
    newest = list_checkpoints(run / "checkpoints")[0]
    assert checkpoint_iteration(newest) == stopped_after
    resumed = CliRunner().invoke(app, ["train", str(run), "--resume"])
    assert resumed.exit_code == 0, resumed.stderr
    return run, resumed.stdout, stopped_after


def test_what_a_user_reads_is_clean(finished: tuple[Path, str, str]) -> None:
    _, out, err = finished
    assert err == ""
    for words in ("iteration 2/8", "iteration 8/8", "before", "after", "change", "avg@8"):
        assert words in out
    assert "Warning" not in out
    assert "WARNING" not in out


def test_the_run_folder_is_complete(finished: tuple[Path, str, str]) -> None:
    run = finished[0]
    rows = read_progress(run / "progress.jsonl")
    assert [row["iteration"] for row in rows] == list(range(1, 9))
    for key in (
        "env_runners/episode_return_mean",
        "learners/default_policy/policy_loss",
        "learners/default_policy/entropy",
        "num_env_steps_sampled_lifetime",
    ):
        assert isinstance(rows[-1][key], float | int), key
    assert "evaluation/env_runners/episode_return_mean" in rows[3]
    checkpoints = list_checkpoints(run / "checkpoints")
    assert [checkpoint_iteration(p) for p in checkpoints] == [8, 4]
    assert list((run / "tensorboard").glob("events.*"))
    meta = json.loads((run / "meta.json").read_text())
    assert meta["versions"]["transformers"].startswith("5.")


def test_eval_json(finished: tuple[Path, str, str]) -> None:
    results = json.loads((finished[0] / "eval.json").read_text())
    assert results.keys() == {
        "before", "after", "critic", "problems", "samples", "split", "scores"
    }  # fmt: skip
    assert results["critic"]["prefixes"] == 8
    assert results["critic"]["continuations"] == 2
    assert {"quantile_state_rmse", "quantile_coverage_50"} <= results["critic"].keys()
    assert (results["problems"], results["samples"]) == (10, 8)
    for when in ("before", "after"):
        assert results[when].keys() == {"avg@8", "pass@1", "pass@4"}
        assert results[when]["avg@8"] == pytest.approx(results[when]["pass@1"])
        assert results[when]["pass@4"] >= results[when]["pass@1"]


def test_samples_are_kept(finished: tuple[Path, str, str]) -> None:
    import pandas as pd

    results = json.loads((finished[0] / "eval.json").read_text())
    for when in ("before", "after"):
        frame = pd.read_parquet(finished[0] / "samples" / f"{when}.parquet")
        assert len(frame) == 80
        assert frame["score"].mean() == pytest.approx(results[when]["avg@8"])
    assert sorted(p.name for p in (finished[0] / "samples").iterdir()) == [
        "after.parquet",
        "before.parquet",
        "tokens.parquet",
    ]


def test_the_model_is_a_plain_hugging_face_folder(finished: tuple[Path, str, str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(finished[0] / "model")
    tokenizer = AutoTokenizer.from_pretrained(finished[0] / "model")
    ids = tokenizer("3 4 7 9 -> 24 :", return_tensors="pt").input_ids
    assert model(ids).logits.shape[:2] == ids.shape


def test_an_interrupted_run_ends_like_an_undisturbed_one(
    finished: tuple[Path, str, str], interrupted: tuple[Path, str, int]
) -> None:
    run, out, stopped_after = interrupted
    assert f"Resuming after iteration {stopped_after}." in out
    assert 1 <= stopped_after < 8
    undisturbed = read_progress(finished[0] / "progress.jsonl")
    resumed = read_progress(run / "progress.jsonl")
    assert [row["iteration"] for row in resumed] == list(range(1, 9))
    for before, after in zip(undisturbed, resumed, strict=True):
        for key in ("policy_loss", "entropy", "total_loss"):
            name = f"learners/default_policy/{key}"
            assert before[name] == after[name], (before["iteration"], name)
    expected = json.loads((finished[0] / "eval.json").read_text())
    assert json.loads((run / "eval.json").read_text()) == expected


def test_a_budget_of_tokens_ends_a_run_and_is_continued_when_raised(folder: Path) -> None:
    settings = ("run.budget_tokens=900", "eval.before=false", "eval.interval=0")
    arguments = [str(folder / "tiny.toml"), *settings, "--out", str(folder / "budget")]
    done = CliRunner().invoke(app, ["train", *arguments])
    assert done.exit_code == 0, done.stderr
    tokens = [
        row["num_env_steps_sampled_lifetime"]
        for row in read_progress(folder / "budget" / "progress.jsonl")
    ]
    assert tokens[-2] < 900 <= tokens[-1]
    results = json.loads((folder / "budget" / "eval.json").read_text())
    assert results["before"] is None
    assert results["after"].keys() == {"avg@8", "pass@1", "pass@4"}
    again = CliRunner().invoke(app, ["train", str(folder / "budget"), "--resume"])
    assert f"All {len(tokens)} iterations of this run are done" in again.stdout, again.stderr


def test_a_finished_run_is_refused_kept_and_extended(
    finished: tuple[Path, str, str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    refused = CliRunner().invoke(app, ["train", "tiny.toml"])
    assert refused.exit_code == 2
    assert "already holds a run" in refused.stderr
    changed = CliRunner().invoke(app, ["train", "tiny.toml", "training.lr=1", "--resume"])
    assert changed.exit_code == 2
    assert "training.lr: 0.001 in the run, 1 now" in changed.stderr
    again = CliRunner().invoke(app, ["train", "runs/tiny-seed0", "--resume"])
    assert again.exit_code == 0
    assert "All 8 iterations of this run are done" in again.stdout
    assert "change" in again.stdout


def test_eval_and_export_of_run_and_checkpoint(
    finished: tuple[Path, str, str], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    run = finished[0]
    judged = ["--critic", str(run)]
    measured = CliRunner().invoke(app, ["eval", str(run), "--out", str(tmp_path / "eval"), *judged])
    assert measured.exit_code == 0, measured.stderr
    written = json.loads((run / "eval.json").read_text())
    expected = {**written["after"], "critic": written["critic"]}
    report = json.loads((tmp_path / "eval" / "eval.json").read_text())
    expected |= {"split": "test", "problems": 10, "samples": 8}
    assert report == report | expected
    assert {"intervals", "evaluated"} <= report.keys()
    assert report["chosen_by_critic"]["best@1"] == pytest.approx(report["avg@8"])
    assert (tmp_path / "eval" / "pass_at_k.png").is_file()
    other = CliRunner().invoke(
        app, ["eval", str(run / "recipe.toml"), "--model", str(run / "model")]
    )
    assert other.exit_code == 0, other.stderr
    # The same but for the critic, which a model alone does not bring.
    assert "10 held-out problems, 8 samples each" in other.stdout
    assert measured.stdout.startswith(other.stdout)
    rest = measured.stdout.removeprefix(other.stdout)
    assert rest.startswith("8 held-out prefixes, 2 continuations each:")
    checkpoint = run / "checkpoints" / "iteration_000008"
    for source, name in ((run, "a"), (checkpoint, "b")):
        result = CliRunner().invoke(app, ["export", str(source), str(tmp_path / name)])
        assert result.exit_code == 0, result.stderr
    critic = CliRunner().invoke(app, ["export", str(run), str(tmp_path / "c"), "--critic"])
    assert critic.exit_code == 0, critic.stderr
    assert load_file(tmp_path / "c" / "critic.safetensors")["value_head.bias"].shape == (16,)
    weights = [load_file(tmp_path / n / "model.safetensors") for n in ("a", "b")]
    assert weights[0].keys() == weights[1].keys()
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])


def test_explain(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.chdir(folder)
    with monkeypatch.context() as patch:
        patch.setenv("DISTRL_CACHE", str(tmp_path))
        result = CliRunner().invoke(app, ["explain", "tiny.toml", "run.model=builtin:countdown-6"])
    assert not list(tmp_path.iterdir()), "explain has built a model"
    assert result.exit_code == 0, result.stderr
    shown = ("-> ", "A completion ends with '<eos>'.")
    told = ("32 = 8 prompts x 4 completions", "2 = 1 x 2 minibatches", "KV cache", "Adam")
    told += ("at most 16,384 token places (auto",)
    for words in (*told, *shown):
        assert words in result.stdout
    assert not ray.is_initialized()
    assert "replies" not in result.stdout
    turns = ["environment.env=distrl_envs:distrl/Mastermind-v0", "run.model=builtin:mastermind"]
    ahead = ["rollout.max_staleness=3", "env_runners.num_env_runners=1"]
    result = CliRunner().invoke(app, ["explain", "tiny.toml", *turns, *ahead])
    assert "at most 4 x 4 tokens in an episode" in result.stdout, result.stderr
    assert "3 batches: no token is older than 3 updates" in result.stdout
    stock = CliRunner().invoke(
        app, ["explain", "tiny.toml", "run.algorithm=PPO", "training.minibatch_size=64"]
    )
    assert "timesteps (RLlib's unit)" in stock.stdout, stock.stderr


def test_what_nobody_expects_of_the_weights_is_said(tmp_path: Path) -> None:
    small = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    MixtralConfig(**small, **heads, dtype="bfloat16").save_pretrained(tmp_path)
    recipe = Recipe(RunSettings(model=str(tmp_path)), RolloutSettings(), EvalTable())
    lines = said_of_weights(recipe, SimpleNamespace(model_config={"lora": {"r": 2}}))
    assert lines[0] == "The model was saved in bfloat16; it learns and is exported in float32."
    assert lines[1].startswith("LoRA 'all-linear' gives the experts no adapter")
    MixtralConfig(**small, **heads, dtype="float32").save_pretrained(tmp_path)
    assert said_of_weights(recipe, SimpleNamespace(model_config={})) == []
