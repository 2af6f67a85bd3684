"""The token table: what policy and critic thought at every token of some completions.

One row per completion; what belongs to tokens is an array per row. That is how it is stored
(`samples/tokens.parquet`), because a table with a row per token repeats every text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rllib_distrl.files import replaced_file

# Columns of a completion that every table has.
COMPLETION_COLUMNS = (
    "problem",
    "row",
    "sample",
    "prompt",
    "completion",
    "score",
    "status",
    "finish_reason",
)
# Columns with one number per token, each of which may be missing.
TOKEN_NUMBERS = (
    "logp",
    "entropy",
    "value",
    "bonus",
    "advantage",
    "advantage_used",
    "logp_difference",
)
# Columns with several entries per token, stored flat, token after token.
QUANTILES, TOP_IDS, TOP_TEXTS, TOP_LOGPS = "quantiles", "top_ids", "top_texts", "top_logps"
# What an environment replied, which is nothing that was sampled.
REPLY_AT, REPLY_TEXTS = "reply_at", "reply_texts"
_METADATA = b"distrl"
_FORMAT = "distrl-tokens-1"


@dataclass(frozen=True)
class TokenTable:
    """Completions with what was known at each of their tokens.

    Attributes:
        completions: One row per completion, with `COMPLETION_COLUMNS`, ``answer``, and arrays of T
            entries ``token`` (ids) and ``text``. Further arrays, where they are known:
            ``logp`` of the token under the learner's policy (nats), ``entropy`` of its
            distribution, ``value`` of the state before the token, ``quantiles`` of the return
            from there (T x N, flat), ``bonus`` that was added to the advantage, ``advantage``
            before bonus and whitening, ``advantage_used`` after both, ``logp_difference``
            learner minus sampler, and ``top_ids``, ``top_texts``, ``top_logps`` of the likeliest
            tokens (T x K, flat). Where an environment replied, two arrays of R entries:
            ``reply_at``, how many of the T tokens were sampled before a reply, and
            ``reply_texts``, the reply as the model read it, the chat template's tokens included.
        info: Where the table comes from: model, environment, iteration and the like.
    """

    completions: pd.DataFrame
    info: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.completions)

    def has(self, column: str) -> bool:
        """Whether a per-token column is there."""
        return column in self.completions.columns

    @property
    def n_quantiles(self) -> int:
        """N; 0 where the critic gave no quantiles."""
        return self._per_token(QUANTILES)

    @property
    def n_top(self) -> int:
        """Alternatives kept per token; 0 where there are none."""
        return self._per_token(TOP_IDS)

    def _per_token(self, column: str) -> int:
        if not self.has(column):
            return 0
        for flat, tokens in zip(self.completions[column], self.completions["token"], strict=True):
            if len(tokens):
                return len(flat) // len(tokens)
        return 0

    @property
    def replies(self) -> list[list[tuple[int, str]]]:
        """What the environment replied in each completion: after how many tokens, and what."""
        if not self.has(REPLY_AT):
            return [[] for _ in range(len(self))]
        columns = self.completions[REPLY_AT], self.completions[REPLY_TEXTS]
        return [
            [(int(at), str(text)) for at, text in zip(ats, texts, strict=True)]
            for ats, texts in zip(*columns, strict=True)
        ]

    def numbers(self, column: str) -> np.ndarray:
        """One per-token column of all completions in a row: (M,), or (M, N) for quantiles.

        Raises:
            ValueError: if the table does not have it.
        """
        if column == "spread":
            return self.numbers(QUANTILES).std(-1)
        if not self.has(column):
            raise ValueError(f"this token table has no {column!r}: {self.why_missing(column)}")
        flat = np.concatenate([np.zeros(0), *self.completions[column]]).astype(np.float64)
        return flat.reshape(-1, self.n_quantiles) if column == QUANTILES else flat

    def why_missing(self, column: str) -> str:
        """Says why a column is not there."""
        return str(self.info.get("missing", {}).get(column, "it was not recorded."))

    @property
    def lengths(self) -> np.ndarray:
        """(completions,) tokens of each."""
        return self.completions["token"].map(len).to_numpy(dtype=np.int64)

    @property
    def tokens(self) -> pd.DataFrame:
        """One row per token.

        Columns: problem, row, sample, t, token, text; logp, probability, entropy, value, spread,
        quantiles (an array per token), bonus, advantage, advantage_used, logp_ratio, and top: a
        list of (text, probability). Missing ones are left out.
        """
        lengths = self.lengths
        frame = {
            name: np.repeat(self.completions[name].to_numpy(), lengths)
            for name in ("problem", "row", "sample")
        }
        frame["t"] = np.concatenate([np.zeros(0, np.int64), *map(np.arange, lengths)])
        for name in ("token", "text"):
            frame[name] = np.concatenate([[], *self.completions[name]])
        frame["token"] = frame["token"].astype(np.int64)
        for name in TOKEN_NUMBERS:
            if self.has(name):
                frame[name] = self.numbers(name)
        if "logp" in frame:
            frame["probability"] = np.exp(frame["logp"])
        if "logp_difference" in frame:
            frame["logp_ratio"] = np.exp(frame.pop("logp_difference"))
        table = pd.DataFrame(frame)
        if self.n_quantiles:
            quantiles = self.numbers(QUANTILES)
            table["spread"] = quantiles.std(-1)
            table[QUANTILES] = list(quantiles)
        if self.n_top:
            table["top"] = self._alternatives()
        return table

    def _alternatives(self) -> list[list[tuple[str, float]]]:
        texts = np.concatenate(list(self.completions[TOP_TEXTS])).reshape(-1, self.n_top)
        logps = np.concatenate(list(self.completions[TOP_LOGPS])).reshape(-1, self.n_top)
        return [
            list(zip(names, chances, strict=True))
            for names, chances in zip(texts.tolist(), np.exp(logps).tolist(), strict=True)
        ]

    def to_parquet(self, path: str | Path) -> Path:
        """Writes the table as one file, whole or not at all."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = Path(path)
        table = pa.Table.from_pandas(self.completions, preserve_index=False)
        metadata = {**(table.schema.metadata or {}), _METADATA: _dumps(self.info)}
        with replaced_file(path) as partial:
            pq.write_table(table.replace_schema_metadata(metadata), partial, compression="zstd")
        return path


def read_token_table(path: str | Path) -> TokenTable:
    """Reads what `TokenTable.to_parquet` wrote.

    Raises:
        ValueError: if the file is missing or holds something else.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no token table at {path}.")
    try:
        schema = pq.read_schema(path)
    except pa.ArrowInvalid:
        raise ValueError(f"{path} is not a Parquet file.") from None
    metadata = schema.metadata or {}
    info = json.loads(metadata.get(_METADATA, b"{}"))
    if info.pop("format", None) != _FORMAT:
        raise ValueError(f"{path} is a Parquet file, but not a token table.")
    return TokenTable(pq.read_table(path).to_pandas(), info)


def _dumps(info: Mapping[str, Any]) -> bytes:
    return json.dumps({**info, "format": _FORMAT}).encode()
