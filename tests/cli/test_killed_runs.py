"""Runs that are killed, and go on as if nothing had been."""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from rllib_distrl.runs.checkpoints import checkpoint_iteration, latest_checkpoint, list_checkpoints
from rllib_distrl.runs.log import read_progress
from tests.cli import forked
from tests.cli.test_train_on_data import save_model

ITERATIONS = 24
KILLS = 8
RECIPE = f"""
[run]
model = "builtin:countdown-tiny"
iterations = {ITERATIONS}
checkpoint_interval = 1
keep_checkpoints = 2
log_interval = 1000
checkpoint_metric = "env_runners/num_env_steps_sampled"

[rollout]
prompts_per_iteration = 3
num_generations = 2
max_completion_tokens = 12

[eval]
before = false
problems = 2
n = 1
k = [1]
token_problems = 0
critic_prefixes = 0

[environment]
env = "distrl_envs:distrl/Countdown-v0"

[training]
lr = 1e-3
minibatch_size = 3
num_epochs = 2
target = "sample_replacement"
critic_lambda = 0.9
"""
# Counters and clocks of RLlib that tell how long things took, not what was learned.
_CLOCKS = (
    "_time",
    "time_",
    "timer",
    "throughput",
    "date",
    "pid",
    "hostname",
    "perf",
    "node_ip",
    "trial",
)
pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from rllib_distrl.model.loading import resolve

    resolve("builtin:countdown-tiny")
    folder = tmp_path_factory.mktemp("killed")
    (folder / "tiny.toml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Path:
    return finish(folder, "tiny.toml", "--out", "undisturbed") / "undisturbed"


def finish(folder: Path, *arguments: str | Path) -> Path:
    output = folder / "output.txt"
    code = forked.run("train", *arguments, cwd=folder, output=output)
    assert code == 0, output.read_text()
    return folder


def learned(row: dict[str, Any]) -> dict[str, Any]:
    """What an iteration reported of its data and its learning."""
    kept = ("env_runners/", "learners/", "num_")
    return {
        key: value
        for key, value in row.items()
        if key.startswith(kept) and not any(word in key for word in _CLOCKS)
    }


def assert_same_run(one: Path, other: Path) -> None:
    """The same iterations, each once, and the same state down to the last bit."""
    rows = [read_progress(run / "progress.jsonl") for run in (one, other)]
    assert [row["iteration"] for row in rows[1]] == [row["iteration"] for row in rows[0]]
    for expected, got in zip(*rows, strict=True):
        assert learned(got) == learned(expected), expected["iteration"]
    states = [_state(list_checkpoints(run / "checkpoints")[0]) for run in (one, other)]
    assert states[0].keys() == states[1].keys()
    assert any("exp_avg_sq" in name for name in states[0])
    assert any("critic" in name for name in states[0])
    for name, value in states[0].items():
        assert value == states[1][name], name
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in (one, other)]
    assert weights[0] == weights[1]
    assert (one / "eval.json").read_text() == (other / "eval.json").read_text()


def _state(checkpoint: Path) -> dict[str, Any]:
    """Weights, moments and the sampler's cursor of a checkpoint, by name."""
    flat: dict[str, Any] = {}

    def collect(node: Any, name: str) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                collect(value, f"{name}/{key}")
        elif hasattr(node, "shape"):
            flat[name] = torch.as_tensor(node).tolist()
        elif isinstance(node, bool | int | float | str):
            flat[name] = node

    learner = checkpoint / "learner_group" / "learner"
    for file in sorted(learner.rglob("*.pkl")):
        if file.name != "class_and_ctor_args.pkl":
            state = pickle.loads(file.read_bytes())
            state.pop("metrics_logger", None)
            collect(state, file.relative_to(learner).as_posix())
    state = pickle.loads((checkpoint / "algorithm_state.pkl").read_bytes())
    collect(state["prompt_sampler"], "prompt_sampler")
    collect(state["training_iteration"], "training_iteration")
    return flat


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_at_random_moments_nothing_is_lost_or_repeated(
    folder: Path, undisturbed: Path
) -> None:
    rng = random.Random(7)
    run, output = folder / "killed", folder / "killed.txt"
    arguments: tuple[str, ...] = ("tiny.toml", "--out", "killed")
    during_checkpoints = 0
    for kill in range(KILLS):
        process = forked.start("train", *arguments, cwd=folder, output=output)
        if kill % 4 == 3:
            _wait_for_a_checkpoint(process, run)
        else:
            _wait_for_a_random_moment(rng, process, run)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL, output.read_text()
        rows = [row["iteration"] for row in read_progress(run / "progress.jsonl")]
        assert rows == list(range(1, len(rows) + 1))
        newest = latest_checkpoint(run / "checkpoints", pytest.fail)
        done = checkpoint_iteration(newest) if newest else 0
        assert len(rows) - 1 <= done <= len(rows)
        during_checkpoints += bool(list((run / "checkpoints").glob(".tmp-*")))
        if (run / "recipe.toml").is_file():
            arguments = ("killed", "--resume")
    assert during_checkpoints  # that moment must have been among them
    assert len(read_progress(run / "progress.jsonl")) < ITERATIONS
    finish(folder, *arguments)
    assert_same_run(undisturbed, run)


def _wait_for_a_random_moment(rng: random.Random, process: Any, run: Path) -> None:
    """Somewhere in starting up, or at any point of one of the first iterations."""
    if rng.random() < 0.2:
        time.sleep(rng.uniform(0, 2))
        return
    wanted = len(read_progress(run / "progress.jsonl")) + rng.randint(0, 2)
    give_up = time.monotonic() + 60
    while len(read_progress(run / "progress.jsonl")) < wanted and time.monotonic() < give_up:
        assert process.is_alive()
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.15))


def _wait_for_a_checkpoint(process: Any, run: Path) -> None:
    """The moment in which a checkpoint is being written."""
    give_up = time.monotonic() + 60
    while not list((run / "checkpoints").glob(".tmp-*")) and time.monotonic() < give_up:
        assert process.is_alive()


@pytest.mark.slow
def test_a_run_whose_folder_is_gone_goes_on_from_its_copy(folder: Path, undisturbed: Path) -> None:
    storage = f"run.storage={(folder / 'disk').as_uri()}"
    process = forked.start(
        "train", "tiny.toml", storage, "--out", "copied", cwd=folder, output=folder / "copied.txt"
    )
    copied = folder / "disk" / "copied"
    while len(read_progress(copied / "progress.jsonl")) < 5:
        assert process.is_alive(), (folder / "copied.txt").read_text()
        time.sleep(0.01)
    process.kill()
    process.join()
    (folder / "copied").rename(folder / "lost")
    finish(folder, "tiny.toml", storage, "--out", "copied", "--resume")
    assert f"Fetching {(folder / 'disk').as_uri()}/copied" in (folder / "output.txt").read_text()
    assert_same_run(undisturbed, folder / "copied")
    assert_same_run(undisturbed, _with_model(copied, folder / "copied"))
    refused = folder / "refused.txt"
    again = ("tiny.toml", storage, "--out", "elsewhere/copied")
    assert forked.run("train", *again, cwd=folder, output=refused) == 2
    assert "already holds a run" in refused.read_text()


def _with_model(copied: Path, run: Path) -> Path:
    """The copy, which leaves out the model: that is in the checkpoint."""
    assert not (copied / "model").exists()
    (copied / "model").symlink_to(run / "model")
    return copied


@pytest.mark.slow
def test_the_best_checkpoint_stays(undisturbed: Path, folder: Path) -> None:
    metric = "env_runners/num_env_steps_sampled"
    values = {
        row["iteration"]: row[metric] for row in read_progress(undisturbed / "progress.jsonl")
    }
    best = max(values, key=lambda iteration: (values[iteration], -iteration))
    found = {checkpoint_iteration(p) for p in list_checkpoints(undisturbed / "checkpoints")}
    assert found == {ITERATIONS, ITERATIONS - 1, best}
    assert f"iteration_{best:06d} ({metric} = " in (folder / "output.txt").read_text()
    manifest = undisturbed / "checkpoints" / f"iteration_{best:06d}" / "manifest.json"
    assert json.loads(manifest.read_text())["score"] == values[best]
    # It is a whole checkpoint: its policy can be exported.
    source = ("undisturbed/checkpoints/" + manifest.parent.name, "best")
    assert forked.run("export", *source, cwd=folder, output=folder / "export.txt") == 0


TALK = """
[environment.env_config]
task = "tests.rollout.turn_tasks:Talk"
"""


@pytest.mark.slow
def test_a_run_killed_in_the_middle_of_episodes_goes_on_with_them(folder: Path) -> None:
    (folder / "talk.toml").write_text(RECIPE + TALK)
    settings = ("talk.toml", "run.iterations=12", "rollout.segment_tokens=4")
    peaceful = finish(folder, *settings, "--out", "talk-undisturbed") / "talk-undisturbed"
    log = folder / "talk" / "progress.jsonl"
    process = forked.start("train", *settings, "--out", "talk", cwd=folder, output=folder / "t.txt")
    while len(read_progress(log)) < 3:
        assert process.is_alive(), (folder / "t.txt").read_text()
        time.sleep(0.005)
    process.kill()
    process.join()
    rows = read_progress(log)
    assert len(rows) < 12 and all(row["env_runners/num_open_prompts"] for row in rows)
    finish(folder, "talk", "--resume")
    assert_same_run(peaceful, folder / "talk")


SCORES = """
from pathlib import Path
calls = []
def score(prompt, completion, row):
    calls.append(prompt)
    if Path("broken").exists() and len(calls) > 12:
        raise RuntimeError("the grader is out of order")
    return float(len(completion))
"""
OWN_TASK = """
[environment]
env = "distrl_envs:distrl/Custom-v0"

[environment.env_config]
prompt_template = "Q: {prompt}\\nA:"

[environment.env_config.task_config]
data = "rows.jsonl"
score = "my_scores:score"
"""


@pytest.mark.slow
def test_an_error_in_sampling_leaves_a_checkpoint_of_the_last_iteration(folder: Path) -> None:
    (folder / "my_scores.py").write_text(SCORES)
    rows = [json.dumps({"problem": f"{n} {n} -> {2 * n} :"}) for n in range(1, 9)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    countdown = '[environment]\nenv = "distrl_envs:distrl/Countdown-v0"\n'
    (folder / "own.toml").write_text(RECIPE.replace(countdown, OWN_TASK))
    (folder / "broken").touch()
    save_model(folder / "own-model")
    settings = ("run.model=own-model", "run.iterations=4", "run.checkpoint_interval=0")
    settings += ("eval.split=train",)
    no_best = 'run.checkpoint_metric=""'
    command = ("own.toml", *settings, no_best, "--out", "own")
    output = folder / "own.txt"
    # 6 completions per iteration: the third one fails.
    assert forked.run("train", *command, cwd=folder, output=output) not in (0, None)
    assert "the grader is out of order" in output.read_text()
    assert [checkpoint_iteration(p) for p in list_checkpoints(folder / "own/checkpoints")] == [2, 1]
    (folder / "broken").unlink()
    finish(folder, "own", "--resume")
    iterations = [row["iteration"] for row in read_progress(folder / "own" / "progress.jsonl")]
    assert iterations == [1, 2, 3, 4]
