"""The page that shows a token table: what the critic believed at every token."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rllib_distrl.files import write_atomic
from rllib_distrl.method.token_table import REPLY_AT, REPLY_TEXTS, TokenTable, read_token_table
from rllib_distrl.viewer.html import fill, html_page, read_asset
from rllib_distrl.viewer.token_blocks import blocks, index

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
