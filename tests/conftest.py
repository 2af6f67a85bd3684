"""One torch thread everywhere, and a Ray session for each module that needs one."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# Ray's workers give way to all other processes by default: beside another test they would starve.
os.environ.setdefault("RAY_worker_niceness", "0")

import pytest
import torch
from jaxtyping import install_import_hook

import tests.shapes  # noqa: F401  (the hook names it)

# Shapes and dtypes that `maths` names are checked in every call that tests make.
install_import_hook("rllib_distrl.maths", "tests.shapes.check")

torch.set_num_threads(1)

# Started in the background or by nohup, tests inherit signals that are ignored, and so would all
# that they start: what is to be interrupted could not be.
for _signum, _handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(_signum) == signal.SIG_IGN:
        signal.signal(_signum, _handler)


@pytest.fixture(scope="module")
def ray_session():
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()


@pytest.fixture
def build():
    """Builds algorithms of configurations, and stops them after the test."""
    built = []

    def make(config):
        built.append(config.build_algo())
        return built[-1]

    yield make
    for algo in built:
        algo.stop()
