"""Finding the answer in a completion. Every search is linear in the length of the text."""

from __future__ import annotations

import re

BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
BRACES = re.compile(r"\\+(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
ESCAPED, UNESCAPED = re.compile(r"\\.|[{}]", re.DOTALL), re.compile(r"[{}]")
BLANKS = re.compile(r"\s*")
BARE_BOX = re.compile(r"\s*([^\s{}$\\]+)")
BETWEEN_BOXES = re.compile(
    r"(?=[^A-Za-z]*(?:,|and|or|&))(?:[\s,;$&]|\\[,;!()\[\]]|\\quad|\\qquad|\\text\s*\{[\s,]*(?:and|or)"
    r"[\s,]*\}|and|or){1,60}"
)
"""What makes the boxes on both sides members of one list."""
PHRASE = re.compile(
    r"(?:answer(?:\*\*|__)?\s{0,20}(?:is|:|=|\n\s{0,20}(?=[-$\\\d(*]))(?:\s{0,20}:)?|^####(?!#))"
    r"\s{0,200}(?:\*\*|__)?",
    re.IGNORECASE | re.M,
)
INLINE_MATH = re.compile(r"\\\((.+?)\\\)|\\\[(.+?)\\\]|\$\$(.+?)\$\$|\$(.+?)\$", re.DOTALL)
SENTENCE_END = re.compile(
    r"\.?(?:\*\*|__)|[.!?;](?=\s|$)|\n|<\||</?[A-Za-z_]+>|,?\s(?:because|since|not|as|which|that|so|but"
    r"|rather|instead|given|if|when|by|from|after|using|I)\s"
)
THINKING = re.compile(r"(?<![\"'`])<(/?)think(?:ing)?>", re.IGNORECASE)
"""Tags around thinking; one in quotes is spoken of, not used."""
LONGEST_PHRASE = 1_000
"""Characters after "the answer is" in which the answer must end."""


def extract_answer(completion: str, pattern: re.Pattern[str] | None = None) -> str | None:
    r"""The answer that a completion states, or None where it states none.

    What follows the last `</think>` comes first; only where it states nothing does all count.

    Args:
        completion: Any text.
        pattern: Where given, its last match decides (the first group that took part, or all of
            it). Otherwise the last balanced `\boxed{}` counts, with those before it where only
            commas and "and" stand between; a completion without any box may state its answer as
            "the answer is …", "Answer: …" or "#### …". A number that merely occurs in the text is
            never an answer.
    """
    closed = None
    for tag in THINKING.finditer(completion):
        closed = tag.end() if tag.group(1) else closed
    if closed is not None:
        after = _answer(completion[closed:], pattern)
        if after is not None:
            return after
    return _answer(completion, pattern)


def _answer(text: str, pattern: re.Pattern[str] | None) -> str | None:
    if pattern is not None:
        return _last_match(text, pattern)
    boxes = [match.span() for match in BOX.finditer(text)]
    if not boxes:
        return _stated(text)
    # The usual case: the last box is well formed, and nothing before it needs to be read.
    found = _content(text, boxes[-1][1])
    if found is None:
        content = last_balanced_box(text)
        return content.rpartition("\n####")[2].strip() or None if content else None
    contents, first = [found[0]], boxes[-1][0]
    for start, end in reversed(boxes[:-1]):
        before = _content(text, end) if first - end < LONGEST_PHRASE else None
        if before is None or not BETWEEN_BOXES.fullmatch(text, before[1], first):
            break
        contents.append(before[0])
        first = start
    return ", ".join(reversed(contents)).rpartition("\n####")[2].strip() or None


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
    r"""Content of the balanced `\boxed{…}` with anything in it that starts last, or None."""
    open_braces: list[int] = []
    best: tuple[int, int] | None = None
    for token in BRACES.finditer(text):
        kind = token.group()[-1]
        if kind == "{" and len(token.group()) != 2:
            open_braces.append(token.end() if len(token.group()) > 1 else -1)
        elif kind == "}" and len(token.group()) == 1 and open_braces:
            start = open_braces.pop()
            holds = start >= 0 and BLANKS.match(text, start).end() < token.start()  # type: ignore[union-attr]
            if holds and (best is None or start > best[0]):
                best = (start, token.start())
    if best is None:
        return None
    return text[best[0] : best[1]].strip() or None


def _last_match(text: str, pattern: re.Pattern[str]) -> str | None:
    """The last match; where the dot may end at a line or not, the reading that starts later."""
    last = None
    for flags in (pattern.flags & ~re.DOTALL, pattern.flags | re.DOTALL):
        for match in re.compile(pattern.pattern, flags).finditer(text):
            if last is None or match.start() > last.start():
                last = match
    if last is None:
        return None
    taken = next((group for group in last.groups() if group is not None), last.group())
    return taken.strip() or None


def _content(text: str, start: int) -> tuple[str, int] | None:
    """What the box holds whose command ends at `start`, and where it ends; None if it is empty."""
    after = start
    while after < len(text) and text[after].isspace():
        after += 1
    if not text.startswith("{", after):
        bare = BARE_BOX.match(text, start)
        content = bare.group(1).rstrip(".,;") if bare else ""
        return (content, bare.end()) if bare and content else None
    # Escaped braces are content; only where that leaves the box open do they count as braces.
    return _balanced(text, after, ESCAPED) or _balanced(text, after, UNESCAPED)


def _balanced(text: str, start: int, tokens: re.Pattern[str]) -> tuple[str, int] | None:
    depth = 0
    for token in tokens.finditer(text, start):
        if token.group() == "{":
            depth += 1
        elif token.group() == "}":
            depth -= 1
            if depth == 0:
                content = text[start + 1 : token.start()].strip()
                return (content, token.end()) if content else None
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
