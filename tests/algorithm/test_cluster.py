"""Two nodes on this machine; one of them dies."""

import shutil
import tempfile
import time

import pytest
import ray
from ray.cluster_utils import Cluster

from tests.algorithm.recorded_distrl import (
    held_weights,
    recorded,
    runner_metric,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

WORKER = "worker"


@pytest.fixture
def cluster(monkeypatch):
    """A head for the driver and two nodes for runners."""
    # Its address is written here, not where every ray.init() on this machine looks for one.
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # sockets need a short path
    monkeypatch.setenv("RAY_TMPDIR", folder)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    nodes = [cluster.add_node(num_cpus=1, resources={WORKER: 2}) for _ in range(2)]
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster, nodes
    ray.shutdown()
    cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def nodes_of(algo):
    """The nodes that the serving runners are on."""
    return set(
        algo.env_runner_group.foreach_env_runner(
            lambda runner: ray.get_runtime_context().get_node_id(), local_env_runner=False
        )
    )


def test_training_goes_on_when_a_node_dies(cluster):
    cluster, nodes = cluster
    # Two runners fill a node, so that four are spread; two fit when one is gone.
    config = recorded(4, custom_resources_per_env_runner={WORKER: 1})
    config.env_runners(num_cpus_per_env_runner=0.01)
    algo = config.build_algo()
    try:
        results = [algo.train()]
        assert nodes_of(algo) == {node.node_id for node in nodes}
        cluster.remove_node(nodes[0], allow_graceful=False)
        give_up = time.monotonic() + 60
        while runner_metric(results, "num_failed_env_runners") < 2:
            assert time.monotonic() < give_up
            results.append(algo.train())
        # Two shares of 6 prompts on 4 runners, where they were not just loading weights.
        assert runner_metric(results, "num_lost_prompts") <= 4
        results += [algo.train() for _ in range(2)]
        assert nodes_of(algo) == {nodes[1].node_id}
        assert algo.fleet.present() == 4  # two wait for a node
        assert sorted(algo.contributors[-1].values()) == [6, 6]

        nodes.append(cluster.add_node(num_cpus=1, resources={WORKER: 2}))
        assert algo.fleet.wait_for(4, timeout_s=120)
        results.append(algo.train())
        assert nodes_of(algo) == {nodes[1].node_id, nodes[2].node_id}
        assert runner_metric(results[-1:], "num_env_runners") == 4
        assert set(held_weights(algo).values()) == {algo.fleet.weights}
        assert len(algo.keys) == 12 * len(results)
    finally:
        algo.stop()
