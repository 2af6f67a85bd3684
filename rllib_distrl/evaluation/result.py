"""What an evaluation hands back: graded samples, their numbers, and both on disk.

On disk samples are Parquet parts that survive a kill, beside the settings they belong to.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from rllib_distrl.evaluation.measures import (
    Equivalence,
    SampleTable,
    distinct_n,
    per_problem,
    summarise,
)
from rllib_distrl.files import replaced_file, write_atomic
from rllib_distrl.maths.pass_k import Curve, pass_k_curve
from rllib_distrl.settings import EvalSettings


@dataclass(frozen=True)
class EvalResult:
    """Graded samples of one evaluation.

    Attributes:
        frame: One row per sample, sorted by problem and sample, with the columns of
            `SCHEMA`. The texts are left out where they are in a folder instead, because
            they need not fit in memory: `load_samples` reads them.
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
        """One row per problem: see `measures.per_problem`."""
        return per_problem(
            self.frame,
            self._ks(k),
            votes=votes,
            distinct_by=self.settings.distinct_by,
            equivalent=self.equivalent,
        )

    def report(self, k: Sequence[int] | None = None) -> dict[str, Any]:
        """Every number, each with its interval: see `measures.summarise`."""
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


MANIFEST = "evaluation.json"
SAMPLES = "samples"

_REPLY = pa.struct(
    [
        ("at", pa.int32()),  # Tokens sampled before it.
        ("ids", pa.list_(pa.int32())),
        ("text", pa.string()),
        ("role", pa.string()),
        ("reward", pa.float64()),
        ("status", pa.string()),
        ("over", pa.bool_()),
        ("finish", pa.string()),
    ]
)
SCHEMA = pa.schema(
    [
        ("problem", pa.int32()),  # Position among the problems evaluated, from 0.
        ("row", pa.int64()),  # Row of the task.
        ("key", pa.string()),
        ("sample", pa.int32()),
        ("prompt", pa.string()),
        ("completion", pa.string()),  # With replies the transcript.
        ("token_ids", pa.list_(pa.int32())),  # Of the completion, EOS included; sampled ones only.
        ("replies", pa.list_(_REPLY)),  # Of the environment; null where the task does not reply.
        ("text_hash", pa.string()),  # Of the completion with its white space collapsed.
        ("tokens", pa.int32()),
        ("finish_reason", pa.string()),
        ("status", pa.string()),
        ("score", pa.float64()),
        ("answer", pa.string()),
        ("logp_sum", pa.float64()),
        ("grading", pa.string()),  # Of the gold and the grader; another one, another grade.
    ]
)
TEXT_COLUMNS = ("prompt", "completion", "token_ids", "replies")
LIGHT_COLUMNS = [name for name in SCHEMA.names if name not in TEXT_COLUMNS]


class SampleStore:
    """A folder of finished problems.

    A part holds whole problems and appears under its name in one step, so that what is there is
    finished, whenever the process was killed.

    Attributes:
        folder: `evaluation.json` and `samples/part-*.parquet` live here.
        overwrite: whether samples of something else may be removed.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any], *, overwrite: bool = False):
        """Opens ``folder`` for the evaluation that ``manifest`` describes, or continues it.

        Args:
            folder: made if it does not exist.
            manifest: everything that decides the samples.
            overwrite: forget samples of another evaluation instead of refusing; those of this
                one are kept and continued.

        Raises:
            ValueError: the folder holds samples of another evaluation.
        """
        self.folder = folder
        wanted = json.loads(json.dumps(manifest, default=str))
        path = folder / MANIFEST
        self.overwrite = overwrite
        if different := _differences(folder, wanted):
            self.forget(f"holds samples of another evaluation ({'; '.join(different)})")
        self.samples.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(wanted, indent=2) + "\n")

    @property
    def samples(self) -> Path:
        """The folder of the parts."""
        return self.folder / SAMPLES

    def finished(self) -> dict[int, str]:
        """Positions of the problems whose samples are on disk, with the problems' keys."""
        done: dict[int, str] = {}
        for part in sample_parts(self.folder):
            columns = pq.read_table(part, columns=["problem", "key"]).to_pydict()
            done.update(zip(columns["problem"], columns["key"], strict=True))
        return done

    def write(self, records: Sequence[Mapping[str, Any]]) -> Path:
        """Writes the samples of whole problems as one part, atomically.

        Args:
            records: one mapping per sample with the columns of `SCHEMA`.

        Returns:
            The part's path, named after its first problem.
        """
        path = self.samples / f"part-{records[0]['problem']:06d}.parquet"
        _write(path, records)
        return path

    def update(
        self,
        is_stale: Callable[[int, str | None], bool],
        grade_anew: Callable[[list[dict[str, Any]]], int],
    ) -> int:
        """Grades samples anew, each part in one step; how many they were.

        Args:
            is_stale: says of a problem's position and a stored `grading` whether it is outdated.
            grade_anew: changes the records of a part in place and returns how many.
        """
        total = 0
        for part in sample_parts(self.folder):
            stored = read_part(part, ["problem", "grading"]).to_pydict()
            if any(map(is_stale, stored["problem"], stored["grading"])):
                records = read_part(part, SCHEMA.names).to_pylist()
                total += grade_anew(records)
                _write(part, records)
        return total

    def forget(self, reason: str) -> dict[int, str]:
        """Removes every sample if overwriting is allowed.

        Returns:
            What is finished then: nothing.

        Raises:
            ValueError: with ``reason``, where it is not allowed.
        """
        if not self.overwrite:
            raise ValueError(
                f"{self.folder} {reason}: give another output folder, or overwrite this one."
            )
        for part in sample_parts(self.folder):
            part.unlink()
        return {}

    def light_frame(self) -> pd.DataFrame:
        """Everything but the texts, which need not fit in memory."""
        return load_samples(self.folder, LIGHT_COLUMNS)


def sample_parts(folder: Path | str) -> list[Path]:
    """The finished parts of an evaluation, in order of problems."""
    return sorted((Path(folder) / SAMPLES).glob("part-*.parquet"))


def load_samples(folder: Path | str, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """The samples of an evaluation, in order of problem and sample.

    Args:
        folder: what `evaluate_model` was given as ``out``.
        columns: some of `SCHEMA`; all of them, texts included, when None.

    Returns:
        One row per sample; empty when nothing is finished.
    """
    wanted = list(SCHEMA.names if columns is None else columns)
    order = [name for name in ("problem", "sample") if name not in wanted]
    tables = [read_part(part, wanted + order) for part in sample_parts(folder)]
    if not tables:
        return SCHEMA.empty_table().select(wanted).to_pandas()
    frame = pa.concat_tables(tables).to_pandas()
    frame = frame.sort_values(["problem", "sample"], kind="stable", ignore_index=True)
    return frame[wanted]


def _write(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Writes a part in one step."""
    with replaced_file(path) as partial:
        pq.write_table(pa.Table.from_pylist(list(records), SCHEMA), partial, compression="zstd")


def read_part(part: Path, columns: Sequence[str]) -> pa.Table:
    """Some columns of a part; those that an earlier version did not write are empty."""
    there = set(pq.read_schema(part).names)
    table = pq.read_table(part, columns=[name for name in columns if name in there])
    for name in columns:
        if name not in there:
            kind = SCHEMA.field(name).type
            table = table.append_column(name, pa.nulls(len(table), kind))
    return table.select(list(columns))


def _differences(folder: Path, wanted: Mapping[str, Any]) -> list[str]:
    """Settings in which the samples of ``folder`` differ from ``wanted``; [] without samples."""
    if not sample_parts(folder):
        return []
    path = folder / MANIFEST
    found = json.loads(path.read_text()) if path.exists() else {}
    return [
        f"{name}: there {found.get(name)!r}, now {wanted.get(name)!r}"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]
