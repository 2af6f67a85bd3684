"""What is on disk stays: refusals before the start, full disks, damaged files, signals."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from rllib_distrl.cli.app import app
from rllib_distrl.cli.explain import check_room
from rllib_distrl.experiments.comparison import start_distrl
from rllib_distrl.experiments.training import TrainingCheckpoints
from rllib_distrl.recipe import load_recipe
from rllib_distrl.runs.checkpoints import (
    TrainingStopped,
    checkpoint_iteration,
    hold_latest,
    list_checkpoints,
    save_checkpoint,
)
from rllib_distrl.runs.folder import RunFolder, create_run
from rllib_distrl.runs.log import RunLog, read_progress
from tests.cli import forked
from tests.helpers import distrl_config

RECIPE = """
[run]
model = "builtin:countdown-tiny"
iterations = 6
checkpoint_interval = 0
log_interval = 1000

[rollout]
prompts_per_iteration = 2
num_generations = 2
max_completion_tokens = 8

[eval]
before = false
problems = 2
n = 1
k = [1]
token_problems = 0
critic_prefixes = 0

[environment]
env = "distrl_envs:distrl/Countdown-v0"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(RECIPE)
    return path


def train(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


def test_a_log_without_a_good_checkpoint_is_not_written_over(file: Path, tmp_path: Path) -> None:
    run = create_run(tmp_path / "run", load_recipe(file), [])
    log = '{"iteration": 1}\n{"iteration": 2}\n'
    run.progress_file.write_text(log)
    for damaged in (False, True):
        if damaged:
            (run.checkpoints / "iteration_000002").mkdir(parents=True)
        refused = train(run.path, "--resume")
        assert refused.exit_code == 2
        assert "log of 2 iterations and no good checkpoint" in refused.stderr
        assert f"train {run.recipe_file} --out {run.path} --overwrite" in refused.stderr
        assert run.progress_file.read_text() == log
    assert "Skipping a damaged checkpoint" in refused.stdout


def test_a_run_without_room_is_refused_before_anything_is_made(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1_500_000))
    refused = train(file, "--out", tmp_path / "run")
    assert refused.exit_code == 2
    # 61,056 weights learn; with two moments a checkpoint has 0.7 MiB: three of them and a model.
    assert "1.4 MiB free" in refused.stderr
    assert "3 checkpoint(s) of" in refused.stderr
    assert not (tmp_path / "run").exists()
    enough = load_recipe(file, ["run.keep_checkpoints=1"])
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=2_000_000))
    check_room(enough, enough.build_config(), RunFolder(tmp_path / "run"))


@pytest.mark.parametrize("content", ["", '{"before": {"avg@1": 0.', "[1, 2]"])
def test_a_damaged_eval_json_is_named_and_set_aside(
    file: Path, tmp_path: Path, content: str
) -> None:
    run = create_run(tmp_path / "run", load_recipe(file), [])
    run.eval_file.write_text(content)
    with pytest.raises(ValueError, match=rf"{run.eval_file} is damaged.*--resume"):
        run.read_eval()
    said = run.set_damaged_eval_aside()
    assert "eval.damaged.json" in said
    assert run.read_eval() == {}
    assert (run.path / "eval.damaged.json").read_text() == content
    assert run.set_damaged_eval_aside() == ""


def test_a_checkpoint_that_is_read_is_pruned_later(tmp_path: Path) -> None:
    def save(iteration: int) -> None:
        def write(folder: str) -> None:
            Path(folder, "state").write_text(str(iteration))

        save_checkpoint(tmp_path, iteration, write, keep=1)

    save(1)
    with ExitStack() as held:
        path = hold_latest(tmp_path, pytest.fail, held)
        assert path is not None
        save(2)
        save(3)
        assert (path / "state").read_text() == "1"
        assert [checkpoint_iteration(p) for p in list_checkpoints(tmp_path)] == [3, 1]
    save(4)
    assert [checkpoint_iteration(p) for p in list_checkpoints(tmp_path)] == [4]


def test_readers_beside_a_run_that_prunes_always_get_a_whole_checkpoint(tmp_path: Path) -> None:
    writer = """
import sys
from pathlib import Path
from rllib_distrl.runs.checkpoints import save_checkpoint
def write(folder):
    for number in range(4):
        Path(folder, str(number)).write_text("x" * 1000)
for iteration in range(1, 40):
    save_checkpoint(Path(sys.argv[1]), iteration, write, keep=1)
"""
    path = os.pathsep.join(map(os.path.abspath, sys.path))
    process = subprocess.Popen(
        [sys.executable, "-c", writer, str(tmp_path)], env={**os.environ, "PYTHONPATH": path}
    )
    seen = set()
    while process.poll() is None:
        with ExitStack() as held:
            found = hold_latest(tmp_path, pytest.fail, held)
            if found is not None:
                assert len(list(found.iterdir())) == 5
                seen.add(found.name)
        time.sleep(0.002)
    assert process.returncode == 0
    assert len(seen) > 2


def test_new_writes_a_recipe_once(tmp_path: Path) -> None:
    target = tmp_path / "mine.toml"
    assert CliRunner().invoke(app, ["new", "grpo", str(target)]).exit_code == 0
    assert load_recipe(target).run.algorithm == "GRPO"
    again = CliRunner().invoke(app, ["new", "distrl", str(target)])
    assert (again.exit_code, load_recipe(target).run.algorithm) == (2, "GRPO")
    unknown = CliRunner().invoke(app, ["new", "gppo", str(target)])
    assert "nearest one is 'grpo'" in unknown.stderr or "nearest one is 'ppo'" in unknown.stderr


@pytest.mark.usefixtures("ray_session")
def test_weights_that_are_not_finite_are_in_no_checkpoint(
    file: Path, tmp_path: Path, build: Any
) -> None:
    recipe = load_recipe(file)
    run = create_run(tmp_path / "run", recipe, [])
    checkpoints = TrainingCheckpoints(recipe, run, None, pytest.fail)
    algo = build(distrl_config())
    with RunLog(run.progress_file, run.tensorboard) as log:
        checkpoints.save(algo, log, log.write(1, {}))

        def poison(learner: Any) -> None:
            with torch.no_grad():
                critic = learner.module["default_policy"].critic_parameters()
                critic[0].view(-1)[0] = torch.inf

        algo.learner_group.foreach_learner(poison)
        with pytest.raises(TrainingStopped, match=r"critic.*iteration_000001"):
            checkpoints.save(algo, log, log.write(2, {}))
    assert [checkpoint_iteration(p) for p in list_checkpoints(run.checkpoints)] == [1]
    assert not list(run.checkpoints.glob(".tmp*"))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_full_disk_is_named_and_the_run_goes_on_with_room(file: Path, tmp_path: Path) -> None:
    output, run = tmp_path / "output.txt", tmp_path / "run"
    code = (
        "import resource, runpy, sys; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)), -1)); "
        "runpy.run_module('rllib_distrl.cli', run_name='__main__')"
    )
    import ray

    path = os.pathsep.join(map(os.path.abspath, sys.path))
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
    }
    arguments = ["train", str(file), "--out", str(run)]
    for limit, rows in ((100_000, 0), (400_000, 1)):  # smaller than the model; than Adam's moments
        with output.open("wb") as stream:
            done = subprocess.run(
                [sys.executable, "-c", code, str(limit), *arguments],
                stdout=stream,
                stderr=stream,
                env=environment,
                timeout=120,
                check=False,
            )
        said = output.read_text()
        assert done.returncode == 1, said
        assert "File too large" in said
        assert f"error: {run}: File too large" in said
        assert f"distrl train {run} --resume" in said
        assert len(read_progress(run / "progress.jsonl")) == rows
        assert not list(run.rglob(".tmp*"))
        arguments = ["train", str(run), "--resume"]
    assert forked.run(*arguments, cwd=tmp_path, output=output) == 0, output.read_text()
    assert [row["iteration"] for row in read_progress(run / "progress.jsonl")] == [*range(1, 7)]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("runners", [0, 1])
def test_signals_at_random_moments_lose_nothing(file: Path, tmp_path: Path, runners: int) -> None:
    """To the process group, as a terminal does, or to every process, as job schedulers do.

    Ray starts with each run, and its processes get them too; with a runner the checkpoint needs
    them.
    """
    rng = random.Random(11 + runners)
    run, output = tmp_path / "run", tmp_path / "output.txt"
    settings = ("run.iterations=60", f"env_runners.num_env_runners={runners}")
    arguments: tuple[str | Path, ...] = (file, "--out", run, *settings)
    for _ in range(3):
        output.write_text("")
        process = start_distrl(("train", *arguments), output, folder=tmp_path)
        assert process.pid is not None
        while process.exitcode is None and os.getpgid(process.pid) != process.pid:
            time.sleep(0.01)
        time.sleep(rng.uniform(0.3, 8.0))
        if process.exitcode is not None:
            break
        signum = rng.choice([signal.SIGINT, signal.SIGHUP, signal.SIGTERM])
        if signum == signal.SIGTERM:
            _signal_session(process.pid, signum)
        else:
            os.killpg(process.pid, signum)
        process.join(240)
        said = output.read_text()
        # Before its handlers stand nothing has begun, and it ends as any process.
        assert process.exitcode in (128 + signum, 0, -signum), (signum, said)
        assert process.exitcode != -signum or not said
        assert "Traceback" not in said
        assert not _session_members(process.pid), "orphans"
        rows = [row["iteration"] for row in read_progress(run / "progress.jsonl")]
        assert rows == list(range(1, len(rows) + 1))
        newest = list_checkpoints(run / "checkpoints")[:1]
        assert [checkpoint_iteration(path) for path in newest] == rows[-1:]
        if (run / "recipe.toml").is_file():
            arguments = (run, "--resume")
    assert json.loads((run / "meta.json").read_text())["sessions"]


def _signal_session(session: int, signum: int) -> None:
    """Ray's workers have process groups of their own, and the same session."""
    command = ["ps", "-s", str(session), "-o", "pid="]
    for pid in subprocess.run(command, capture_output=True, text=True).stdout.split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signum)


def _session_members(session: int) -> list[str]:
    """Processes of a session that are still there after a moment."""
    for _ in range(50):
        found = subprocess.run(
            ["ps", "-s", str(session), "-o", "pid=,args="], capture_output=True, text=True
        ).stdout.splitlines()
        found = [line for line in found if "<defunct>" not in line]
        if not found:
            return []
        time.sleep(0.2)
    return found
