"""Compares answers which plain text cannot decide.

A worker does it (`worker_loop`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import product
from typing import Any

_NO_FORMULA = re.compile(
    r"\\text|(?<![\\A-Za-z])(?!d[a-z](?![A-Za-z]))[A-Za-z]{2,}"
    r"|\d \d|[A-Za-z]\d|[=<>,;]|\\(?:le|ge|ne|in|equiv)(?![a-z])|[^\x00-\x7f]"
)
_LIMITS = re.compile(r"_\{[^{}]*\}")
_CALCULUS = re.compile(r"\\(?:sum|prod|i{0,3}int|oint|lim)(?![A-Za-z])")


def load() -> Callable[[str, str], bool]:
    """Imports what decides whether an answer is the gold one, and warms it up."""
    import logging

    from math_verify import parse, verify

    from distrl_envs.grading.comparison import compare

    logging.disable(logging.CRITICAL)

    def understood(text: str) -> list[Any]:
        # Only what stands in a box is read as one formula; elsewhere any number in it would do.
        # The timeouts are off: they need the main thread's signals, and the parent keeps time.
        box = rf"\boxed{{{text}}}"
        return _unless_malformed(lambda: parse(box, parsing_timeout=None, raise_on_error=True), [])  # type: ignore[arg-type]

    def decide(gold: str, answer: str) -> bool:
        verdict = compare(gold, answer)
        if verdict is not None or not _asks_algebra(gold, answer):
            return verdict is True
        return any(
            _unless_malformed(
                lambda pair=pair: verify(*pair, timeout_seconds=None, raise_on_error=True), False
            )
            for pair in product(understood(gold), understood(answer))
        )

    decide("\\sum x", "\\sum y")
    # Malformed text, in whatever way it shows, is not the answer.
    return lambda gold, answer: bool(_unless_malformed(lambda: decide(gold, answer), False))


def _asks_algebra(gold: str, answer: str) -> bool:
    """Whether computer algebra may decide: sums, products, integrals and limits, without words.

    It drops words, glues numbers in a row and forgets what stands beside a tuple.
    """
    formulas = not any(_NO_FORMULA.search(_LIMITS.sub("", text)) for text in (gold, answer))
    return formulas and _CALCULUS.search(gold + answer) is not None


def _unless_malformed(compute: Callable[[], Any], otherwise: Any) -> Any:
    """What is computed, or `otherwise` where it fails for any reason but want of memory.

    math-verify raises anything on malformed text, and would also take a lack of memory for a wrong
    answer; deep inside it still does.
    """
    try:
        return compute()
    except MemoryError:
        raise
    except Exception:
        return otherwise
