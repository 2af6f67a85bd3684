"""The problems of a recipe: their splits and prompts, checked before anything starts."""

from __future__ import annotations

from typing import Any

from rllib_distrl.recipe import Recipe


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
