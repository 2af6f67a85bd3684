"""Packing a token table into small compressed blocks that a page decodes one at a time."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from rllib_distrl.method.token_table import (
    QUANTILES,
    REPLY_AT,
    TOKEN_NUMBERS,
    TOP_LOGPS,
    TOP_TEXTS,
    TokenTable,
)

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
