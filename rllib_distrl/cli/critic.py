"""What an evaluation says of the critic."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rllib_distrl.cli.export import restored
from rllib_distrl.cli.interrupts import Interrupts
from rllib_distrl.recipe import Recipe
from rllib_distrl.runs.folder import RunFolder

_ROWS = {
    "quantile_explained_variance": "explained variance of returns",
    "quantile_state_explained_variance": "explained variance of mean returns",
    "quantile_state_rmse": "error of the value (root mean square)",
    "quantile_crps": "continuous ranked probability score",
    "quantile_coverage_50": "coverage of the central 50 %",
    "quantile_coverage_90": "coverage of the central 90 %",
    "quantile_pit_ks": "largest deviation of the PIT from uniform",
    "quantile_crossing_rate": "crossing rate",
    "quantile_spread": "spread",
    "quantile_spread_error_correlation": "spread and error, rank correlation",
    "quantile_spread_error_partial_correlation": "... given the value",
    "quantile_spread_error_partial_correlation_given_position": "... and the position",
    "optimism_stat_error_correlation": "bonus statistic and error",
    "optimism_stat_error_partial_correlation": "... given the value",
    "optimism_stat_error_partial_correlation_given_position": "... and the position",
}


def probe(algo: Any, recipe: Recipe) -> dict[str, float]:
    """Judges an algorithm's critic as the recipe's `[eval]` table says; {} where that is off.

    Returns:
        What `algorithms.critic_probe.probe_critic` returns; {} without a critic.
    """
    from rllib_distrl.algorithm.critic_probe import probe_critic

    if not recipe.eval.critic_prefixes:
        return {}
    found = probe_critic(
        algo,
        prefixes=recipe.eval.critic_prefixes,
        continuations=recipe.eval.critic_continuations,
        split=recipe.eval.split,
    )
    return found if any(name in found for name in _ROWS) else {}


def probe_checkpoint(
    run: RunFolder, checkpoint: Path, recipe: Recipe, interrupts: Interrupts
) -> dict[str, float]:
    """Judges the critic of a checkpoint; see `probe`."""
    if not recipe.eval.critic_prefixes:
        return {}
    with restored(run, checkpoint, interrupts) as algo:
        return probe(algo, recipe)


def print_critic(console: Console, found: Mapping[str, float], split: str) -> None:
    """Prints the table of one critic; nothing where there is none."""
    if not found:
        return
    table = Table()
    table.add_column("critic")
    table.add_column("value", justify="right")
    for name, label in _ROWS.items():
        if name in found:
            table.add_row(label, f"{found[name]:.3f}")
    kind = "training" if split == "train" else "held-out"
    console.print(
        f"{found['prefixes']} {kind} prefixes, {found['continuations']} continuations each:",
        highlight=False,
        soft_wrap=True,
    )
    console.print(table)
