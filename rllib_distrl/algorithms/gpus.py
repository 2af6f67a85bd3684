"""GPUs that a configuration asks for, against what Ray would do with them in silence."""

from typing import Any

import ray
import torch


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


def check_cluster_gpus(config: Any) -> None:
    """Refuses to wait for GPUs that the cluster does not have.

    Ray keeps actors waiting, without an end, for what no node offers. Where an autoscaler adds
    nodes ([rollout] max_env_runners is set), they may come.

    Args:
        config: an `AlgorithmConfig` that is about to be built; Ray is running.

    Raises:
        ValueError: where there are fewer GPUs than learners and runners need.
    """
    if not config.num_learners and config.num_gpus_per_learner and not torch.cuda.is_available():
        raise ValueError(
            f"num_gpus_per_learner is {config.num_gpus_per_learner:g} and num_learners is 0: this "
            "process learns, and PyTorch sees no GPU in it. Set num_learners >= 1 where other "
            "nodes have GPUs, or num_gpus_per_learner = 0."
        )
    needs = {
        "learners": config.num_learners * config.num_gpus_per_learner,
        "env runners": config.num_env_runners * config.num_gpus_per_env_runner,
        "evaluation": config.evaluation_num_env_runners * _gpus_per_evaluation_runner(config),
    }
    total = sum(needs.values())
    if not total or config.model_config["rollout"]["max_env_runners"]:
        return
    present = ray.cluster_resources().get("GPU", 0)
    if total > present:
        parts = " and ".join(f"{number:g} for {name}" for name, number in needs.items() if number)
        raise ValueError(
            f"{parts}: that many GPUs were asked for, and the cluster has {present:g}. Lower "
            "num_gpus_per_learner or num_gpus_per_env_runner (parts of a GPU are allowed), or the "
            "number of actors. Where an autoscaler adds nodes, set [rollout] max_env_runners."
        )


def _gpus_per_evaluation_runner(config: Any) -> float:
    own = dict(config.evaluation_config or {})
    return own.get("num_gpus_per_env_runner", config.num_gpus_per_env_runner)
