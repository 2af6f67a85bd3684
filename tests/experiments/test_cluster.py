"""A sweep on a Ray cluster that is running already."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from ray.cluster_utils import Cluster

from tests.experiments.test_sweep import METRIC, RECIPE

ROOT = Path(__file__).parents[2]
SPACE = f"""
[sweep]
metric = "{METRIC}"
search = "grid"
[space]
"training.lr" = {{ choice = [1e-4, 1e-2] }}
"""


@pytest.mark.slow
def test_trials_run_on_the_cluster_of_the_address(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(RECIPE)
    (tmp_path / "space.toml").write_text(SPACE)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    try:
        done = subprocess.run(
            [sys.executable, str(ROOT / "tune" / "sweep.py"), str(tmp_path / "tiny.toml"),
             str(tmp_path / "space.toml"), "run.iterations=2", "--out", str(tmp_path / "out"),
             "--address", cluster.address],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
            capture_output=True, text=True, timeout=250, check=False,
        )  # fmt: skip
    finally:
        cluster.shutdown()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "best.toml" in done.stdout
    frame = pd.read_parquet(tmp_path / "out" / "trials.parquet")
    assert frame["iterations"].tolist() == [2, 2]
