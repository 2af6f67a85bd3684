"""Weights & Biases and MLflow, the real libraries, writing to local files."""

import importlib.util
import json
import struct

import pytest

from rllib_distrl.runs.log import (
    TrackedRun,
    Trackers,
    check_trackers,
    make_callbacks,
    tracked_run,
)

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


@pytest.mark.parametrize(
    ("trackers", "message"),
    [
        ([{"project": "x"}], "got the name None; known are mlflow, wandb"),
        ([{"name": "wanbd"}], "got the name 'wanbd'; known are mlflow, wandb"),
        ([{"name": "mlflow"}, {"name": "mlflow"}], "mlflow stands there 2 times"),
    ],
)
def test_bad_trackers_are_refused(monkeypatch, trackers, message):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match=message):
        check_trackers(trackers)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"wandb is not installed. pip install 'wandb'"):
        check_trackers([{"name": "wandb"}])


@pytest.mark.slow
def test_a_setting_that_the_callback_does_not_take_is_refused():
    with pytest.raises(ValueError, match=r"mlflow refuses: .*colour"):
        make_callbacks([{"name": "mlflow", "colour": "blue"}])
