"""What an evaluation hands back."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from rllib_distrl.evaluation.measures import distinct_n
from rllib_distrl.evaluation.store import (
    LIGHT_COLUMNS,
    SCHEMA,
    load_samples,
    read_part,
    sample_parts,
)
from rllib_distrl.evaluation.summary import Equivalence, SampleTable, per_problem, summarise
from rllib_distrl.files import write_atomic
from rllib_distrl.maths.pass_k import Curve, pass_k_curve
from rllib_distrl.settings import EvalSettings


@dataclass(frozen=True)
class EvalResult:
    """Graded samples of one evaluation.

    Attributes:
        frame: One row per sample, sorted by problem and sample, with the columns of
            `store.SCHEMA`. The texts are left out where they are in a folder instead, because
            they need not fit in memory: `store.load_samples` reads them.
        settings: How it was sampled.
        folder: Where the samples are, None if only in memory.
        info: What was evaluated: environment, weights, limits.
        equivalent: Compares normalised answers in votes; equality when None.
    """

    frame: pd.DataFrame
    settings: EvalSettings
    folder: Path | None = None
    info: dict[str, Any] = field(default_factory=dict)
    equivalent: Equivalence | None = None

    @property
    def problems(self) -> int:
        """Number of problems."""
        return len(set(self.frame["problem"].tolist()))

    @property
    def samples(self) -> int:
        """Samples per problem."""
        return self.settings.n

    def summary(self, k: Sequence[int] | None = None) -> dict[str, float]:
        """The headline numbers: ``{"avg@64": 0.41, "pass@1": 0.41, "pass@8": 0.62, …}``.

        Args:
            k: the k of pass@k; those of the settings when None.

        Returns:
            Shares in [0, 1]; best@k as well where scores are graded.
        """
        problems = self.per_problem(k, votes=False)
        wanted = ("avg@", "pass@", "best@")
        means = dict(zip(problems.columns, problems.to_numpy().mean(axis=0).tolist(), strict=True))
        return {name: mean for name, mean in means.items() if name.startswith(wanted)}

    @property
    def scores(self) -> tuple[float, float]:
        """The lowest and the highest score; outside of [0, 1] they are numbers, no shares."""
        scores = self.frame["score"].to_numpy()
        return float(scores.min()), float(scores.max())

    def per_problem(self, k: Sequence[int] | None = None, *, votes: bool = True) -> pd.DataFrame:
        """One row per problem: see `summary.per_problem`."""
        return per_problem(
            self.frame,
            self._ks(k),
            votes=votes,
            distinct_by=self.settings.distinct_by,
            equivalent=self.equivalent,
        )

    def report(self, k: Sequence[int] | None = None) -> dict[str, Any]:
        """Every number, each with its interval: see `summary.summarise`."""
        return summarise(
            self.frame,
            self._ks(k),
            distinct_by=self.settings.distinct_by,
            equivalent=self.equivalent,
            further=self._diversity(),
        )

    def _diversity(self) -> dict[str, np.ndarray]:
        """(P,) dist-3 and dist-4 of each problem, where some completion is long enough.

        None where an earlier version did not write the tokens.
        """
        if self.folder is not None:
            parts = (
                read_part(part, ("problem", "token_ids")).to_pandas()
                for part in sample_parts(self.folder)
            )
        else:
            parts = iter([self.frame] if "token_ids" in self.frame else [])
        asked = set(self.frame["problem"].tolist())  # a folder may hold more
        shares: dict[int, dict[int, float]] = {3: {}, 4: {}}
        for part in parts:
            for number, some in _by_problem(part):
                if number not in asked:
                    continue
                if some["token_ids"].isna().any():
                    return {}
                for n, share in shares.items():
                    share[number] = distinct_n(list(some["token_ids"]), n)
        found = {
            f"dist-{n}": np.array([share[number] for number in sorted(share)])
            for n, share in shares.items()
        }
        # A problem of shorter completions has no grams, and an interval would have no meaning.
        return {name: column for name, column in found.items()
                if len(column) and np.isfinite(column).all()}  # fmt: skip

    def curve(self, label: str, ks: Sequence[int] | None = None) -> Curve:
        """pass@k with its interval, for plots; see `maths.pass_k.pass_k_curve`."""
        table = SampleTable(self.frame)
        return pass_k_curve(label, table.n, table.correct, ks)

    def to_json(
        self,
        path: Path | str,
        k: Sequence[int] | None = None,
        *,
        also: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Writes `report`, what was evaluated and ``also`` as one JSON object, and returns it."""
        content = {**self.report(k), **(also or {}), "evaluated": self.info}
        write_atomic(Path(path), json.dumps(content, indent=2, default=str) + "\n")
        return content

    def to_parquet(self, path: Path | str) -> None:
        """Writes all samples, texts included, as one file; part by part."""
        with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
            if self.folder is None:
                writer.write_table(pa.Table.from_pandas(self.frame, SCHEMA, preserve_index=False))
                return
            for part in sample_parts(self.folder):
                writer.write_table(read_part(part, SCHEMA.names).cast(SCHEMA))

    def _ks(self, k: Sequence[int] | None) -> tuple[int, ...]:
        return self.settings.ks if k is None else tuple(k)


def _by_problem(frame: pd.DataFrame) -> Iterator[tuple[int, Any]]:
    grouped: Any = frame.groupby("problem")
    yield from grouped


def load_result(folder: Path | str) -> EvalResult:
    """An earlier evaluation, for comparisons.

    Args:
        folder: what `evaluate_model` was given as ``out``.

    Returns:
        Its samples without the texts; estimates at powers of two.

    Raises:
        ValueError: nothing is there, or it is not finished.
    """
    frame = load_samples(folder, LIGHT_COLUMNS)
    if frame.empty:
        raise ValueError(f"{folder} holds no samples of an evaluation: give the folder of one.")
    counts = Counter(frame["problem"].tolist())
    settings = EvalSettings(problems=len(counts), n=max(counts.values()))
    return EvalResult(frame, settings, Path(folder))
