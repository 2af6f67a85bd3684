"""Finding the answer in a completion. Every search is linear in the length of the text."""

from __future__ import annotations

import re

BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
BRACES = re.compile(r"\\+(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
BARE_BOX = re.compile(r"\s*([^\s{}$\\]+)")
PHRASE = re.compile(
    r"(?:answer\s*(?:\*\*|__)?\s*(?:is|:|=)(?:\s*:)?|^####)\s*(?:\*\*|__)?", re.IGNORECASE | re.M
)
INLINE_MATH = re.compile(r"\\\((.+?)\\\)|\\\[(.+?)\\\]|\$\$(.+?)\$\$|\$(.+?)\$", re.DOTALL)
SENTENCE_END = re.compile(r"\.?(?:\*\*|__)|[.!?;](?=\s|$)|\n|<\|")
THINKING = re.compile(r"(?<![\"'`])<(/?)think(?:ing)?>", re.IGNORECASE)
"""Tags around thinking; one in quotes is spoken of, not used."""
LONGEST_PHRASE = 1_000
"""Characters after "the answer is" in which the answer must end."""


def extract_answer(completion: str, pattern: re.Pattern[str] | None = None) -> str | None:
    r"""The answer that a completion states, or None where it states none.

    Args:
        completion: Any text.
        pattern: Where given, its last match decides (the first group that took part, or all of
            it). Otherwise the last balanced `\boxed{}` counts; a completion without any box may
            state its answer as "the answer is …", "Answer: …" or "#### …". A number that merely
            occurs in the text is never an answer.
    """
    if pattern is not None:
        return _last_match(completion, pattern)
    start = _last_box(completion)
    if start < 0:
        return _stated(completion)
    # The usual case: the last box is well formed, and nothing before it needs to be read.
    content = _content(completion, start) or last_balanced_box(completion)
    return content.rpartition("\n####")[2].strip() or None if content else None


def without_unfinished_thinking(completion: str) -> str:
    """The completion up to a `<think>` that is never closed: what stands inside it is no answer.

    Graders call it first where their setting `ignore_unfinished_thinking` is on, the default.
    Finished thinking stays. A `<think>` that stands in the prompt is not seen.
    """
    opened = None
    for tag in THINKING.finditer(completion):
        opened = None if tag.group(1) else opened or tag
    return completion if opened is None else completion[: opened.start()]


def last_balanced_box(text: str) -> str | None:
    r"""Content of the balanced `\boxed{…}` that starts last, or None."""
    open_braces: list[int] = []
    best: tuple[int, int] | None = None
    for token in BRACES.finditer(text):
        kind = token.group()[-1]
        if kind == "{" and len(token.group()) != 2:
            open_braces.append(token.end() if len(token.group()) > 1 else -1)
        elif kind == "}" and len(token.group()) == 1 and open_braces:
            start = open_braces.pop()
            if start >= 0 and (best is None or start > best[0]):
                best = (start, token.start())
    if best is None:
        return None
    return text[best[0] : best[1]].strip() or None


def _last_match(text: str, pattern: re.Pattern[str]) -> str | None:
    last = None
    for match in pattern.finditer(text):
        last = match
    if last is None:
        return None
    taken = next((group for group in last.groups() if group is not None), last.group())
    return taken.strip() or None


def _last_box(text: str) -> int:
    """Index after the last box command, -1 without one."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    match = BOX.match(text, start) if start >= 0 else None
    return match.end() if match else -1


def _content(text: str, start: int) -> str | None:
    """What the box holds whose command ends at `start`, or None where it never closes."""
    after = len(text) - len(text[start:].lstrip())
    if not text.startswith("{", after):
        bare = BARE_BOX.match(text, start)
        return bare.group(1).rstrip(".,;") or None if bare else None
    # Escaped braces are content; only where that leaves the box open do they count as braces.
    return _balanced(text, after, r"\\.|[{}]") or _balanced(text, after, r"[{}]")


def _balanced(text: str, start: int, tokens: str) -> str | None:
    depth = 0
    for token in re.compile(tokens, re.DOTALL).finditer(text, start):
        if token.group() == "{":
            depth += 1
        elif token.group() == "}":
            depth -= 1
            if depth == 0:
                return text[start + 1 : token.start()].strip() or None
    return None


def _stated(text: str) -> str | None:
    """What stands after the last "answer is", up to the end of its formula or sentence."""
    last = None
    for match in PHRASE.finditer(text):
        last = match
    if last is None:
        return None
    rest = text[last.end() : last.end() + LONGEST_PHRASE].lstrip()
    formula = INLINE_MATH.match(rest)
    if formula:
        return next(group for group in formula.groups() if group is not None).strip() or None
    end = SENTENCE_END.search(rest)
    return (rest[: end.start()] if end else rest).strip() or None
