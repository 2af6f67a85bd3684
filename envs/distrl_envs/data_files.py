"""Rows of files and Hugging Face data sets, each with its place; what cannot be read is a fault."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
