"""The process that compares answers which plain text cannot decide; one job at a time.

Run as a script by `WorkerPool`. A job is a line `[id, gold, answer]` of JSON, its reply a line
`[id, verdict]`. All time limits are the parent's; the alarm only ends a worker whose parent is
gone. The alarm keeps its default action, which the kernel carries out inside C code too.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
import traceback
import types
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

_NO_FORMULA = re.compile(
    r"\\text|(?<![\\A-Za-z])(?!d[a-z](?![A-Za-z]))[A-Za-z]{2,}"
    r"|\d \d|[A-Za-z]\d|[=<>,;]|\\(?:le|ge|ne|in|equiv)(?![a-z])|[^\x00-\x7f]"
)
_LIMITS = re.compile(r"_\{[^{}]*\}")
_CALCULUS = re.compile(r"\\(?:sum|prod|i{0,3}int|oint|lim)(?![A-Za-z])")
OUT_OF_MEMORY = 3
"""Exit status of a worker that ran into its memory limit."""


def main() -> None:
    """Reads `memory_bytes` and `alarm_seconds` from the command line and serves until EOF."""
    memory_bytes, alarm_seconds = int(sys.argv[1]), float(sys.argv[2])
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    try:
        decide = _load()
    except Exception:
        replies.write(json.dumps({"error": traceback.format_exc()[-2_000:]}) + "\n")
        return
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    replies.write(json.dumps("ready") + "\n")
    for line in sys.stdin:
        job, gold, answer = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, alarm_seconds)
        try:
            verdict = decide(gold, answer)
        except MemoryError:
            os._exit(OUT_OF_MEMORY)
        except Exception:
            # Malformed text, in whatever way it shows, is not the answer.
            verdict = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(json.dumps([job, bool(verdict)]) + "\n")


def _load() -> Any:
    """Imports what decides, without the environments of the package, and warms it up."""
    package = types.ModuleType("distrl_envs")
    package.__path__ = [str(Path(__file__).resolve().parents[1])]
    sys.modules["distrl_envs"] = package
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
    return decide


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


if __name__ == "__main__":
    main()
