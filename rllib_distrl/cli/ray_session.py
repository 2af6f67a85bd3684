"""Ray for the length of one command, and the libraries' noise kept out of what a user reads."""

from __future__ import annotations

import logging
import math
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rllib_distrl.cli.interrupts import Interrupts, kept_from_ray, shut_ray_down

_ENVIRONMENT = {
    # Workers inherit these; what a user has set stays.
    "PYTHONWARNINGS": "ignore",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SCHEDULER_EVENTS": "0",
    # Ray's C++ core prints advice about actors as errors; real failures arrive as exceptions.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "GRPC_VERBOSITY": "ERROR",
    "GLOG_minloglevel": "3",
}
# Ray sets the level of "ray.rllib" when it is imported, so its talkative modules are named.
_LOGGERS = (
    "ray",
    "ray._common.deprecation",
    "ray.rllib.algorithms.algorithm",
    "ray.rllib.algorithms.algorithm_config",
    "ray.rllib.core.learner.learner",
    "ray.rllib.env.env_runner_group",
    "ray.rllib.utils.deprecation",
    "ray.tune",
    "transformers",
    "torch",
    "gymnasium",
)


def silence_libraries() -> None:
    """Call before importing any of them."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore")
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def hide_loading_bars() -> None:
    """Hides transformers' progress bars of loading and saving; downloads keep theirs."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


_ANSWER_SECONDS = 10.0


def cpus_needed(config: Any) -> int:
    """Returns how many CPUs the actors of an `AlgorithmConfig` reserve, at most."""
    from rllib_distrl.algorithm.cluster import num_aggregators
    from rllib_distrl.settings import RolloutSettings

    most = max(config.num_env_runners, RolloutSettings.of(config.model_config).max_env_runners)
    runners = most * config.num_cpus_per_env_runner
    evaluation = (config.evaluation_num_env_runners or 0) * config.num_cpus_per_env_runner
    per_learner = config.num_cpus_per_learner
    per_learner = 1 if isinstance(per_learner, str) else per_learner
    learners = config.num_learners * per_learner + num_aggregators(config)
    return math.ceil(runners + evaluation + learners)


def check_address() -> None:
    """Refuses a RAY_ADDRESS where nothing listens, which Ray itself notices after minutes.

    Raises:
        ValueError: If so.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    host, _, port = address.rpartition(":")
    if "//" in host or not port.isdigit():  # "auto", "ray://...": Ray knows
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS).close()
    except OSError as error:
        raise ValueError(
            f"RAY_ADDRESS={address}: no Ray cluster answers there ({error}). Start one with "
            "`ray start --head`, or unset RAY_ADDRESS to start one for this command."
        ) from error


@contextmanager
def ray_session(config: Any, interrupts: Interrupts | None = None) -> Iterator[None]:
    """Starts Ray on this machine, or joins the cluster of RAY_ADDRESS; always shuts down.

    A signal that comes while it starts is acted on when it has.

    Ray is told of as many CPUs as the recipe's actors reserve, at least: on fewer cores they
    share, where Ray would otherwise wait for a machine that never comes.

    Raises:
        ValueError: If no cluster answers there, or it refuses this process.
        Interrupted: After a signal.
    """
    import ray

    check_address()
    joining = bool(os.environ.get("RAY_ADDRESS"))
    num_cpus = None if joining else max(os.cpu_count() or 1, cpus_needed(config))
    try:
        with kept_from_ray(), _core_notices_hidden():
            ray.init(
                # Without an address Ray would join any cluster that it finds on this machine.
                address=None if joining else "local",
                num_cpus=num_cpus,
                include_dashboard=None if joining else False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except ConnectionError as error:
        raise ValueError(
            f"{error}. Is the cluster of RAY_ADDRESS running? If it wants a token, as clusters of "
            "ray.init do where `ray get-auth-token` has made one, set RAY_AUTH_MODE=token here too."
        ) from error
    try:
        if interrupts is not None:
            interrupts.install()  # Ray's core takes SIGTERM as well
            interrupts.check()
        yield
    finally:
        shut_ray_down()


@contextmanager
def _core_notices_hidden() -> Iterator[None]:
    """Hides what Ray's C++ core writes to stderr while it starts.

    Ray 2.60 announces there that it has read RAY_BACKEND_LOG_LEVEL. Failures are exceptions.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
