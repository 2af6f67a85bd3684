"""A sweep on a Ray cluster that is running already."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from ray.cluster_utils import Cluster

from tests.experiments.test_sweep import METRIC, RECIPE
from tests.helpers import start_python

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
        sweep = start_python(
            ROOT / "tune" / "sweep.py", tmp_path / "tiny.toml", tmp_path / "space.toml",
            "run.iterations=2", "--out", tmp_path / "out", "--address", cluster.address,
        )  # fmt: skip
        out, err = sweep.communicate(timeout=250)
    finally:
        cluster.shutdown()
    assert sweep.returncode == 0, out + err
    assert "best.toml" in out
    frame = pd.read_parquet(tmp_path / "out" / "trials.parquet")
    assert frame["iterations"].tolist() == [2, 2]
