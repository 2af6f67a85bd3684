"""Reading finished and running runs back as pandas frames."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from rllib_distrl.method.token_table import TokenTable, read_token_table
from rllib_distrl.recipe import Recipe, read_toml, recipe_from_tables
from rllib_distrl.runs.folder import RunFolder, open_run
from rllib_distrl.runs.log import VALIDATED_PROBLEMS, read_progress

# What `distrl train` measures: before and after training.
EVALUATIONS = ("before", "after")


@dataclass(frozen=True)
class Run:
    """One run folder. Everything is read when first asked for.

    Attributes:
        folder: Where its files are.
        name: Stands in figures and tables.
    """

    folder: RunFolder
    name: str

    @property
    def path(self) -> Path:
        """The run folder."""
        return self.folder.path

    @cached_property
    def meta(self) -> dict[str, Any]:
        """Versions, commit, machine, seed and command lines."""
        return json.loads(self.folder.meta_file.read_text(encoding="utf-8"))

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The resolved recipe as nested dicts."""
        return read_toml(self.folder.recipe_file)

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe, checked; needs the environment and algorithm that it names."""
        return recipe_from_tables(self.settings, self.name)

    @cached_property
    def iterations(self) -> pd.DataFrame:
        """One row per iteration, with RLlib's result keys joined by '/'.

        The index is the iteration. What an iteration did not report is NaN. Empty for a run that
        has not finished its first one. The problems of validations are in `progress.jsonl` alone.
        """
        rows = read_progress(self.folder.progress_file)
        if not rows:
            return pd.DataFrame(index=pd.Index([], name="iteration", dtype="int64"))
        frame = pd.DataFrame(rows).set_index("iteration")
        return frame.drop(columns=VALIDATED_PROBLEMS, errors="ignore")

    @cached_property
    def evaluations(self) -> dict[str, dict[str, float]]:
        """avg@n and pass@k, under "before" and "after" as far as they are measured."""
        found = self.folder.read_eval()
        return {when: found[when] for when in EVALUATIONS if found.get(when)}

    @cached_property
    def episodes(self) -> pd.DataFrame:
        """The graded completions of the evaluations, "before" or "after" in the column `when`."""
        return self.read_episodes()

    def read_episodes(self, columns: Iterable[str] | None = None) -> pd.DataFrame:
        """Reads the graded completions, or only some columns of them.

        Args:
            columns: Of the evaluation's samples; None: all, texts included.

        Returns:
            Both evaluations, one after the other, with the column `when`.
        """
        wanted = None if columns is None else list(columns)
        frames = []
        for when in EVALUATIONS:
            path = self.folder.samples / f"{when}.parquet"
            if path.is_file():
                frame = pd.read_parquet(path, columns=wanted)
                frame.insert(0, "when", when)
                frames.append(frame)
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame({"when": []})

    @cached_property
    def token_table(self) -> TokenTable:
        """Completions of the trained policy with what the critic thought at every token.

        Raises:
            ValueError: If the run has none.
        """
        if not self.has_tokens:
            raise ValueError(
                f"{self.path} has no token table: it is written when training ends, unless "
                "eval.token_problems is 0."
            )
        return read_token_table(self.folder.tokens_file)

    @property
    def has_tokens(self) -> bool:
        """Whether the run has a token table."""
        return self.folder.tokens_file.is_file()

    @property
    def tokens(self) -> pd.DataFrame:
        """One row per token of the token table, see `TokenTable.tokens`."""
        return self.token_table.tokens


def load_run(path: str | Path, name: str = "") -> Run:
    """Opens a run folder for reading.

    >>> run = load_run("runs/distrl-seed0")  # doctest: +SKIP
    >>> run.iterations["env_runners/episode_return_mean"].plot()  # doctest: +SKIP

    Args:
        path: The folder that `distrl train` made; the run may still be going on.
        name: For figures and tables; the folder's name if empty.

    Raises:
        ValueError: If there is no run.
    """
    return Run(open_run(Path(path)), name or Path(path).resolve().name)
