"""Evaluation with a progress bar, as `train` and `eval` use it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from rllib_distrl.cli.eval_progress import EvaluationProgress
from rllib_distrl.cli.interrupts import Interrupts
from rllib_distrl.cli.ray_session import hide_loading_bars

if TYPE_CHECKING:
    from rllib_distrl.evaluation.settings import EvalSettings
    from rllib_distrl.recipe import Recipe


@dataclass(frozen=True)
class Measurement:
    """The numbers of one evaluation.

    Attributes:
        summary: {"avg@64": …, "pass@1": …}, shares in [0, 1].
        problems: Distinct problems.
        samples: Completions per problem.
        split: Which problems they are.
        scores: The lowest and the highest score.
    """

    summary: dict[str, float]
    problems: int
    samples: int
    split: str = "test"
    scores: tuple[float, float] = (0.0, 1.0)


def measure(
    recipe: Recipe,
    model: str | Path,
    label: str,
    console: Console,
    *,
    samples: Path,
    interrupts: Interrupts | None = None,
) -> Measurement:
    """Evaluates a model as the recipe's `[eval]` table says.

    An evaluation that was interrupted continues where it stopped.

    Args:
        recipe: Names the environment, the completion limit and the evaluation.
        model: A Hugging Face folder or id, or a built-in model.
        label: Stands before the progress.
        console: Where to show it.
        samples: The Parquet file for the graded completions.
        interrupts: Where a signal is noted, which ends the evaluation.

    Raises:
        Interrupted: After a signal.
    """
    from rllib_distrl.evaluation.evaluate import evaluate_model

    hide_loading_bars()
    samples.parent.mkdir(parents=True, exist_ok=True)
    unfinished = samples.with_name(f".{samples.stem}-unfinished")
    with EvaluationProgress(console, label, interrupts) as report:
        result = evaluate_model(
            str(model),
            recipe.env_id,
            recipe.env_config,
            evaluation_settings(recipe),
            out=unfinished,
            on_progress=report,
            overwrite=True,
        )
    result.to_parquet(samples)
    shutil.rmtree(unfinished)
    problems = len(result.frame) // recipe.eval.n
    return Measurement(result.summary(), problems, recipe.eval.n, recipe.eval.split, result.scores)


def evaluation_settings(recipe: Recipe) -> EvalSettings:
    """Returns how the recipe's `[eval]` table samples."""
    from rllib_distrl.evaluation.settings import EvalSettings

    return EvalSettings(
        problems=recipe.eval.problems,
        n=recipe.eval.n,
        k=recipe.eval.k,
        split=recipe.eval.split,
        max_tokens=recipe.rollout.max_completion_tokens,
        temperature=recipe.eval.temperature,
        top_p=recipe.eval.top_p,
        seed=recipe.run.seed,
        max_batch_size=recipe.rollout.max_batch_size,
    )
