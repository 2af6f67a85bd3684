"""What a configuration asks the cluster for, against what Ray would do with that in silence."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayError

from rllib_distrl.settings import RolloutSettings


def check_runner_gpus(config: Any) -> None:
    """Refuses GPUs for runners that would sample on the CPU.

    Ray 2.60 gives the runner in the driver's process the CPU, whatever ``num_gpus_per_env_runner``
    says (env/single_agent_env_runner.py, __init__).

    Args:
        config: an `AlgorithmConfig`, ours or stock; that of an evaluation passes.

    Raises:
        ValueError: for runners of training or of evaluation in the driver's process.
    """
    if config.in_evaluation:
        return
    evaluation = _gpus_per_evaluation_runner(config) if config.evaluation_interval else 0
    for name, number in (
        ("num_env_runners", config.num_gpus_per_env_runner),
        ("evaluation_num_env_runners", evaluation),
    ):
        if number and not getattr(config, name):
            where = " in evaluation_config" if name.startswith("evaluation") else ""
            raise ValueError(
                f"num_gpus_per_env_runner is {number:g}, but {name} is 0: the runner in the "
                f"driver's process samples on the CPU. Set {name} >= 1, or "
                f"num_gpus_per_env_runner = 0{where}."
            )


def check_cluster(config: Any) -> None:
    """Refuses to wait for CPUs, GPUs and other resources that the cluster does not have.

    Ray keeps actors waiting, without an end, for what no node offers. Where an autoscaler adds
    nodes ([rollout] max_env_runners is set), they may come.

    Args:
        config: an `AlgorithmConfig` that is about to be built. Ray is started if it does not run.

    Raises:
        ValueError: where there are fewer than learners and runners need.
    """
    if not config.num_learners and config.num_gpus_per_learner and not torch.cuda.is_available():
        raise ValueError(
            f"num_gpus_per_learner is {config.num_gpus_per_learner:g} and num_learners is 0: this "
            "process learns, and PyTorch sees no GPU in it. Set num_learners >= 1 where other "
            "nodes have GPUs, or num_gpus_per_learner = 0."
        )
    if RolloutSettings.of(config.model_config).max_env_runners:
        return
    if not ray.is_initialized():
        ray.init()  # As RLlib does by its first `ray.put`, unless it is asked what there is.
    present = ray.cluster_resources()
    parts = {
        "learners": _learner_needs(config),
        "aggregators": {"CPU": num_aggregators(config)},
        **_runner_needs(config),
    }
    resources = {name for needs in parts.values() for name in needs}
    for resource in sorted(resources, key=lambda name: (name != "GPU", name)):  # The scarcest.
        needs = {who: part[resource] for who, part in parts.items() if part.get(resource)}
        total = sum(needs.values())
        if total > present.get(resource, 0):
            asked = " and ".join(f"{number:g} for {who}" for who, number in needs.items())
            name = {"CPU": "cpus", "GPU": "gpus"}.get(resource, resource)
            raise ValueError(
                f"{asked}: that many {resource}s were asked for, and the cluster has "
                f"{present.get(resource, 0):g}; Ray would wait for the others without an end. "
                f"Lower num_{name}_per_learner or num_{name}_per_env_runner (parts of one are "
                "allowed), or the number of actors. Where an autoscaler adds nodes, set "
                "[rollout] max_env_runners."
            )


class ClusterChecked:
    """Mixed into an algorithm of RLlib's: what it would wait for, or pass over, is an error."""

    config: Any
    env_runner_group: Any

    def setup(self, config: Any) -> None:
        """Builds the algorithm; RLlib (Ray 2.60) waits for its runners in here, without an end.

        Raises:
            ValueError: as `check_cluster`.
        """
        with exits_are_errors("building the algorithm"):
            check_cluster(self.config)
            super().setup(config)  # type: ignore[misc]

    def train(self) -> dict[str, Any]:
        """One iteration.

        Raises:
            RuntimeError: code of the user's called ``sys.exit``, or fails in every runner: RLlib
                would start them again, without an end, and learn nothing.
        """
        with exits_are_errors("training"):
            return super().train()  # type: ignore[misc]

    def training_step(self) -> None:
        """RLlib's, and why it has sampled nothing, where it has lost all of its runners."""
        super().training_step()  # type: ignore[misc]
        group = self.env_runner_group
        lost = group.num_remote_env_runners() and not group.num_healthy_remote_env_runners()
        if lost and (why := why_no_runner_works(self.config, sample=True)):
            raise RuntimeError(f"No env runner can sample. {why}")


@lru_cache
def cluster_checked(algo_class: type) -> type:
    """``algo_class`` under its own name, with `ClusterChecked`."""
    if issubclass(algo_class, ClusterChecked):
        return algo_class
    names = {"__doc__": algo_class.__doc__, "__module__": __name__}
    return type(algo_class.__name__, (ClusterChecked, algo_class), names)


def num_aggregators(config: Any) -> int:
    """Actors of APPO and IMPALA beside the learners; each takes a CPU (Ray 2.60, algorithm.py)."""
    per_learner = getattr(config, "num_aggregator_actors_per_learner", 0) or 0
    return (config.num_learners or 1) * per_learner


def _learner_needs(config: Any) -> dict[str, float]:
    cpus = config.num_cpus_per_learner
    if cpus == "auto":  # As RLlib has it (Ray 2.60, algorithms/utils.py).
        cpus = 0 if config.num_gpus_per_learner else 1
    each = {
        "CPU": cpus,
        "GPU": config.num_gpus_per_learner,
        **(config.custom_resources_per_learner or {}),
    }
    return {name: config.num_learners * number for name, number in each.items()}


def _runner_needs(config: Any) -> dict[str, dict[str, float]]:
    each = {
        "CPU": config.num_cpus_per_env_runner,
        "GPU": config.num_gpus_per_env_runner,
        **(config.custom_resources_per_env_runner or {}),
    }
    evaluation = dict(config.evaluation_config or {})
    of_evaluation = {
        **each,
        "CPU": evaluation.get("num_cpus_per_env_runner", each["CPU"]),
        "GPU": _gpus_per_evaluation_runner(config),
    }
    return {
        "env runners": {k: config.num_env_runners * number for k, number in each.items()},
        "evaluation": {
            k: config.evaluation_num_env_runners * number for k, number in of_evaluation.items()
        },
    }


def _gpus_per_evaluation_runner(config: Any) -> float:
    own = dict(config.evaluation_config or {})
    return own.get("num_gpus_per_env_runner", config.num_gpus_per_env_runner)


_START_S = 120.0  # imports, and loading a model, on a busy machine


def why_no_runner_works(config: Any, *, sample: bool = False) -> str | None:
    """Starts one more env runner to see why all others fail: RLlib (Ray 2.60) forgets it.

    Args:
        config: of the runners.
        sample: whether it shall sample what the first of them begins with.

    Returns:
        The runner's error, with its traceback; None if it has none.
    """
    actor = (
        ray.remote(config.env_runner_cls)
        .options(
            num_cpus=0,  # the others may hold them all
            num_gpus=config.num_gpus_per_env_runner,
            resources=config.custom_resources_per_env_runner,
            max_restarts=0,
        )
        .remote(config=config, worker_index=1, num_workers=config.num_env_runners)
    )
    try:
        ray.get(actor.ping.remote(), timeout=_START_S)
        if sample:
            ray.get(actor.sample.remote(), timeout=config.sample_timeout_s)
    except GetTimeoutError:
        return None
    except RayError as error:
        return str(error)
    finally:
        ray.kill(actor)
    return None


@contextmanager
def exits_are_errors(doing: str) -> Iterator[None]:
    """Makes an error of ``sys.exit`` in code of the user's, which would end the job in silence.

    Raises:
        RuntimeError: naming who has called it.
    """
    try:
        yield
    except SystemExit as error:
        frame = list(traceback.walk_tb(error.__traceback__))[-1][0]
        if str(frame.f_globals.get("__name__")).startswith("ray."):
            raise  # Ray ends this process.
        raise RuntimeError(
            f"sys.exit({error.code!r}) was called while {doing}, by {frame.f_code.co_name}() "
            f"in {frame.f_code.co_filename}:{frame.f_lineno}."
        ) from error
