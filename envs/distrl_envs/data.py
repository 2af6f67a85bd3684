"""Loading problems from files and Hugging Face data sets, every fault reported with its place."""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distrl_envs.formats import Format, check_path, look_up

HUB_PREFIX = "hf:"
LARGEST_CELL = 1 << 24
UNNAMED = re.compile(r"|Unnamed: \d+(_level_\d+)?|__index_level_\d+__")
"""Columns that hold the index of a pandas frame, or nothing: a spreadsheet's trailing comma."""

Numbered = Iterator[tuple[str, Any]]
"""Places such as `train.jsonl:12`, each with its row, or with the exception that is its fault."""


def read_rows(source: str) -> Numbered:
    """All rows of a source.

    Raises:
        ValueError: If the source is not understood, does not exist or cannot be read on.
    """
    if source.startswith(HUB_PREFIX):
        return _read_hub(source)
    path = Path(source)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(
            f"Got data {source!r}; it must be a file that ends in {', '.join(READERS)}, or "
            "hf:name/split."
        )
    if not path.is_file():
        raise ValueError(f"There is no file {source!r}: give a path that exists.")
    return reader(path)


def _read_jsonl(path: Path) -> Numbered:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{path}:{number}", _parsed(line)


def _parsed(line: bytes) -> Any:
    try:
        row = json.loads(line)
        if b"\\ud" in line.lower():
            # A lone surrogate is no character: no tokenizer takes it, and no file keeps it.
            json.dumps(row, ensure_ascii=False).encode()
    except RecursionError:
        return ValueError("is nested too deeply")
    except ValueError as error:  # Invalid UTF-8 included.
        return error
    return row


def _read_json(path: Path) -> Numbered:
    """A list of objects, each at the line where it begins; JSON lines under this name too."""
    raw = path.read_bytes()
    if raw.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        yield from _read_jsonl(path)
        return
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
    position = _skip_blank(text, 0)
    if text[position : position + 1] != "[":
        raise ValueError(f"{path} must hold a list of objects, or one object a line.")
    decoder, line, counted, position = json.JSONDecoder(), 1, 0, _skip_blank(text, position + 1)
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            row, end = decoder.raw_decode(text, position)
            if "\\ud" in text[position:end].lower():
                json.dumps(row, ensure_ascii=False).encode()
            yield f"{path}:{line}", row
        except (ValueError, RecursionError) as error:
            if not isinstance(error, UnicodeEncodeError):
                yield f"{path}:{line}", ValueError(f"{error}; nothing after it was read")
                return
            yield f"{path}:{line}", error
        position = _skip_blank(text, end)
        if text[position : position + 1] == ",":
            position = _skip_blank(text, position + 1)
        elif text[position : position + 1] != "]":
            line += text.count("\n", counted, position)
            yield f"{path}:{line}", ValueError("neither ',' nor ']'; nothing after it was read")
            return


def _skip_blank(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _read_csv(path: Path) -> Numbered:
    csv.field_size_limit(LARGEST_CELL)
    # Bytes that are no UTF-8 become surrogates, which tell that they were there.
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as lines:
        reader = csv.reader(lines, strict=True)
        header = _header(path, reader)
        while True:
            place = f"{path}:{reader.line_num + 1}"
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield place, ValueError(str(error))
                continue
            if cells:
                yield f"{path}:{reader.line_num}", _csv_row(header, cells)


def _header(path: Path, reader: Any) -> list[str]:
    try:
        names = next(reader, [])
    except csv.Error as error:
        raise ValueError(f"{path}:1: the header cannot be read: {error}") from error
    header = [name.strip() for name in names]
    named = [name for name in header if not UNNAMED.fullmatch(name)]
    twice = sorted({name for name in named if named.count(name) > 1})
    if twice or not _is_utf8(header):
        what = f"names {twice} twice" if twice else "holds bytes that are not UTF-8"
        raise ValueError(f"{path}:1: the header {what}: {header!a}. Correct it.")
    return header


def _csv_row(header: list[str], cells: list[str]) -> Any:
    if any(cell.strip() for cell in cells[len(header) :]):
        return ValueError(f"more cells than the header names ({len(cells)}, not {len(header)})")
    row = {n: c for n, c in zip(header, cells, strict=False) if not UNNAMED.fullmatch(n)}
    if not _is_utf8(row.values()):
        return ValueError("it holds bytes that are not UTF-8: save the file as UTF-8")
    return row


def _is_utf8(texts: Any) -> bool:
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_parquet(path: Path) -> Numbered:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", {n: v for n, v in row.items() if not UNNAMED.fullmatch(n)}
    except (OSError, ValueError, OverflowError, pa.ArrowException) as error:
        raise ValueError(
            f"{path}:{number + 1}: no readable Parquet file from this row on: {error}"
        ) from error


READERS = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _read_hub(source: str) -> Numbered:
    name, config, split = hub_address(source)
    if _is_local(source) and not Path(name).is_dir():
        raise ValueError(f"There is no folder {name!r}, which {source!r} names: correct the path.")
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


def _is_local(source: str) -> bool:
    return source.removeprefix(HUB_PREFIX).startswith(("/", "./", "../", "~"))


def hub_address(source: str) -> tuple[str, str | None, str]:
    """Name, configuration and split of `hf:[owner/]name[/config]/split` or `hf:./folder/split`.

    Raises:
        ValueError: If it has neither form.
    """
    address = source.removeprefix(HUB_PREFIX)
    parts = address.split("/")
    if _is_local(source) and parts[-1]:
        return str(Path(address).parent.expanduser()), None, parts[-1]
    if not 2 <= len(parts) <= 4 or not all(parts):
        raise ValueError(
            f"Got data {source!r}; it must be hf:name/split, hf:owner/name/split or "
            "hf:owner/name/config/split."
        )
    if len(parts) == 4:
        return f"{parts[0]}/{parts[1]}", parts[2], parts[3]
    return "/".join(parts[:-1]), None, parts[-1]


ON_BAD_ROW = ("error", "skip")
FAULTS_SHOWN = 20
OTHERS_SHOWN = 3
"""Rows that a fault about several rows shows."""
COLUMNS_SHOWN = 12

Row = dict[str, Any]
CONTEXT = "context"
"""Field of a row whose problem was a chat: the messages before the last one."""


class DataError(ValueError):
    """The faults of a data set, all of them."""


@dataclass(frozen=True)
class Column:
    """What a field must hold.

    Attributes:
        kinds: Types that are taken.
        required: Whether every row must have it; a missing or empty optional one becomes None.
        convert: Turns the value into what the task wants; what it raises is a fault of the row.
        field: Where the data has it, whatever its form; None: under the task's own name, or as
            `fields` or the form says.
    """

    kinds: tuple[type, ...] = (str,)
    required: bool = True
    convert: Callable[[Any], Any] | None = None
    field: str | None = None


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


@dataclass
class _Faults:
    """What is wrong, by place."""

    texts: list[str] = field(default_factory=list)
    rows: int = 0

    def add(self, place: str, wrong: Sequence[str]) -> None:
        self.rows += 1
        self.texts += [f"{place}: {fault}" for fault in wrong]


def load_data(
    source: str | Path,
    columns: Mapping[str, Column],
    *,
    fields: Mapping[str, str] | None = None,
    form: Format | None = None,
    on_bad_row: str = "error",
    gold: str | None = None,
    gold_key: Callable[[Any], Any] = lambda answer: answer,
    check: Callable[[Row], None] | None = None,
    read: Callable[[str], Numbered] = read_rows,
) -> Data:
    """Loads and validates a data set.

    Args:
        source: A `.jsonl`, `.json`, `.parquet` or `.csv` file, `hf:name/split`
            (`hf:owner/name/config/split` where the data set has several configurations), or
            `hf:./folder/split` for a data set's folder on this machine.
        columns: What the task needs, by its own names; "problem" says what is asked.
        fields: Where the data has them, if elsewhere: `{"problem": "question"}`, or a path into a
            row, `{"problem": "prompt[-1].content"}`.
        form: A published form, which brings its own names.
        on_bad_row: "error" raises with all faults at once, "skip" leaves such rows out, counts
            them and prints the count.
        gold: Column that answers the problem. Rows that ask the same but are answered differently
            are faults, all of them, for nothing says which is right.
        gold_key: Makes answers comparable: equal keys, equal answers.
        check: Looks at a row as a whole and may complete it; what it raises is a fault of the row.
        read: Yields the rows of the source, each with its place.

    Raises:
        DataError: With every fault and its place; also if no row is left.
        ValueError: If the source, a field mapping or `on_bad_row` is not understood.
    """
    if on_bad_row not in ON_BAD_ROW:
        raise ValueError(f"Got on_bad_row={on_bad_row!r}; it must be 'error' or 'skip'.")
    names = {name: column.field or name for name, column in columns.items()} | dict(fields or {})
    if unknown := sorted(set(names) - set(columns)):
        raise ValueError(f"Got fields for {unknown}; the task has {sorted(columns)}.")
    if form is not None and fields:
        raise ValueError(f"Got fields and format={form.name!r}, which names them: leave one out.")
    for path in names.values():
        check_path(path)
    data, faults = Data(), _Faults()
    for place, found in read(str(source)):
        row, wrong = _validated(found, columns, names, form)
        if check is not None and not wrong:
            wrong = _complaints(check, row)
        if wrong:
            faults.add(place, wrong)
        else:
            data.rows.append(row)
            data.places.append(place)
    if gold is not None:
        _drop_conflicts(data, gold, gold_key, faults)
    _report(str(source), data, faults, on_bad_row)
    return data


def problem_key(row: Row) -> str:
    """What identifies a problem: its text, and that of the chat before it; white space aside."""
    earlier = [m["content"] for m in row.get(CONTEXT) or () if m["role"] != "system"]
    return " ".join(" ".join([*earlier, row["problem"]]).split())


def _validated(
    found: Any, columns: Mapping[str, Column], names: Mapping[str, str], form: Format | None
) -> tuple[Row, list[str]]:
    """The row by the task's names, and what is wrong with it."""
    if isinstance(found, Exception):
        return {}, [f"cannot be read: {found}"]
    if not isinstance(found, Mapping):
        return {}, [f"holds {type(found).__name__}; each line must be an object with fields"]
    shown, published = _shown(found), found
    if form is not None:
        try:
            found = form.row(found)
        except Exception as error:
            reason = str(error) if isinstance(error, ValueError) else repr(error)
            return {}, [f"is not in the form {form.name!r}: {reason} (the row has {shown})"]
    row: Row = {name: value for name, value in found.items() if name not in names.values()}
    wrong = []
    for name, column in columns.items():
        try:
            source = found if column.field is None else published
            row[name] = _value(look_up(source, names[name]), column)
        except _Missing:
            wrong.append(f"field {names[name]!r} is missing (the row has {shown})")
        except Exception as error:  # A value that no converter foresaw is a fault like others.
            reason = str(error) if isinstance(error, ValueError) else f"cannot be read: {error!r}"
            wrong.append(f"field {names[name]!r} {reason}")
    return row, wrong


class _Missing(ValueError):
    """A field that a row must have and has not."""


def _shown(row: Mapping[Any, Any]) -> str:
    names = [str(name)[:60] for name in row]
    more = len(names) - COLUMNS_SHOWN
    return ", ".join(names[:COLUMNS_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _value(value: Any, column: Column) -> Any:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        if column.required:
            raise _Missing
        return None
    stray_bool = isinstance(value, bool) and bool not in column.kinds
    if stray_bool or not isinstance(value, column.kinds):
        wanted = " or ".join(kind.__name__ for kind in column.kinds)
        raise ValueError(f"holds {type(value).__name__} {value!r:.60}; it must be {wanted}")
    if isinstance(value, str | list) and not (value.strip() if isinstance(value, str) else value):
        if not column.required:
            return None
        raise ValueError("is empty")
    return column.convert(value) if column.convert else value


def _complaints(check: Callable[[Row], None], row: Row) -> list[str]:
    try:
        check(row)
    except Exception as error:  # What no check foresaw in a row is a fault of the row.
        return [str(error) if isinstance(error, ValueError) else f"cannot be read: {error!r}"]
    return []


def _drop_conflicts(data: Data, gold: str, gold_key: Callable[[Any], Any], faults: _Faults) -> None:
    """Takes rows out that ask the same and are answered differently; one fault for each."""
    asked: dict[str, list[int]] = {}
    for index, row in enumerate(data.rows):
        asked.setdefault(problem_key(row), []).append(index)
    dropped = set()
    for indices in asked.values():
        keys = [gold_key(data.rows[index][gold]) for index in indices]
        if all(key == keys[0] for key in keys):
            data.duplicates += len(indices) - 1
            continue
        dropped.update(indices)
        shown = indices[:OTHERS_SHOWN]
        others = [f"{data.places[i]} ({data.rows[i][gold]!r:.40})" for i in shown]
        more = f" and {len(indices) - len(shown)} more" if len(indices) > len(shown) else ""
        for index in indices:
            fault = f"the same problem has different golds: {', '.join(others)}{more}"
            faults.add(data.places[index], [fault])
    data.rows = [row for index, row in enumerate(data.rows) if index not in dropped]
    data.places = [place for index, place in enumerate(data.places) if index not in dropped]


def _report(source: str, data: Data, faults: _Faults, on_bad_row: str) -> None:
    shown = "\n  ".join(faults.texts[:FAULTS_SHOWN])
    more = len(faults.texts) - FAULTS_SHOWN
    rest = f"\n  … and {more} more" if more > 0 else ""
    if faults.texts and on_bad_row == "error":
        raise DataError(
            f"{source} has {len(faults.texts)} faults:\n  {shown}{rest}\nCorrect them, map the "
            "fields, name the format, or set on_bad_row = 'skip' to leave such rows out."
        )
    data.skipped = faults.texts
    if not data.rows:
        raise DataError(f"{source} has no usable row.\n  {shown}{rest}")
    if faults.texts:
        total = faults.rows + len(data.rows)
        print(f"{source}: skipped {faults.rows} of {total} rows.", file=sys.stderr)
