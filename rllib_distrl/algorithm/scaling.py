"""Changing the number of remote env runners of an algorithm that trains."""

from typing import Any

import ray

from rllib_distrl.algorithm.weight_sync import WeightSync
from rllib_distrl.settings import RolloutSettings


def scale_env_runners(algo: Any, n: int) -> None:
    """Changes the number of remote env runners of any algorithm, between two iterations.

    RLlib's own algorithms know nothing of runners that come later, so this waits until all new
    ones have confirmed the learner's weights (`DistRL.scale_env_runners` does not wait). What
    a removed runner of an asynchronous algorithm is sampling at that moment is dropped.

    Args:
        algo: a built `Algorithm`, ours or stock, wired by `wire_language_model`.
        n: remote runners.

    Raises:
        ValueError: see `check_scale`.
        TimeoutError: the new runners are not up after ``env_runner_restore_timeout_s``; they
            are given up.
    """
    if hasattr(algo, "scale_env_runners"):
        algo.scale_env_runners(n)
        return
    check_scale(algo.config, n)
    sync = WeightSync(algo.learner_group, algo.env_runner_group, algo.config, algo.trial_id)
    sync.fetch()
    fleet = sync.fleet
    known = fleet.present()
    fleet.set_weights(*sync.latest)
    fleet.scale(n)
    if not fleet.wait_for(n, algo.config.env_runner_restore_timeout_s):
        up = len(fleet.serving())
        fleet.scale(min(n, max(known, up)))
        raise TimeoutError(
            f"{n} env runners were asked for and {up} are up after "
            f"{algo.config.env_runner_restore_timeout_s:g} s (env_runner_restore_timeout_s). "
            "The others are given up: does the cluster have room for them?"
        )


def check_scale(config: Any, n: int) -> None:
    """Checks that an algorithm may have ``n`` remote env runners.

    Runners that are added stand outside of the placement group of a Tune trial, so nothing but
    this bounds them.

    Args:
        config: the algorithm's `AlgorithmConfig`.
        n: the number asked for.

    Raises:
        ValueError: for a negative number, 0 where this process cannot sample, more than
            [rollout] max_env_runners, or more than the cluster's nodes can hold.
    """
    if n < 0:
        raise ValueError(f"Cannot scale to {n} env runners: the number must be >= 0.")
    if n == 0 and config.num_env_runners > 0:
        raise ValueError(
            "Cannot scale to 0 env runners: the driver was built with num_env_runners="
            f"{config.num_env_runners} and has no engine of its own. Ask for at least 1."
        )
    limit = RolloutSettings.of(config.model_config).max_env_runners
    if limit:
        if n > limit:
            raise ValueError(
                f"Cannot scale to {n} env runners: [rollout] max_env_runners is {limit}."
            )
        return
    total = ray.cluster_resources()
    for resource, each in _needs(config).items():
        if each and n * each > total.get(resource, 0):
            raise ValueError(
                f"Cannot scale to {n} env runners: they need {n} x {each:g} {resource}, and the "
                f"cluster has {total.get(resource, 0):g}. Where an autoscaler adds nodes, set "
                "[rollout] max_env_runners to the most that you want."
            )


def _needs(config: Any) -> dict[str, float]:
    return {
        "CPU": config.num_cpus_per_env_runner,
        "GPU": config.num_gpus_per_env_runner,
        **config.custom_resources_per_env_runner,
    }
