"""The text of single tokens, such that the pieces of a completion join to its text."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
# A character has at most four bytes, and a token at least one of them.
_LONGEST_CHARACTER = 4


def token_texts(tokenizer: Any, prompt_ids: Sequence[int], ids: Sequence[int]) -> list[str]:
    """The text that each token adds.

    Byte-level tokenizers split characters: the last token of a character carries it and the ones
    before it are empty. Every piece is decoded behind the token before it, because tokenizers
    drop a space at the start of a text.

    Args:
        tokenizer: of Hugging Face.
        prompt_ids: what came before.
        ids: T tokens of the completion.

    Returns:
        T texts.
    """
    texts: list[str] = []
    before, pending = list(prompt_ids[-1:]), []
    for token in ids:
        pending.append(token)
        start = _decode(tokenizer, before)
        whole = _decode(tokenizer, before + pending)
        text = whole[len(start) :] if whole.startswith(start) else _decode(tokenizer, pending)
        if text.endswith(UNFINISHED) and len(pending) < _LONGEST_CHARACTER:
            texts.append("")
            continue
        texts.append(text)
        before, pending = [token], []
    if pending:
        texts[-1] = UNFINISHED
    return texts


def single_texts(tokenizer: Any, ids: Iterable[np.ndarray]) -> dict[int, str]:
    """The text of each token by itself, for all ids that occur."""
    arrays = [np.ravel(some) for some in ids]
    unique = np.unique(np.concatenate(arrays)) if arrays else np.zeros(0, np.int64)
    return {token: _decode(tokenizer, [token]) for token in unique.tolist()}


def _decode(tokenizer: Any, ids: list[int]) -> str:
    known = len(tokenizer)
    parts = (
        [
            str(tokenizer.decode([token], skip_special_tokens=False))
            if token < known
            else UNFINISHED
            for token in ids
        ]
        if any(token >= known for token in ids)
        else [str(tokenizer.decode(ids, skip_special_tokens=False))]
    )
    return "".join(parts)
