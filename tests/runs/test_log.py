"""The run's record: each iteration once, as numbers that JSON can hold; and in real trackers."""

from __future__ import annotations

import json
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from rllib_distrl.runs.log import (
    RunLog,
    TrackedRun,
    Trackers,
    commit,
    flatten_result,
    make_callbacks,
    read_progress,
    tracked_run,
    truncate_progress,
)


def test_flatten_keeps_scalars_under_joined_keys() -> None:
    result = {
        "env_runners": {"episode_return_mean": np.float64(0.5), "by": {"n": np.int64(3)}},
        "learners": {"p": {"loss": torch.tensor(1.5), "bad": float("nan"), "inf": np.inf}},
        "one": np.array([2.0]),
        "many": np.array([1.0, 2.0]),
        "flag": np.bool_(True),
        "text": "no",
        "none": None,
        "config": {"lr": 1.0},
    }
    assert flatten_result(result) == {
        "env_runners/episode_return_mean": 0.5,
        "env_runners/by/n": 3,
        "learners/p/loss": 1.5,
        "learners/p/bad": None,
        "learners/p/inf": None,
        "one": 2.0,
        "flag": True,
    }


def test_a_line_per_iteration_is_on_disk_at_once(tmp_path: Path) -> None:
    progress = tmp_path / "progress.jsonl"
    with RunLog(progress, tmp_path / "tensorboard") as log:
        log.write(1, {"a": {"b": 0.25}})
        assert json.loads(progress.read_text()) == {"iteration": 1, "a/b": 0.25}
        log.write(2, {"a": {"b": float("nan")}})
    assert [row["a/b"] for row in read_progress(progress)] == [0.25, None]


def test_the_problems_of_a_validation_are_in_the_log_alone(tmp_path: Path) -> None:
    progress, problems = tmp_path / "progress.jsonl", [[0, 1, [[0.0, 3], [1.0, 1]]]]
    with RunLog(progress, tmp_path / "tensorboard") as log:
        row = log.write(1, {"evaluation": {"seconds": 2.0, "problems": problems}})
    assert row == {"iteration": 1, "evaluation/seconds": 2.0}
    assert read_progress(progress) == [{**row, "evaluation/problems": problems}]


def test_resuming_records_each_iteration_once(tmp_path: Path) -> None:
    progress, tensorboard = tmp_path / "progress.jsonl", tmp_path / "tensorboard"
    with RunLog(progress, tensorboard) as log:
        for iteration in range(1, 6):
            log.write(iteration, {"x": float(iteration)})
    with RunLog(progress, tensorboard, last_iteration=3) as log:
        for iteration in range(4, 7):
            log.write(iteration, {"x": 10.0 * iteration})
    assert [row["iteration"] for row in read_progress(progress)] == [1, 2, 3, 4, 5, 6]
    assert [row["x"] for row in read_progress(progress)] == [1, 2, 3, 40, 50, 60]
    assert _tensorboard_steps(tensorboard) == [1, 2, 3, 4, 5, 6]


def _tensorboard_steps(folder: Path) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [event.step for event in events.Scalars("x")]


def test_a_line_cut_short_is_dropped(tmp_path: Path) -> None:
    progress = tmp_path / "progress.jsonl"
    progress.write_text('{"iteration": 1}\n{"iteration": 2}\n{"itera')
    truncate_progress(progress, 5)
    assert progress.read_text() == '{"iteration": 1}\n{"iteration": 2}\n'
    truncate_progress(progress, 1)
    assert progress.read_text() == '{"iteration": 1}\n'


def test_tensorboard_gets_histograms_of_the_quantiles(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    points = {f"quantile_atoms_{i}": i / 20 for i in range(21)}
    shares = {f"quantile_pit_{i}": 0.19 if i == 9 else 0.09 for i in range(10)}
    with RunLog(tmp_path / "progress.jsonl", tmp_path / "tensorboard") as log:
        log.write(1, {"learners": {"p": {**points, **shares, "loss": 0.5}}})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["learners/p/loss"]
    atoms = events.Histograms("learners/p/quantile_atoms")[0].histogram_value
    assert (atoms.min, atoms.max, atoms.num) == (0.0, 1.0, 210)
    assert abs(atoms.sum / atoms.num - 0.5) < 1e-9
    pit = events.Histograms("learners/p/quantile_pit")[0].histogram_value
    assert abs(max(pit.bucket) - 0.19) < 1e-9
    assert len(read_progress(tmp_path / "progress.jsonl")[0]) == 33


@pytest.mark.parametrize("size", [1e20, 1e38, 1e300, -1e30, 0.0])
def test_numbers_of_any_size_reach_both_logs(tmp_path: Path, size: float) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    points = {f"quantile_atoms_{i}": size * (1 + i / 8) for i in range(5)}
    with RunLog(tmp_path / "progress.jsonl", tmp_path / "tensorboard") as log:
        row = log.write(1, {**points, "loss": size})
    assert row["loss"] == size
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    atoms = events.Histograms("quantile_atoms")[0].histogram_value
    assert {atoms.min, atoms.max} == {size, 1.5 * size}
    assert sum(atoms.bucket) == atoms.num == 50
    largest = 3.4028234663852886e38  # of single precision, in which scalars are kept
    assert events.Scalars("loss")[0].value == pytest.approx(min(max(size, -largest), largest))


def test_the_commit_is_that_of_the_source_tree() -> None:
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        assert commit() is None
        return
    head = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    )
    assert (commit() or "").removesuffix("+changes") == head.stdout.strip()


ROWS = [
    {
        "iteration": 1,
        "training_iteration": 1,
        "env_runners/episode_return_mean": 0.25,
        "lost": None,
    },
    {"iteration": 2, "training_iteration": 2, "env_runners/episode_return_mean": 0.5, "lost": None},
]


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "runs" / "tiny-seed0"
    folder.mkdir(parents=True)
    return tracked_run(folder, "2026-01-01T00:00:00+00:00", {"training": {"lr": 0.5}})


def log_two_rows(trackers, run):
    open_trackers = Trackers(trackers, run)
    for row in ROWS:
        open_trackers.write(row)
    return open_trackers.close(failed=False)


@pytest.mark.slow
def test_mlflow_gets_every_iteration_and_the_recipe(tmp_path, run, ray_session):
    import mlflow

    uri = f"sqlite:///{tmp_path}/ml.db"
    settings = {"name": "mlflow", "tracking_uri": uri, "experiment_name": "countdown"}
    assert log_two_rows([settings], run) == []
    client = mlflow.MlflowClient(uri)
    (logged,) = client.search_runs([client.get_experiment_by_name("countdown").experiment_id])
    assert logged.info.run_name == "tiny-seed0"
    assert logged.info.status == "FINISHED"
    assert logged.data.params["training/lr"] == "0.5"
    history = client.get_metric_history(logged.info.run_id, "env_runners/episode_return_mean")
    assert [(m.step, m.value) for m in history] == [(1, 0.25), (2, 0.5)]
    assert "lost" not in logged.data.metrics


def offline_records(folder):
    """The records of W&B's offline file, which is LevelDB's log format behind 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, position, whole = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:
            position += left_in_block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


@pytest.mark.slow
def test_wandb_gets_every_iteration_and_the_recipe(monkeypatch, run, tmp_path):
    import ray

    monkeypatch.setenv("WANDB_MODE", "offline")  # the actor that logs inherits it from Ray's start
    if ray.is_initialized():
        ray.shutdown()
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        assert log_two_rows([{"name": "wandb", "project": "countdown"}], run) == []
    finally:
        ray.shutdown()
    records = list(offline_records(tmp_path / "runs" / "tiny-seed0"))
    (opened,) = [r.run for r in records if r.WhichOneof("record_type") == "run"]
    assert (opened.project, opened.display_name) == ("countdown", "tiny-seed0")
    assert opened.run_id == run.trial_id
    config = {item.key: json.loads(item.value_json) for item in opened.config.update}
    assert config["training"] == {"lr": 0.5}
    history = [r.history for r in records if r.WhichOneof("record_type") == "history"]
    logged = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row.item}
        for row in history
    ]
    assert [row["env_runners/episode_return_mean"] for row in logged] == [0.25, 0.5]
    assert [row["_step"] for row in logged] == [1, 2]


@pytest.mark.slow
def test_a_failing_upload_is_reported(monkeypatch, run):
    import ray

    monkeypatch.setenv("WANDB_MODE", "offline")
    if ray.is_initialized():
        ray.shutdown()
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        nowhere = TrackedRun(run.trial_id, run.name, "runs", "/no/such/folder", run.config)
        (problem,) = log_two_rows([{"name": "wandb", "project": "countdown"}], nowhere)
    finally:
        ray.shutdown()
    assert problem.startswith("WandbLoggerCallback: ")


def test_a_run_keeps_its_identity_when_resumed_and_not_when_replaced(tmp_path):
    first = tracked_run(tmp_path, "2026-01-01T00:00:00+00:00", {})
    assert tracked_run(tmp_path, "2026-01-01T00:00:00+00:00", {}).trial_id == first.trial_id
    assert tracked_run(tmp_path, "2026-01-02T00:00:00+00:00", {}).trial_id != first.trial_id


@pytest.mark.slow
def test_a_setting_that_the_callback_does_not_take_is_refused():
    with pytest.raises(ValueError, match=r"mlflow refuses: .*colour"):
        make_callbacks([{"name": "mlflow", "colour": "blue"}])
