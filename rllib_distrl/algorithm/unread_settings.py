"""A setting that nothing reads is refused: whoever set it expects it to do something.

Who reads what is said once: by the signature of each stage (`method.registry`) for the settings
that stages share with `[training]`, and below for the parts that are no stages.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rllib_distrl.maths.advantages import TARGETS
from rllib_distrl.method.critic import head_stage
from rllib_distrl.method.pipeline import SHARED, Method
from rllib_distrl.method.registry import KINDS, LEARNED_STATS, Stage, methods, resolve
from rllib_distrl.settings import CRITIC_TRUNKS, TrainingSettings


@dataclass(frozen=True)
class Part:
    """A part of the algorithm, the configurations that have it, and what it reads.

    Attributes:
        name: For the message.
        present: Whether a configuration has it.
        reads: Settings of `[training]`.
    """

    name: str
    present: Callable[[Any], bool]
    reads: tuple[str, ...]


def _several(config: Any) -> bool:
    return config.critic != "none" and config.n_quantiles > 1


def _of_quantiles(config: Any) -> bool:
    return _several(config) and _head(config) == "quantile"


def _head(config: Any) -> str:
    return resolve("head", config.head).name


def _fresh(config: Any) -> bool:
    return config.critic != "none" and config.critic_checkpoint is None


def _bootstraps(config: Any) -> bool:
    """Whether a critic's targets may be other than the observed returns."""
    if config.critic == "none":
        return False
    target = resolve("target", config.target)
    if target.name not in TARGETS:
        return True
    lambda_ = target.params.get("critic_lambda", config.critic_lambda)
    return "critic_lambda" in target.settings and lambda_ < 1.0


def _says_returns(config: Any) -> bool:
    return config.critic != "none" and resolve("target", config.target).name == "monte_carlo"


def _statistic(config: Any) -> str:
    return resolve("bonus_statistic", config.bonus_stat).name


PARTS = (
    Part("a critic", lambda c: c.critic != "none",
         ("critic_lr", "critic_epochs", "critic_warmup_iterations", "critic_pretraining",
          "critic_observation", "vf_loss_coeff",
          "head", "n_quantiles", "gamma")),
    Part("a critic with critic_lambda < 1, whose targets are not just the observed returns",
         lambda c: _bootstraps(c) or _says_returns(c), ("target",)),
    Part("a critic with a trunk of its own ('separate' or 'twin')",
         lambda c: c.critic in CRITIC_TRUNKS, ("critic_checkpoint", "critic_freeze")),
    Part("a critic that does not come from a critic_checkpoint", _fresh, ("init_value",)),
    Part("a critic of head 'quantile' or 'gaussian' with n_quantiles >= 2 that does not come from "
         "a critic_checkpoint",
         lambda c: _fresh(c) and (_of_quantiles(c) or _head(c) == "gaussian"), ("init_spread",)),
    Part("a critic of head 'quantile' with n_quantiles >= 2", _of_quantiles,
         ("quantile_huber_kappa", "head_center")),
    Part("a critic of head 'quantile' with n_quantiles >= 2 and critic_lambda < 1",
         lambda c: _of_quantiles(c) and _bootstraps(c), ("quantile_loss",)),
    Part("a critic with n_quantiles >= 2", _several, ("bonus_stat",)),
    Part("a scalar critic (head 'quantile' with n_quantiles = 1)",
         lambda c: c.critic != "none" and c.n_quantiles == 1 and _head(c) == "quantile",
         ("vf_clip_param",)),
    Part("a stage that reads the critic's values, such as advantage 'gae'",
         lambda c: any("values" in stage.needs for stage in Method.from_config(c).stages),
         ("read_out",)),
    Part("bonus_stat = 'ensemble' or 'distance'",
         lambda c: _statistic(c) in LEARNED_STATS, ("bonus_stat",)),
    Part("bonus_stat = 'ensemble'", lambda c: _statistic(c) == "ensemble", ("ensemble", "gamma")),
    Part("bonus_stat = 'distance'", lambda c: _statistic(c) == "distance", ("distance",)),
    Part("lr_schedule = 'cosine'", lambda c: c.lr_schedule == "cosine",
         ("lr_decay_iterations", "lr_min_ratio")),
    Part("grad_clip", lambda c: c.grad_clip is not None, ("grad_clip_by",)),
    Part("none of our algorithms: [rollout] prompts_per_iteration and num_generations make the "
         "batch", lambda c: False, ("train_batch_size", "_train_batch_size_per_learner")),
)  # fmt: skip


def check_all_settings_are_read(config: Any) -> None:
    """Refuses settings that differ from the algorithm's own and that nothing chosen reads.

    Args:
        config: Otherwise valid.

    Raises:
        ValueError: With the setting, who would read it, and what to do.
    """
    method = Method.from_config(config)
    head = () if config.critic == "none" else (head_stage(TrainingSettings.of(config).to_dict()),)
    _check_own_settings((*method.stages, *method.controllers, *head))
    taken = {name for stage in method.stages for name in taken_from_training(stage)}
    read = taken | {name for part in PARTS if part.present(config) for name in part.reads}
    default = type(config)()
    settings = SHARED | {name for part in PARTS for name in part.reads}
    for name in sorted(settings - {"bonus_coeff"}):  # its 0 takes the bonus out
        value = getattr(config, name)
        if name not in read and value != getattr(default, name):
            shown = name.removeprefix("_")
            readers = " · ".join(_readers(name))
            raise ValueError(
                f"{shown} is {value!r}, but nothing that is chosen reads it. It is read by: "
                f"{readers}. Leave {shown} out, or choose one of these."
            )


def taken_from_training(stage: Stage) -> frozenset[str]:
    """The settings of `[training]` that a chosen stage reads from there.

    Not those that its own table gives, nor those that its other settings switch off.
    """
    return (SHARED & stage.method.settings().keys()) - stage.given - stage.ignored


def _check_own_settings(stages: tuple[Stage, ...]) -> None:
    """Refuses what a stage's own table sets and its other settings switch off."""
    for stage in stages:
        defaults = {name: p.default for name, p in stage.method.settings().items()}
        for name in sorted(stage.ignored - SHARED):
            if stage.settings[name] != defaults[name]:
                raise ValueError(
                    f"{stage.method.kind} {stage.name!r} has {name} = {stage.settings[name]!r}, "
                    f"which its other settings ({dict(stage.params)}) switch off. Leave {name} out."
                )


def _readers(name: str) -> list[str]:
    """Who reads a setting, for the message."""
    stages = [
        f"{kind} {method.name!r}"
        for kind in KINDS
        for method in methods(kind)
        if name in SHARED & method.settings().keys()
    ]
    return [*stages, *(part.name for part in PARTS if name in part.reads)]
