r"""What an answer says: reading a normalised text into a value, list, set, equation or choice.

`read` understands a text in full or returns `Unknown`, which equals nothing but its own spelling.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from typing import Any

from mpmath import mp

from distrl_envs.grading import units
from distrl_envs.grading.expressions import Tree, Unsupported, number_tree, read_expression
from distrl_envs.grading.kinds import (
    Alternatives,
    Based,
    Choice,
    Clock,
    Congruent,
    Equation,
    Joined,
    Members,
    Named,
    Ordered,
    Percent,
    Quantity,
    Ratio,
    Relation,
    Remark,
    Unknown,
    Value,
    Word,
)
from distrl_envs.grading.normal_form import normalise, unwrapped, words
from distrl_envs.grading.values import exact

MOST_PARTS = 128
DEEPEST = 12
RELATIONS = ("\\le", "\\ge", "<", ">", "\\ne")

_NAME = r"(?:\\frac\{[A-Z]+\}\{[A-Z]+\}|\\?[A-Za-z]+'*(?:_(?:\w|\{\\?[\w ]+\}|\{\\[a-z]+\}))?" \
        r"(?:\([A-Za-z](?:,[A-Za-z])*\))?)"  # fmt: skip
_NAMES = re.compile(
    rf"(?:\\text\{{[^{{}}]*\}}|{_NAME}(?::{_NAME})*|\([A-Za-z](?:,[A-Za-z])+\)"
    rf"|\\angle ?[A-Z ]+(?:_\d)?|[A-Z][a-z]+(?: [a-z]+)*)"
)
_LABEL = re.compile(
    r"\\text\{(?P<label>[A-Za-z ]+):\}|(?P<title>(?-i:[A-Z][a-z]+(?: [a-z]+)*)): ?(?=\S)"
    r"|(?:\\text\{)?(?:so,? )?(?:the )?(?:(?:final|correct|right) )?(?:answer|result|solution)s?"
    r"(?: is\b:?|(?: is)?(?:\}?[:=]|\}))\}? ?|(?:\\text\{)?(?:No\.|Nr\.|number)\}? ?(?=\d)"
    r"|(?:\\text\{)?(?:about|approximately|approx\.|roughly)\}? ?(?=[\d\\])"
    r"|\\?#(?=\d)",
    re.IGNORECASE,
)
_REMARK = re.compile(
    r",? ?(?:\\text\{,? ?(?:where|for all|for any|for every|for some|for|if|when|with|such that)\b"
    r"|\\quad \\text\{(?:where|for|if|when|with)\b|\b(?:where|for all|for any|such that)\b"
    r"|\\forall).*$",
    re.DOTALL,
)
_PLAIN_EQUATION = re.compile(r"(?<![<>\\])=")
_RELATION = re.compile(r"\\le(?![A-Za-z])|\\ge(?![A-Za-z])|\\ne(?![A-Za-z])|<|>")
_MEMBER = re.compile(r"([A-Za-z])(?:\([A-Za-z]\))?\\in(?![A-Za-z]) ?")
_BUILDER = re.compile(r"\\\{([A-Za-z])(?:\\in ?\\mathbb\{R\})?(?:\\mid ?|:|\|)(.*)\\\}", re.DOTALL)
_MATRIX = re.compile(r"\\begin\{(pmatrix|vmatrix|Vmatrix)\}(.*)\\end\{\1\}", re.DOTALL)
_CONGRUENT = re.compile(r"(?:(.*)\\equiv ?)?(.*?)(?:\(?\\pmod ?|\(?\\bmod ?)\{?\(?(\d+)\)?\}?\)?")
_MOD_IN_TEXT = re.compile(r"\\text\{\(?mod ?(\d+)\)?\}|\(?\\text\{\(?mod\}(\d+)\)?")
_CHOICE = re.compile(
    r"(?:(?:\\text\{)?(?:the )?(?:option|choice|answer)s?\}? ?)?"
    r"(?:\\text\{)?(?:\(([A-Ja-j])\)|([A-J])(?:[).]|:(?![A-J]))|\[([A-J])\])\}?:?(.*)",
    re.IGNORECASE | re.DOTALL,
)  # fmt: skip
_SPELT_CHOICE = re.compile(r"(?:option|choice|answer) ?\(?([A-Ja-j])\)?[.:]?", re.IGNORECASE)
_BASED = re.compile(
    r"(?:\\text\{)?\(?([0-9A-Z]+)\)?\}?_(?:\{(\d+)\}|(\d+)|\{?\\text\{([a-z]+)\}\}?)"
)
_CLOCK = re.compile(r"(\d{1,2}):([0-5]\d)(?::([0-5]\d))?(?:(?: ?|\\text\{)([ap])\.?m\.?\}?)?", re.I)
_MONEY = re.compile(r"(?:\\text\{)?(Rs\.?|USD|EUR|GBP|INR|US|[€£¥₹₽₩¢])\}? ?(?=[-\d\\.])")
_FIGURE = re.compile(
    r"(?:-|\\frac\{[^{}]*\}\{[^{}]*\}|\\sqrt\{[^{}]*\}|\d{1,3}(?:,\d{3})+(?!\d)|\d|\.(?=\d)"
    r"|[-+*/(){} ]|\\pi(?![A-Za-z])|\^(?!\\circ)|(?<=[\d.])[eE](?=[-+]?\d))+"
)  # fmt: skip
_ORDINAL = re.compile(r"(-?\d+)(?:\^\{?)?(?:\\text\{)? ?(?:st|nd|rd|th)\}?\}?")
_QUOTED = r"(?:'[^']*'|\"[^\"]*\")"
_WORDS = re.compile(r"(?=.*[^\W\d_]{2})[^\W\d_][\w ,.'\"`?!;:/()&-]*", re.DOTALL)
_THOUSANDS = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_CONTINENTAL = re.compile(r"-?(?:\d{1,3}(?:[. ]\d{3})+),\d+")
_POINTS = re.compile(r"-?\d{1,3}(?:\.\d{3}){2,}")
NOTHING = frozenset(
    ["\\emptyset", "no solution", "no solutions", "none", "no real solutions", "empty set"]
)
REALS = frozenset(["\\mathbb{r}", "all real numbers", "all reals", "real numbers"])
SYNONYMS = (
    frozenset(["dne", "does not exist", "undefined"]),
    frozenset(["true", "yes"]),
    NOTHING,
    REALS,
)
DECIDING = frozenset(
    words(
        """million billion thousand hundred dozen trillion half halves third thirds quarter squared
        cubed square cube root or and more less least most than not no is wrong impossible minus
        plus times over choose percent am pm a.m. p.m. north south east west up down left right
        profit loss gain bc ad bce ce remainder mod approximately about maybe between except if
        only never none ago later before after positive negative above below first second"""
    )
)
"""Words that change what a number says, so that a gold which has them is not the bare number."""


@lru_cache(maxsize=4096)
def read(text: str) -> Any:
    """What a normalised text says."""
    return _read(text, 0)


def _read(text: str, depth: int) -> Any:
    text = text.strip()
    if not text or depth > DEEPEST:
        return Unknown(text)
    text = _unlabelled(unwrapped(text, "()", kept=1))
    for reader in _READERS:
        node = reader(text, depth + 1)
        if node is not None:
            return node
    return Unknown(text)


def _unlabelled(text: str) -> str:
    label = _LABEL.match(text)
    if label and label.end() < len(text) and not decides(label["label"] or label["title"] or ""):
        rest = text[label.end() :]
        # The brace of a text that began before the label.
        if rest.endswith("}") and rest.count("{") < rest.count("}"):
            rest = rest[:-1]
        text = rest.strip()
    remark = _REMARK.search(text)
    if remark and remark.start() > 0 and not _PLAIN_EQUATION.search(remark.group()):
        text = text[: remark.start()].strip()
    for sign in ("\\approx", "=", "\\therefore"):
        text = text.removeprefix(sign).strip()
    return text


def decides(text: str) -> bool:
    """Whether a text has a word that changes what a number beside it says."""
    return not DECIDING.isdisjoint(re.findall(r"[a-z.]+", text.casefold()))


def _whole_text(text: str, depth: int) -> Any:
    r"""A text in its entirety, as \text{Evelyn}: read as if it stood bare."""
    inner = text[6:-1]
    if not (text.startswith("\\text{") and text.endswith("}")) or "{" in inner or "}" in inner:
        return None
    words = inner.strip(" `'\".")
    return _read(normalise(words), depth) if words and words != text else None


def _word(text: str, depth: int) -> Any:
    plain = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text)
    plain = " ".join(plain.split()).strip(" `'\".,!")
    first, _, others = plain.partition(" ")
    cardinal = units.CARDINALS.get(first.casefold())
    if cardinal is not None:
        return _read(f"{cardinal} {others}", depth)
    if re.fullmatch(r"[A-Za-z]{2,}", plain) or (
        len(plain) > 3 and " " in plain and _WORDS.fullmatch(plain)
    ):
        return Word(plain)
    if _WORDS.fullmatch(plain) and not re.search(r"[A-Za-z\\(]", plain):
        return Word(plain)
    return Word(text) if any(text.casefold() in group for group in SYNONYMS) else None


def _choice(text: str, depth: int) -> Any:
    plain = text[6:-1] if text.startswith("\\text{") and text.endswith("}") else text
    spelt = _SPELT_CHOICE.fullmatch(plain.strip())
    if spelt:
        return Choice(spelt[1].upper())
    if re.fullmatch(r"[A-J]", plain):
        return Choice(plain)
    match = _CHOICE.fullmatch(text)
    if not match:
        return None
    letter, rest = match[1] or match[2] or match[3], match[4].strip(" .:")
    if rest and not match[1] and not match[2]:
        return None
    if rest and re.match(r"[-+*/^_,!'=<>|)\]]|\\(?:le|ge|cup|cap|in)(?![A-Za-z])|[(\[{]", rest):
        return None  # (a)+b and (a)(b) are formulas.
    if rest and match[1] and letter.islower() and not rest.startswith("\\text"):
        return None
    return Choice(letter.upper(), _read(rest, depth) if rest else None)


def _alternatives(text: str, depth: int) -> Any:
    if not re.fullmatch(rf"\[{_QUOTED}(?:, ?{_QUOTED})*\]", text):
        return None
    quoted = re.findall(_QUOTED, text)
    return Alternatives(tuple(_read(normalise(part[1:-1]), depth) for part in quoted))


def _list(text: str, depth: int) -> Any:
    braces = text.startswith("\\{") and text.endswith("\\}")
    if _BUILDER.fullmatch(text):
        return None
    inner = text[2:-2] if braces else text
    if text.startswith("{") and text.endswith("}") and split(text[1:-1], (",",))[1:]:
        inner, braces = text[1:-1], True
    if not braces and _THOUSANDS.fullmatch(inner):
        return Value(read_expression(inner.replace(",", "")))
    if not braces and (_CONTINENTAL.fullmatch(inner) or _POINTS.fullmatch(inner)):
        return Value(number_tree(re.sub(r"[. ]", "", inner).replace(",", ".")))
    if not braces and _joined_thousands(inner):
        inner = text = inner.replace(",", "")
        return _read(inner, depth)
    parts = [part.strip() for part in split(inner, (",", ";", "\\land", "\\lor", "\\quad", "\\\\"))]
    parts = [part for part in parts if part]
    if len(parts) < 2 and not braces:
        return None
    if len(parts) > MOST_PARTS:
        return Unknown(text)
    if "\\land" in inner and not braces:
        quantity = _quantity(inner, depth)
        if isinstance(quantity, Quantity) and not quantity.single:
            return quantity  # 1 hour and 30 minutes is one figure.
    joined = _joined_relations(inner, depth) if not braces else None
    if joined is not None:
        return joined
    parts = _filled(parts)
    return Members(tuple(_read(part, depth) for part in parts), braces)


def _joined_thousands(text: str) -> bool:
    """Whether every comma outside of brackets stands before three digits, as in 32,348 dollars."""
    pieces = split(text, (",",))
    return (
        len(pieces) > 1
        and re.fullmatch(r"-?\d{1,3}", pieces[0]) is not None
        and all(re.match(r"\d{3}(?!\d)", piece) for piece in pieces[1:])
        and all(piece.isdigit() for piece in pieces[1:-1])
    )


def _filled(parts: list[str]) -> list[str]:
    r"""1, 2, \dots, 5 with what the dots stand for; unchanged where that is not certain."""
    if parts.count("\\dots") != 1 or not 2 <= (at := parts.index("\\dots")) < len(parts) - 1:
        return parts
    try:
        known = [exact(read_expression(part)) for part in parts[:at]]
        last = exact(read_expression(parts[at + 1]))
    except Unsupported:
        return parts
    if last is None or None in known:
        return parts
    values = [value for value in known if value is not None]
    step = values[1] - values[0]
    if not step or any(b - a != step for a, b in pairwise(values)):
        return parts
    count = (last - values[-1]) / step
    if count.denominator != 1 or not 1 <= count <= MOST_PARTS:
        return parts
    middle = [str(values[-1] + step * (n + 1)) for n in range(int(count) - 1)]
    return [*parts[:at], *middle, *parts[at + 1 :]]


def _joined_relations(text: str, depth: int) -> Any:
    """X < 2 or x > 3: a union; x > 2 and x < 5: an intersection."""
    for separators, how in ((("\\lor",), "any"), (("\\land",), "all"), ((",",), "list")):
        parts = split(text, separators)
        if len(parts) > 1 and all(_RELATION.search(part) or "\\in" in part for part in parts):
            nodes = tuple(_read(part, depth) for part in parts)
            if all(isinstance(node, (Relation, Joined, Named)) for node in nodes):
                return Joined(how, nodes)
    return None


def _signs(text: str, depth: int) -> Any:
    """Both values of a ±."""
    if not re.search(r"\\[pm][mp](?![A-Za-z])", text):
        return None
    upper = re.sub(r"\\pm *", "+", re.sub(r"\\mp *", "-", text))
    lower = re.sub(r"\\pm *", "-", re.sub(r"\\mp *", "+", text))
    parts = [_read(side.replace("=+", "=").removeprefix("+"), depth) for side in (upper, lower)]
    return Members(tuple(parts))


def _union(text: str, depth: int) -> Any:
    for separator, how in (("\\cup", "any"), ("\\cap", "all"), ("\\setminus", "without")):
        parts = split(text, (separator,))
        if len(parts) > 1:
            return Joined(how, tuple(_read(part, depth) for part in parts))
    return None


def _member(text: str, depth: int) -> Any:
    match = _MEMBER.match(text)
    if match:
        return Named(match[1], _read(text[match.end() :], depth))
    builder = _BUILDER.fullmatch(text)
    return Named(builder[1], _read(builder[2], depth)) if builder else None


def _equation(text: str, depth: int) -> Any:
    if _RELATION.search(text) and any(len(split(text, (sign,))) > 1 for sign in RELATIONS):
        return None
    sides = split(text, ("=", "\\approx"))
    if len(sides) < 2:
        return None
    if "\\approx" in text and not _approximations_hold(text):
        return Unknown(text)
    sides = split(split(text, ("\\approx",))[0], ("=",)) if "\\approx" in text else sides
    if len(sides) == 1:
        exact_side = sides[0]
        if not _NAMES.fullmatch(exact_side):
            return _read(exact_side, depth)
        return Named(exact_side, _read(split(text, ("\\approx",))[1], depth))
    if "" in sides:
        return Unknown(text)
    names_only = all(_NAMES.fullmatch(side) and len(side) > 1 for side in sides)
    if _NAMES.fullmatch(sides[0]) and not names_only:
        return Named(sides[0], _read(sides[-1], depth), tuple(sides))
    from distrl_envs.grading.comparison import same

    last = _read(sides[-1], depth)
    if all(same(_read(side, depth), last) is True for side in sides[:-1]):
        return last
    if len(sides) > 2:
        return Unknown(text)
    try:
        return Equation(read_expression(sides[0]), read_expression(sides[1]))
    except Unsupported:
        return Unknown(text)


def _approximations_hold(text: str) -> bool:
    """Whether every number after an "approximately" is about the one before it."""
    from distrl_envs.grading.values import evaluate, has_names

    sides = [part for piece in split(text, ("\\approx",)) for part in split(piece, ("=",))]
    values = []
    for side in sides:
        try:
            tree = read_expression(side)
            if not has_names(tree):
                values.append(mp.re(evaluate(tree)))
        except Unsupported:
            continue
    return all(abs(a - b) <= abs(a) / 50 for a, b in pairwise(values))


def _relation(text: str, _: int) -> Any:
    if not _RELATION.search(text):
        return None
    sides, signs, rest = [], [], text
    while True:
        pieces = {sign: split(rest, (sign,)) for sign in RELATIONS if sign in rest}
        cut = {sign: len(found[0]) for sign, found in pieces.items() if len(found) > 1}
        if not cut:
            break
        sign = min(cut, key=lambda one: (cut[one], -len(one)))
        sides.append(pieces[sign][0].strip())
        signs.append(sign)
        rest = rest[rest.index(sign, max(0, cut[sign] - 1)) + len(sign) :].strip()
    if not signs:
        return None
    return Relation((*sides, rest), tuple(signs))


def _ordered(text: str, depth: int) -> Any:
    bracketed = re.fullmatch(
        r"([\[(|])(\\begin\{pmatrix\}.*\\end\{pmatrix\})[\])|]", text, re.DOTALL
    )
    if bracketed:
        text = bracketed[2].replace("pmatrix", "vmatrix" if bracketed[1] == "|" else "pmatrix")
    matrix = _MATRIX.fullmatch(text)
    if matrix:
        rows = [row for row in matrix[2].split("\\\\") if row.strip()]
        cells = tuple(_read(cell, depth) for row in rows for cell in row.split("&"))
        return cells[0] if len(cells) == 1 else Ordered(matrix[1], len(rows), cells)
    reversed_ends = re.fullmatch(r"([\[\]])([^\[\]()]*)([\[\]])", text)
    if (
        reversed_ends
        and (text[0], text[-1]) != ("[", "]")
        and len(split(reversed_ends[2], (",", ";"))) == 2
    ):
        brackets = ("(" if text[0] == "]" else "[") + (")" if text[-1] == "[" else "]")
        text = brackets[0] + text[1:-1] + brackets[1]
    if text[:1] in "([" and text[-1:] in ")]" and len(text) > 2:
        members = split(text[1:-1], (",", ";"))
        if (
            len(members) > 1
            and len(members) <= MOST_PARTS
            and all(member.strip() for member in members)
        ):
            parts = tuple(_read(member, depth) for member in members)
            return Ordered(text[0] + text[-1], 1, parts)
    return None


def _ratio(text: str, depth: int) -> Any:
    clock = _CLOCK.fullmatch(text)
    if clock:
        hours, minutes = int(clock[1]), int(clock[2])
        return Clock(hours, minutes, int(clock[3] or 0), (clock[4] or "").lower())
    parts = split(text, (":",))
    if len(parts) < 2:
        return None
    if _NAMES.fullmatch(text):
        return None
    try:
        return Ratio(tuple(read_expression(part) for part in parts))
    except Unsupported:
        return Unknown(text)


def _congruent(text: str, _: int) -> Any:
    if "mod" not in text:
        return None
    match = _CONGRUENT.fullmatch(_MOD_IN_TEXT.sub(r"\\pmod{\1\2}", text))
    try:
        return Congruent(read_expression(match[2]), int(match[3])) if match else Unknown(text)
    except (Unsupported, ValueError):
        return Unknown(text)


def _based(text: str, _: int) -> Any:
    match = _BASED.fullmatch(text)
    if not match or (not re.search(r"\d", match[1]) and not (match[2] or match[3])):
        return None
    base = units.CARDINALS.get(match[4] or "") or int((match[2] or match[3] or "0")[:3])
    digits = match[1].lstrip("0") or "0"
    if not 2 <= base <= 36 or (match[1].isalpha() and base < 11):
        return None
    return Based(digits, base)


def _quantity(text: str, depth: int) -> Any:
    """Figures with units, percent signs, numerals and currencies."""
    ordinal = _ORDINAL.fullmatch(text)
    if ordinal:
        return Value(read_expression(ordinal[1]))
    if thousands := re.fullmatch(r"(-?\d[\d.]*)(?:[kK]|\\text\{k\})", text):
        return Value(("*", number_tree(thousands[1]), ("name", "k")))
    if text.startswith("-") and _MONEY.match(text[1:]):
        text = _MONEY.match(text[1:]).group() + "-" + text[1 + _MONEY.match(text[1:]).end() :]  # type: ignore[union-attr]
    money = _MONEY.match(text)
    if money:
        unit = units.find_unit(money[1].replace("US", "USD") if money[1] == "US" else money[1])
        inner = _read(text[money.end() :], depth)
        if unit and isinstance(inner, Value):
            return Quantity(inner.tree, *unit)
        return Unknown(text)
    parts: list[Quantity | Percent | Value | Remark] = []
    rest = text
    while rest:
        found = _one_quantity(rest, bool(parts), depth)
        if found is None:
            return _formula_with_unit(text)
        part, rest = found
        parts.append(part)
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return None
    sums = [part for part in parts if isinstance(part, Quantity)]
    if (
        len(sums) < len(parts)
        or len({part.dimension for part in sums}) > 1
        or not sums[0].dimension
    ):
        return None
    if any(a.factor <= b.factor for a, b in pairwise(sums)):
        return None
    total: Tree = ("number", Fraction(0))
    for part in sums:
        total = ("+", total, ("*", part.tree, ("number", part.factor)))
    return Quantity(total, Fraction(1), sums[0].dimension, single=False)


def _formula_with_unit(text: str) -> Quantity | None:
    at = text.find("\\text{")
    unit = units.read_unit(text[at:]) if at > 0 else None
    try:
        return Quantity(read_expression(text[:at]), *unit) if unit else None
    except Unsupported:
        return None


def _one_quantity(text: str, later: bool, depth: int) -> tuple[Any, str] | None:
    figure = _FIGURE.match(text)
    if not figure or not figure.group().strip(" ({") or depth > DEEPEST:
        return None
    written = figure.group()
    while written.count("{") > written.count("}") or written.count("(") > written.count(")"):
        written = written[: max(written.rfind("{"), written.rfind("("))]
    written = written.rstrip(" *^-+/")
    rest = text[len(written) :].strip()
    if not written or not rest:
        return None
    try:
        tree = read_expression(re.sub(r"(?<=\d),(?=\d{3})", "", written))
    except Unsupported:
        return None
    if rest in ("%", "\\%") or re.fullmatch(r"%(?:\\text\{)? ?points?\}?", rest):
        return Percent(tree), ""
    tree, rest = _multiplied(tree, rest)
    if not rest:
        return Value(tree), ""
    following = re.search(
        r"(?<=[A-Za-z}'])(?<!\^\{-)(?:\\land ?)?(?=\d)(?<!_)|(?<=\\circ)(?=\d)", rest
    )
    following = following or re.search(r"(?<=[A-Za-z}' ]) ?(?=\d)", rest)
    for end in (len(rest), *([following.start()] if following else [])):
        unit = units.read_unit(rest[:end].removesuffix("\\land").strip())
        if unit:
            return Quantity(tree, *unit), re.sub(r"^\\land ?", "", rest[end:].strip())
    if not later and (remark := re.fullmatch(r"\\text\{([^{}]*)\}", rest)):
        return Remark(Value(tree), " ".join(remark[1].split())), ""
    return None


def _multiplied(tree: Tree, rest: str) -> tuple[Tree, str]:
    """The number with the numerals after it, as in 5 million or 3 halves."""
    while True:
        match = re.match(r"(?:\\text\{)? ?([^\W\d_]+)", rest)
        word = match[1].casefold() if match else ""
        if match is not None and word in ("squared", "cubed"):
            tree = ("^", tree, ("number", Fraction(2 if word == "squared" else 3)))
        elif match is not None and word in units.NUMERALS:
            tree = ("*", tree, ("number", Fraction(units.NUMERALS[word])))
        else:
            return tree, rest
        rest = rest[match.end() :].strip()
        if match.group().startswith("\\text"):
            rest = rest[1:].strip() if rest.startswith("}") else "\\text{" + rest
        rest = re.sub(r"^(\\text\{)? ?of\b ?", r"\1", rest)


def _vector(text: str, _: int) -> Any:
    """Sums of the unit vectors i, j and k in bold: the tuple of their factors."""
    if "\\unitvector" not in text:
        return None
    from distrl_envs.grading.values import same_tree

    try:
        tree = read_expression(text)
        letters = "ijk" if "\\unitvectork" in text else "ij"
        zero: Tree = ("number", Fraction(0))
        parts = []
        for one in letters:
            parts.append(
                _with_units(
                    tree, {f"\\unitvector{x}": ("number", Fraction(x == one)) for x in letters}
                )
            )
        nothing = _with_units(tree, {f"\\unitvector{x}": zero for x in letters})
        if not same_tree(nothing, zero):
            return Unknown(text)
    except Unsupported:
        return Unknown(text)
    return Ordered("()", 1, tuple(Value(part) for part in parts))


def _with_units(tree: Tree, values: dict[str, Tree]) -> Tree:
    if tree[0] == "name":
        return values.get(tree[1], tree)
    return tuple(_with_units(part, values) if isinstance(part, tuple) else part for part in tree)


def _value(text: str, _: int) -> Any:
    try:
        return Value(read_expression(text))
    except Unsupported:
        return None


def split(text: str, separators: Sequence[str]) -> list[str]:
    """Splits outside all brackets; a half-open interval counts as bracketed."""
    if not any(separator in text for separator in separators):
        return [text]
    parts, depth, start, index = [], 0, 0, 0
    while index < len(text):
        character = text[index]
        if depth == 0 or character == "\\":
            found = next(
                (s for s in separators if depth == 0 and text.startswith(s, index)
                 and not (s[-1].isalpha() and text[index + len(s) : index + len(s) + 1].isalpha())),
                None,
            )  # fmt: skip
            if found and not (found in (",", ";") and text[index - 1 : index] == "\\"):
                parts.append(text[start:index].strip())
                start = index = index + len(found)
                continue
        if text.startswith("\\begin", index):
            depth += 1
        elif text.startswith("\\end", index):
            depth -= 1
        elif text.startswith(("\\lfloor", "\\lceil"), index):
            depth += 1
        elif text.startswith(("\\rfloor", "\\rceil"), index):
            depth -= 1
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        index += 1
    return [*parts, text[start:].strip()]


_READERS = (
    _choice,
    _whole_text,
    _alternatives,
    _list,
    _vector,
    _member,
    _union,
    _equation,
    _relation,
    _congruent,
    _signs,
    _ordered,
    _ratio,
    _based,
    _quantity,
    _word,
    _value,
)
