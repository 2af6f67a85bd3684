"""The page that shows a token table: what the critic believed at every token.

The table is in small compressed blocks, which the page decodes one at a time.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rllib_distrl.files import write_atomic
from rllib_distrl.method.token_table import (
    QUANTILES,
    REPLY_AT,
    REPLY_TEXTS,
    TOKEN_NUMBERS,
    TOP_LOGPS,
    TOP_TEXTS,
    TokenTable,
    read_token_table,
)
from rllib_distrl.viewer.html import fill, html_page, read_asset

# One script in three files: the page's state and data, its drawings, and what people do.
_SCRIPTS = ("data.js", "drawing.js", "viewer.js")
_Words = tuple[list[str], list[int], list[str]]
_WORD = re.compile(r"\s*\S+|\s+$")


def write_viewer(table: TokenTable, path: str | Path, *, title: str, note: str = "") -> Path:
    """Writes the page.

    Texts of the table reach the page as compressed data and are only ever set as text, and the
    page's own policy forbids every other script and every connection.

    Args:
        table: What to show.
        path: The HTML file.
        title: The headline.
        note: A line below it, for what is missing.

    Returns:
        `path`.

    Raises:
        ValueError: If there are no completions.
    """
    if not len(table):
        raise ValueError("There are no completions to look at.")
    packed = list(blocks(table))
    script = "".join(map(read_asset, _SCRIPTS))
    parts = {
        "SCRIPT": script,
        "INDEX": index(table, [rows for rows, _ in packed], title, note),
        "BLOCKS": "\n".join(
            f'<script type="text/plain" class="block">{block}</script>' for _, block in packed
        ),
    }
    body = fill(read_asset("viewer.html"), parts)
    write_atomic(Path(path), html_page(title, body, style="viewer.css", script=script))
    return Path(path)


def table_of_samples(path: str | Path) -> TokenTable:
    """Reads completions for the viewer: a token table, or graded completions without tokens.

    Args:
        path: `samples/tokens.parquet` of a run, or the file or folder of an evaluation's samples.

    Raises:
        ValueError: If it is neither.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    if not path.exists():
        raise ValueError(f"There is no file {path}.")
    try:
        names = pq.ParquetDataset(path).schema.names
    except (pa.ArrowInvalid, OSError):
        raise ValueError(f"{path} is not a Parquet file.") from None
    if "token" in names:
        return read_token_table(path)
    needed = ["problem", "sample", "prompt", "completion", "score", "status", "finish_reason"]
    if missing := [name for name in needed if name not in names]:
        raise ValueError(
            f"{path} holds no completions: it has no column {', '.join(missing)}. Give a token "
            "table or the samples of an evaluation."
        )
    frame = pd.read_parquet(path)
    if "replies" in frame and any(frame["replies"].notna()):
        found = map(_words, frame["completion"], frame.pop("replies"))
        frame["text"], frame[REPLY_AT], frame[REPLY_TEXTS] = zip(*found, strict=True)
    else:
        frame["text"] = [_WORD.findall(text) for text in frame["completion"]]
    frame["token"] = [np.zeros(len(words), np.int32) for words in frame["text"]]
    return TokenTable(frame, {"words": True})


def _words(transcript: str, replies: Sequence[Mapping[str, Any]] | None) -> _Words:
    """The words that were sampled; after how many there is a reply, and what it is.

    Args:
        transcript: As `distrl_envs.turns.transcript` writes it.
        replies: Those in it, with text and role.
    """
    words, places, texts, start = [], [], [], 0
    for reply in () if replies is None else replies:
        line = f"\n[{reply['role']}] {reply['text']}"
        begin = transcript.find(line, start)
        if not reply["text"] or begin < 0:
            continue
        words += _WORD.findall(transcript[start:begin])
        start = begin + len(line)
        if transcript.startswith("\n", start):
            start += 1
        places.append(len(words))
        texts.append(transcript[begin:start])
    return [*words, *_WORD.findall(transcript[start:])], places, texts


# A block is what is decoded at once: at most so many completions, tokens and letters.
_MOST_COMPLETIONS = 64
_MOST_TOKENS = 40_000
_MOST_LETTERS = 400_000
_SNIPPET = 200
_SPARKLINE = 24
_LARGEST_HALF = 65504.0
CORRECT = 1.0
CUT = ("length", "context")
"""Why a completion ended that a limit of tokens cut."""


def blocks(table: TokenTable) -> Iterator[tuple[slice, str]]:
    """Cuts the table into compressed blocks.

    A block is, gzipped and in base64: the length of a JSON header (uint32, little endian), the
    header, padded to a multiple of four, and then the arrays that the header lists.

    Yields:
        The completions of each block, and the block.
    """
    for rows in _cuts(table):
        yield rows, _encode(_block(table, rows))


def _cuts(table: TokenTable) -> Iterator[slice]:
    letters = (
        table.completions["completion"].map(len) + table.completions["prompt"].map(len)
    ).tolist()
    tokens, start = table.lengths.tolist(), 0
    n_tokens = n_letters = 0
    for row, (more_tokens, more_letters) in enumerate(zip(tokens, letters, strict=True)):
        full = (
            row - start >= _MOST_COMPLETIONS
            or n_tokens + more_tokens > _MOST_TOKENS
            or n_letters + more_letters > _MOST_LETTERS
        )
        if full and row > start:
            yield slice(start, row)
            start, n_tokens, n_letters = row, 0, 0
        n_tokens, n_letters = n_tokens + more_tokens, n_letters + more_letters
    if start < len(tokens):
        yield slice(start, len(tokens))


def _block(table: TokenTable, rows: slice) -> bytes:
    part = table.completions.iloc[rows]
    numbers: dict[str, int] = {}
    arrays: dict[str, np.ndarray] = {
        "token": _joined(part["token"]).astype("<u4"),
        "text": _numbered(part["text"], numbers),
    }
    if TOP_TEXTS in part and table.n_top:
        arrays["top"] = _numbered(part[TOP_TEXTS], numbers)
        arrays["top_logp"] = _half(_joined(part[TOP_LOGPS]))
    for name in (*TOKEN_NUMBERS, QUANTILES):
        if table.has(name):
            arrays[name] = _half(_joined(part[name]))
    header = {
        "lengths": [len(tokens) for tokens in part["token"]],
        "prompts": part["prompt"].tolist(),
        "answers": [_optional(answer) for answer in part["answer"]] if "answer" in part else None,
        "replies": table.replies[rows] if table.has(REPLY_AT) else None,
        "texts": list(numbers),
        "arrays": [[name, array.dtype.str, len(array)] for name, array in arrays.items()],
    }
    text = json.dumps(header, ensure_ascii=True).encode()
    text += b" " * (-len(text) % 4)
    body = b"".join(array.tobytes() for array in arrays.values())
    return len(text).to_bytes(4, "little") + text + body


def _joined(column: Iterable[Any]) -> np.ndarray:
    parts = [np.asarray(entry) for entry in column]
    return np.concatenate(parts) if parts else np.zeros(0)


def _numbered(column: Iterable[Sequence[str]], numbers: dict[str, int]) -> np.ndarray:
    """Texts as indices into `numbers`, which grows."""
    found = [numbers.setdefault(str(text), len(numbers)) for texts in column for text in texts]
    return np.asarray(found, dtype="<u4")


def _half(values: np.ndarray) -> np.ndarray:
    """Half precision: three digits, which is what the page shows."""
    return np.clip(values, -_LARGEST_HALF, _LARGEST_HALF).astype("<f2")


def _optional(value: Any) -> str | None:
    return None if value is None or value != value else str(value)


def _encode(data: bytes) -> str:
    return base64.b64encode(gzip.compress(data, 6, mtime=0)).decode()


def index(table: TokenTable, cuts: Sequence[slice], title: str, note: str) -> str:
    """What the page needs at once: the list of completions and the scales, packed.

    Args:
        table: The completions.
        cuts: Those of each block.
        title: The page's headline.
        note: A line on what is missing, or nothing.

    Returns:
        Gzipped JSON in base64.
    """
    frame = table.completions
    first = frame.drop_duplicates("problem")
    content = {
        "title": title,
        "note": note,
        "info": {key: value for key, value in table.info.items() if key != "missing"},
        "missing": dict(table.info.get("missing", {})),
        "n_quantiles": table.n_quantiles,
        "n_top": table.n_top,
        "columns": [name for name in (*TOKEN_NUMBERS, QUANTILES) if table.has(name)],
        "scales": _scales(table),
        "blocks": [[cut.start, cut.stop] for cut in cuts],
        "problems": {
            str(number): prompt[:_SNIPPET]
            for number, prompt in zip(first["problem"], first["prompt"], strict=True)
        },
        "problem": [int(number) for number in frame["problem"]],
        "sample": [int(number) for number in frame["sample"]],
        "score": [round(float(score), 4) for score in frame["score"]],
        "status": frame["status"].astype(str).tolist(),
        "cut": [reason in CUT for reason in frame["finish_reason"]],
        "tokens": table.lengths.tolist(),
        "snippet": [text[:_SNIPPET] for text in frame["completion"]],
        "uncertainty": _per_completion(table, "spread", np.mean),
        "bonus": _per_completion(table, "bonus", np.max),
        "sparkline": _sparklines(table),
    }
    return _encode(json.dumps(content, ensure_ascii=True).encode())


def _per_completion(table: TokenTable, column: str, summary: Any) -> list[float] | None:
    if not (table.n_quantiles if column == "spread" else table.has(column)):
        return None
    ends = np.cumsum(table.lengths)[:-1]
    parts = np.split(table.numbers(column), ends)
    return [round(float(summary(part)), 5) if len(part) else 0.0 for part in parts]


def _sparklines(table: TokenTable) -> list[list[float]] | None:
    """The value along each completion, at a few equally spaced tokens."""
    if not table.has("value"):
        return None
    lines = []
    for values in table.completions["value"]:
        points = np.zeros(0)
        if len(values):
            places = np.linspace(0, len(values) - 1, _SPARKLINE)
            points = np.interp(places, np.arange(len(values)), values)
        lines.append([round(float(value), 3) for value in points])
    return lines


def _scales(table: TokenTable) -> dict[str, list[float]]:
    """The range of colours of each column: outliers do not wash out the rest."""
    scales = {}
    for name in ("value", "spread", "bonus", "advantage_used", "entropy", "logp_difference"):
        known = table.n_quantiles if name == "spread" else table.has(name)
        values = table.numbers(name) if known else np.zeros(0)
        values = values[np.isfinite(values)]
        if len(values):
            low, high = np.percentile(values, [2, 98]).tolist()
            scales[name] = [low, high]
    scores = table.completions["score"].to_numpy(dtype=np.float64)
    bounds = [*scores[np.isfinite(scores)].tolist(), 0.0]
    if table.n_quantiles:
        bounds += np.percentile(table.numbers(QUANTILES), [0.2, 99.8]).tolist()
    elif "value" in scales:
        bounds += scales["value"]
    scales["return"] = [min(bounds), max(bounds)]
    return scales
