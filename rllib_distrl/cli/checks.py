"""Checks before training starts: the problems, room on disk; and what a full disk is told as."""

from __future__ import annotations

import errno
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rllib_distrl.algorithm.estimates import size
from rllib_distrl.recipe import Recipe
from rllib_distrl.runs.checkpoints import TrainingStopped, list_checkpoints
from rllib_distrl.runs.folder import RunFolder
from rllib_distrl.settings import CRITIC_TRUNKS


def check_problems(recipe: Recipe, config: Any) -> list[str]:
    """Builds the task of every split that the recipe asks, as the run will.

    Args:
        recipe: Says which splits are asked.
        config: The recipe's algorithm configuration.

    Returns:
        Lines for people: how large the splits are, and whether training problems are evaluated.

    Raises:
        ValueError: If the data has faults, a split is empty or a prompt is too long.
    """
    import gymnasium

    splits = ["train", recipe.eval.split] + ["validation"] * bool(recipe.eval.interval)
    lines: list[str] = []
    for split in dict.fromkeys(splits):
        env = gymnasium.make(
            config.env, disable_env_checker=True, **{**config.env_config, "split": split}
        )
        task = getattr(env.unwrapped, "task", None)
        env.close()
        if split == "train" and task is not None:
            lines += filter(None, [task.describe_splits()])
    if recipe.eval.split == "train":
        lines.append("The evaluation asks training problems, as eval.split = 'train' says.")
    return lines


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# How libraries that are not Python's own say it.
_NO_ROOM_WORDS = ("No space left on device", "Disk quota exceeded", "File too large")
_BYTES = 4  # of a weight or a moment: both are float32


def check_room(recipe: Recipe, config: Any, run: RunFolder) -> None:
    """Checks that a run's checkpoints and its model have room.

    Args:
        recipe: Says how many checkpoints stay.
        config: Its `AlgorithmConfig`.
        run: Where they go; what is there already is counted.

    Raises:
        ValueError: If the disk has less.
    """
    settings = recipe.run
    policy, trained = _parameters(settings.model, config.model_config)
    checkpoint = _BYTES * (policy + 3 * trained)  # weights, and two moments of what learns
    # While one is written, those that it replaces are still there.
    kept = settings.keep_checkpoints + 1 + bool(settings.checkpoint_metric)
    missing = max(kept - len(list_checkpoints(run.checkpoints)), 1)
    needed = missing * checkpoint + _BYTES * policy
    place = next(p for p in (run.path.absolute(), *run.path.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ValueError(
            f"{run.path}: the disk has {size(free)} free, and the run needs about {size(needed)} "
            f"for {missing} checkpoint(s) of {size(checkpoint)} and the model. Make room, name "
            "another place with --out, or lower run.keep_checkpoints."
        )


def _parameters(model: str, settings: dict[str, Any]) -> tuple[int, int]:
    """Parameters that a checkpoint holds for the sake of the policy, and those that learn."""
    from rllib_distrl.model.causal_lm import without_weights
    from rllib_distrl.model.loading import load_config
    from rllib_distrl.model.lora import count_adapter_parameters

    model_config = load_config(model)
    policy = without_weights(model_config)
    weights = sum(p.numel() for p in policy.parameters())
    trunks = 1 + CRITIC_TRUNKS.get(settings.get("critic", "separate"), 0)
    if lora := settings.get("lora"):
        return weights, trunks * count_adapter_parameters(lora, model_config)
    trunk = sum(p.numel() for p in policy.base_model.parameters())
    return 0, weights + (trunks - 1) * trunk


@contextmanager
def naming_a_full_disk(run: RunFolder) -> Iterator[None]:
    """Says of a write that found no room where it was and how to go on.

    Raises:
        TrainingStopped: In place of it.
    """
    try:
        yield
    except Exception as error:
        if not _found_no_room(error):
            raise
        place = getattr(error, "filename", None) or run.path
        raise TrainingStopped(
            f"{place}: {_reason(error)}. Checkpoints that were written are whole. Make room there, "
            f"then continue with: distrl train {shlex.quote(str(run.path))} --resume"
        ) from error


def _found_no_room(error: BaseException | None) -> bool:
    if error is None:
        return False
    said = any(words in str(error) for words in _NO_ROOM_WORDS)
    known = isinstance(error, OSError) and error.errno in _NO_ROOM
    return said or known or _found_no_room(error.__cause__)


def _reason(error: BaseException) -> str:
    return next((words for words in _NO_ROOM_WORDS if words in str(error)), str(error))
