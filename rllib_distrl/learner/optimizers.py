"""Optimisers: one for the policy, one for what only the critic uses, and their learning rates."""

from typing import TYPE_CHECKING, Any

import torch
from ray.rllib.core.learner.learner import DEFAULT_OPTIMIZER

from rllib_distrl.maths.lr_schedule import lr_factor

if TYPE_CHECKING:
    from rllib_distrl.algorithm.distrl_config import DistRLConfig

CRITIC_OPTIMIZER = "critic"


def register_optimizers(learner: Any, module_id: str, config: "DistRLConfig") -> None:
    """Registers Adam for the policy and, where there is a critic, one of its own.

    A number as ``lr`` is set anew for each iteration (`set_learning_rates`); a schedule, which
    is RLlib's list of (env steps, rate), stays in RLlib's hands.

    Args:
        learner: with the module.
        module_id: of the module.
        config: names the learning rates.
    """
    module = learner.module[module_id]
    critic = module.critic_parameters()
    own = {id(parameter) for parameter in critic}
    policy = [p for p in module.parameters() if id(p) not in own and p.requires_grad]
    critic = [p for p in critic if p.requires_grad]
    critic_lr = config.lr if config.critic_lr is None else config.critic_lr
    groups = ((DEFAULT_OPTIMIZER, policy, config.lr), (CRITIC_OPTIMIZER, critic, critic_lr))
    for name, parameters, lr in groups:
        if parameters:
            fixed = isinstance(lr, (int, float))
            learner.register_optimizer(
                module_id=module_id,
                optimizer_name=name,
                optimizer=torch.optim.Adam(parameters, lr=lr if fixed else 0.0),
                params=parameters,
                lr_or_lr_schedule=None if fixed else lr,
            )


def set_learning_rates(learner: Any, module_id: str, config: "DistRLConfig", k: int) -> None:
    """Sets the learning rates of iteration ``k``, which alone they depend on."""
    factor = lr_factor(k, **lr_schedule_settings(config))
    critic_lr = config.lr if config.critic_lr is None else config.critic_lr
    rates = {DEFAULT_OPTIMIZER: config.lr, CRITIC_OPTIMIZER: critic_lr}
    for name, optimizer in learner.get_optimizers_for_module(module_id):
        rate = rates[name]
        if isinstance(rate, (int, float)):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor


def lr_schedule_settings(config: "DistRLConfig") -> dict[str, Any]:
    """The arguments of `lr_factor` that ``config`` gives."""
    return {
        "schedule": config.lr_schedule,
        "warmup_iterations": config.lr_warmup_iterations,
        "decay_iterations": config.lr_decay_iterations,
        "min_ratio": config.lr_min_ratio,
    }
