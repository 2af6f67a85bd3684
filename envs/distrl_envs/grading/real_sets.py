"""Sets of reals: unions of intervals with constant ends, from intervals, relations and lists."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from functools import cmp_to_key
from typing import Any

from mpmath import mp

from distrl_envs.grading import values
from distrl_envs.grading.expressions import Unsupported
from distrl_envs.grading.kinds import Joined, Members, Named, Ordered, Relation, Value, Word
from distrl_envs.grading.structures import NOTHING, REALS, read

INFINITE = (("constant", "infty"), ("-", ("constant", "infty")))
FLIPPED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le", "\\ne": "\\ne"}
Interval = tuple[Any, bool, Any, bool]
"""Lower end, whether it belongs to the set, upper end, whether it does."""


def intervals(node: Any) -> list[Interval] | None:
    """The set that a node describes, as disjoint intervals in order; None where it does not."""
    if isinstance(node, Named):
        return intervals(node.node)
    try:
        if isinstance(node, Joined):
            parts = [intervals(part) for part in node.parts]
            if any(part is None for part in parts):
                return None
            found = parts[0] or []
            if node.how == "without":
                return _common(found, _outside(parts[1] or []))
            for part in parts[1:]:
                found = _merged([*found, *part]) if node.how == "any" else _common(found, part)  # type: ignore[misc]
            # x < 2, x > 3 has no common member: the comma lists the parts of a union.
            return found or (intervals(Joined("any", node.parts)) if node.how == "list" else found)
        if isinstance(node, Relation):
            return _of_relation(node)
        if (
            isinstance(node, Ordered)
            and len(node.parts) == 2
            and node.kind in ("()", "[]", "(]", "[)")
        ):
            low, high = (_end(part) for part in node.parts)
            return [(low, node.kind[0] == "[", high, node.kind[1] == "]")]
        if isinstance(node, Members) and node.braces:
            ends = [_end(part) for part in flat(node)]
            return _merged([(end, True, end, True) for end in ends])
        if isinstance(node, Word) and node.text.casefold() in NOTHING:
            return []
        if isinstance(node, Word) and node.text.casefold() in REALS:
            return [(-mp.inf, False, mp.inf, False)]
    except Unsupported:
        return None
    return None


def _end(node: Any) -> Any:
    if not isinstance(node, Value):
        raise Unsupported("an end that is no value")
    if node.tree in INFINITE:
        return mp.inf if node.tree == INFINITE[0] else -mp.inf
    return values.number(node.tree)


def _of_relation(node: Relation) -> list[Interval] | None:
    sides, signs = list(node.sides), list(node.signs)
    if len(sides) == 2 and not re.fullmatch(r"\|?[A-Za-z]\|?", sides[0]):
        sides, signs = sides[::-1], [FLIPPED[sign] for sign in signs]
    if len(sides) == 3 and signs[0] in (">", "\\ge"):
        sides, signs = sides[::-1], [FLIPPED[sign] for sign in signs[::-1]]
    name = sides[0] if len(sides) == 2 else sides[1] if len(sides) == 3 else ""
    if not re.fullmatch(r"\|?[A-Za-z]\|?", name):
        return None
    ends = [_end(read(side)) for side in sides if side != name]
    if len(ends) < len(signs):
        return None  # The name is its own end.
    if len(sides) == 3:
        if not {*signs} <= {"<", "\\le"}:
            return None
        found = [(ends[0], signs[0] == "\\le", ends[1], signs[1] == "\\le")]
    else:
        found = _half_lines(ends[0], signs[0])
    return _both_sides(found) if name.startswith("|") else found


def _half_lines(end: Any, sign: str) -> list[Interval]:
    below, above = (-mp.inf, False, end, sign == "\\le"), (end, sign == "\\ge", mp.inf, False)
    if sign == "\\ne":
        return [below, above]
    return [below] if sign in ("<", "\\le") else [above]


def _outside(found: list[Interval]) -> list[Interval]:
    """All reals that are not in a set of disjoint intervals in order."""
    low, has_low, rest = -mp.inf, False, []
    for part in found:
        rest.append((low, has_low, part[0], not part[1]))
        low, has_low = part[2], not part[3]
    return _merged([*rest, (low, has_low, mp.inf, False)])


def _both_sides(found: list[Interval]) -> list[Interval]:
    """The x whose absolute value lies in a set."""
    positive = _common(found, [(Fraction(0), True, mp.inf, False)])
    return _merged([*positive, *((-high, b, -low, a) for low, a, high, b in positive)])


def equal_ends(one: Any, other: Any) -> bool:
    """Whether two ends are the same number: exactly where they are rational, else to 12 digits."""
    if isinstance(one, Fraction) and isinstance(other, Fraction):
        return one == other
    one, other = _float(one), _float(other)
    if mp.isinf(one) or mp.isinf(other):
        return one == other
    return abs(one - other) <= mp.mpf(10) ** -12 * max(abs(one), abs(other))


def _float(end: Any) -> Any:
    return mp.mpf(end.numerator) / end.denominator if isinstance(end, Fraction) else end


def _order(one: Any, other: Any) -> int:
    if equal_ends(one, other):
        return 0
    return -1 if _float(one) < _float(other) else 1


def _merged(found: Sequence[Interval]) -> list[Interval]:
    kept: list[Interval] = []
    for part in sorted(found, key=cmp_to_key(lambda a, b: _order(a[0], b[0]) or b[1] - a[1])):
        low, has_low, high, has_high = part
        if (not _order(low, high) and not (has_low and has_high)) or _order(low, high) > 0:
            continue
        if kept:
            last = kept[-1]
            gap = _order(last[2], low)
            if gap > 0 or (gap == 0 and (last[3] or has_low)):
                further = _order(high, last[2])
                end = (
                    (high, has_high)
                    if further > 0
                    else (last[2], last[3] or (not further and has_high))
                )
                kept[-1] = (last[0], last[1], *end)
                continue
        kept.append(part)
    return kept


def _common(one: Sequence[Interval], other: Sequence[Interval]) -> list[Interval]:
    found = []
    for a in one:
        for b in other:
            low = max((a, b), key=cmp_to_key(lambda p, q: _order(p[0], q[0]) or q[1] - p[1]))
            high = min((a, b), key=cmp_to_key(lambda p, q: _order(p[2], q[2]) or p[3] - q[3]))
            found.append((low[0], low[1], high[2], high[3]))
    return _merged(found)


def flat(node: Any) -> list[Any]:
    """The members of a list, those of lists in it too; anything else alone."""
    if isinstance(node, Members):
        return [part for one in node.parts for part in flat(one)]
    if isinstance(node, Named) and isinstance(node.node, Members):
        return [Named(node.name, part) for part in flat(node.node)]
    return [node]
