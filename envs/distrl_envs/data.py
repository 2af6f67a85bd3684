"""Loading problems from files and Hugging Face data sets, every fault reported with its place."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ON_BAD_ROW = ("error", "skip")
FAULTS_SHOWN = 20
HUB_PREFIX = "hf:"

Row = dict[str, Any]
Numbered = Iterator[tuple[str, Any]]
"""Places such as `train.jsonl:12`, each with what was found there."""


class DataError(ValueError):
    """The faults of a data set, all of them."""


@dataclass(frozen=True)
class Column:
    """What a field must hold.

    Attributes:
        kinds: Types that are taken.
        required: Whether every row must have it; a missing optional one becomes None.
        convert: Turns the value into what the task wants; its ValueError is a fault of the row.
    """

    kinds: tuple[type, ...] = (str,)
    required: bool = True
    convert: Callable[[Any], Any] | None = None


@dataclass
class Data:
    """Rows that passed, with where they came from.

    Attributes:
        rows: Their fields by the task's own names, all other fields by theirs.
        places: File and line of each row.
        skipped: The faults of rows that were left out.
        duplicates: How many rows repeat another one, answer included.
    """

    rows: list[Row] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    duplicates: int = 0


def load_data(
    source: str | Path,
    columns: Mapping[str, Column],
    *,
    fields: Mapping[str, str] | None = None,
    on_bad_row: str = "error",
    key: str = "problem",
    gold: str | None = None,
    gold_key: Callable[[Any], Any] = lambda answer: answer,
    check: Callable[[Row], None] | None = None,
) -> Data:
    """Loads and validates a data set.

    Args:
        source: A `.jsonl`, `.parquet` or `.csv` file, `hf:name/split` (`hf:owner/name/config/split`
            where the data set has several configurations), or `hf:./folder/split` for a data set's
            folder on this machine.
        columns: What the task needs, by its own names.
        fields: The data's names for them where they differ: `{"problem": "question"}`.
        on_bad_row: "error" raises with all faults at once, "skip" leaves such rows out, counts
            them and prints the count.
        key: Column that says what is asked.
        gold: Column that answers it. Rows that ask the same but are answered differently are
            faults, all of them, for nothing says which is right.
        gold_key: Makes answers comparable: equal keys, equal answers.
        check: Looks at a row as a whole; its ValueError is a fault of the row.

    Raises:
        DataError: With every fault and its place; also if no row is left.
        ValueError: If the source, a field mapping or `on_bad_row` is not understood.
    """
    if on_bad_row not in ON_BAD_ROW:
        raise ValueError(f"Got on_bad_row={on_bad_row!r}; it must be 'error' or 'skip'.")
    names = {name: name for name in columns} | dict(fields or {})
    unknown = sorted(set(names) - set(columns))
    if unknown:
        raise ValueError(f"Got fields for {unknown}; the task has {sorted(columns)}.")
    data, faults = Data(), []
    for place, found in _read(str(source)):
        row, wrong = _validated(found, columns, names)
        if check is not None and not wrong:
            wrong = _complaints(check, row)
        if wrong:
            faults += [f"{place}: {fault}" for fault in wrong]
        else:
            data.rows.append(row)
            data.places.append(place)
    if gold is not None:
        faults += _drop_conflicts(data, key, gold, gold_key)
    _report(str(source), data, faults, on_bad_row)
    return data


def same_problem_key(text: str) -> str:
    """What identifies a problem: its text, white space aside."""
    return " ".join(text.split())


def _read(source: str) -> Numbered:
    if source.startswith(HUB_PREFIX):
        return _read_hub(source)
    path = Path(source)
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ValueError(
            f"Got data {source!r}; it must be a file that ends in {', '.join(readers)}, or "
            "hf:name/split."
        )
    if not path.is_file():
        raise ValueError(f"There is no file {source!r}: give a path that exists.")
    return reader(path)


def _read_jsonl(path: Path) -> Numbered:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield f"{path}:{number}", json.loads(line)
            except ValueError as error:
                # Invalid UTF-8 included.
                yield f"{path}:{number}", error


def _read_csv(path: Path) -> Numbered:
    csv.field_size_limit(1 << 24)
    with path.open(newline="", encoding="utf-8", errors="replace") as lines:
        reader = csv.DictReader(lines, restkey="", strict=True)
        while True:
            place = f"{path}:{reader.line_num + 1}"
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield place, ValueError(str(error))
                continue
            place = f"{path}:{reader.line_num}"
            if "" in row:
                yield place, ValueError("more cells than the header names")
            else:
                yield place, {name: cell for name, cell in row.items() if cell is not None}


def _read_parquet(path: Path) -> Numbered:
    import pyarrow.parquet as parquet

    try:
        table = parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no readable Parquet file: {error}") from error
    number = 0
    for batch in table.iter_batches():
        for row in batch.to_pylist():
            number += 1
            yield f"{path}:{number}", row


def _read_hub(source: str) -> Numbered:
    name, config, split = _hub_address(source)
    try:
        from datasets import load_dataset  # type: ignore[import-not-found]
        from datasets.exceptions import DatasetsError  # type: ignore[import-not-found]
    except ImportError as error:
        raise ValueError(
            f"{source!r} is a Hugging Face data set, which needs the package datasets: install "
            "it with pip install 'rllib-distrl[datasets]', or give a local file."
        ) from error
    try:
        rows = load_dataset(name, config, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        raise ValueError(
            f"{source!r} cannot be loaded: {error} Is the name right, and is the hub in reach?"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"{source}:{number}", dict(row)


def _hub_address(source: str) -> tuple[str, str | None, str]:
    """Name, configuration and split of `hf:[owner/]name[/config]/split` or `hf:./folder/split`."""
    address = source.removeprefix(HUB_PREFIX)
    parts = address.split("/")
    if address.startswith(("/", "./", "../", "~")) and parts[-1]:
        return str(Path(address).parent.expanduser()), None, parts[-1]
    if not 2 <= len(parts) <= 4 or not all(parts):
        raise ValueError(
            f"Got data {source!r}; it must be hf:name/split, hf:owner/name/split or "
            "hf:owner/name/config/split."
        )
    if len(parts) == 4:
        return f"{parts[0]}/{parts[1]}", parts[2], parts[3]
    return "/".join(parts[:-1]), None, parts[-1]


def _validated(
    found: Any, columns: Mapping[str, Column], names: Mapping[str, str]
) -> tuple[Row, list[str]]:
    """The row by the task's names, and what is wrong with it."""
    if isinstance(found, Exception):
        return {}, [f"cannot be read: {found}"]
    if not isinstance(found, Mapping):
        return {}, [f"holds {type(found).__name__}; each line must be an object with fields"]
    row: Row = {name: value for name, value in found.items() if name not in names.values()}
    wrong = []
    for name, column in columns.items():
        try:
            row[name] = _value(found.get(names[name]), column)
        except ValueError as error:
            wrong.append(f"field {names[name]!r} {error}")
    return row, wrong


def _value(value: Any, column: Column) -> Any:
    if value is None:
        if column.required:
            raise ValueError("is missing")
        return None
    stray_bool = isinstance(value, bool) and bool not in column.kinds
    if stray_bool or not isinstance(value, column.kinds):
        wanted = " or ".join(kind.__name__ for kind in column.kinds)
        raise ValueError(f"holds {type(value).__name__} {value!r:.60}; it must be {wanted}")
    if isinstance(value, str | list) and not (value.strip() if isinstance(value, str) else value):
        raise ValueError("is empty")
    return column.convert(value) if column.convert else value


def _complaints(check: Callable[[Row], None], row: Row) -> list[str]:
    try:
        check(row)
    except ValueError as error:
        return [str(error)]
    return []


def _drop_conflicts(data: Data, key: str, gold: str, gold_key: Callable[[Any], Any]) -> list[str]:
    """Takes rows out that ask the same and are answered differently; one fault for each."""
    asked: dict[str, list[int]] = {}
    for index, row in enumerate(data.rows):
        asked.setdefault(same_problem_key(row[key]), []).append(index)
    faults, dropped = [], set()
    for indices in asked.values():
        golds = [data.rows[index][gold] for index in indices]
        if all(gold_key(answer) == gold_key(golds[0]) for answer in golds):
            data.duplicates += len(indices) - 1
            continue
        dropped.update(indices)
        others = [f"{data.places[i]} ({g!r:.40})" for i, g in zip(indices, golds, strict=True)]
        for index in indices:
            faults.append(
                f"{data.places[index]}: the same {key} has different golds: {', '.join(others)}"
            )
    data.rows = [row for index, row in enumerate(data.rows) if index not in dropped]
    data.places = [place for index, place in enumerate(data.places) if index not in dropped]
    return faults


def _report(source: str, data: Data, faults: list[str], on_bad_row: str) -> None:
    shown = "\n  ".join(faults[:FAULTS_SHOWN])
    more = len(faults) - FAULTS_SHOWN
    rest = f"\n  … and {more} more" if more > 0 else ""
    if faults and on_bad_row == "error":
        raise DataError(
            f"{source} has {len(faults)} faults:\n  {shown}{rest}\nCorrect them, map the fields, "
            "or set on_bad_row = 'skip' to leave such rows out."
        )
    data.skipped = faults
    if not data.rows:
        raise DataError(f"{source} has no usable row.\n  {shown}{rest}")
    if faults:
        count = len({fault.split(": ")[0] for fault in faults})
        print(f"{source}: skipped {count} of {count + len(data.rows)} rows.", file=sys.stderr)
