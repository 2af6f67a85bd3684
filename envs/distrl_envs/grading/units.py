r"""One table of units with their dimensions, and of things that are counted. All else is no unit.

A unit is a factor in SI (or in its own kind, as money) and a dimension: the powers of its bases.
Two quantities are equal if their dimensions are and their values in SI; a bare number equals a
quantity whose figure it is.
"""

from __future__ import annotations

import re
import tomllib
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

from distrl_envs.grading.normal_form import words

Dimension = tuple[tuple[str, int], ...]
Unit = tuple[Fraction, Dimension]

_TABLE = tomllib.loads(Path(__file__).with_name("units.toml").read_text(encoding="utf-8"))
NUMERALS = {
    "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12,
    "dozen": 12, "score": 20, "gross": 144, "lakh": 10**5, "crore": 10**7, "hundreds": 100,
    "thousands": 1000, "millions": 10**6, "billions": 10**9, "dozens": 12, "万": 10**4, "億": 10**8,
    "half": Fraction(1, 2), "halves": Fraction(1, 2), "third": Fraction(1, 3),
    "thirds": Fraction(1, 3), "quarter": Fraction(1, 4), "quarters": Fraction(1, 4),
    "fourths": Fraction(1, 4), "fifths": Fraction(1, 5), "sixths": Fraction(1, 6),
    "sevenths": Fraction(1, 7), "eighths": Fraction(1, 8), "ninths": Fraction(1, 9),
    "tenths": Fraction(1, 10), "hundredths": Fraction(1, 100), "thousandths": Fraction(1, 1000),
}  # fmt: skip
"""Words after a number that multiply it."""
CARDINALS = {
    word: value
    for value, word in enumerate(
        words(
            """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
            fifteen sixteen seventeen eighteen nineteen twenty"""
        )
    )
}
_POWERS = {"square": 2, "sq": 2, "sq.": 2, "cubic": 3, "cu": 3, "squared": 2, "cubed": 3}
_MORE_WORDS = frozenset(["of", "in", "total", "each", "altogether"])
_UNIT_TOKEN = re.compile(
    r"\\text\{(?P<text>[^{}]*)\}|\\frac|(?P<power>\^(?:-?\d|\{-?\d\}))"
    r"|\^\\circ(?: ?[CF](?![A-Za-z])|\\text\{[CF]\})?"
    r"|\\mu ?\\text\{[mFsgA]\}|\\mu ?[mFsgA](?![A-Za-z])|\\Omega|[*/(){}]"
    r"|(?P<word>[^\W\d_]+\.?(?:[^\W\d_]+\.)*)|[€£¥₹₽₩¢]|''?| "
)
_BARE_SPEED = re.compile(r"m/s(?:\^2|\^\{2\})?|g/m\^3")
_BARE = frozenset(words("cm km mm kg ft lb lbs oz hr hrs min sec mph ml mL Hz kHz MHz eV kWh mol"))
"""Short unit signs that count outside of text too; others there are products of variables."""


def _unit(text: str) -> Unit:
    factor, *bases = text.split()
    powers = [re.fullmatch(r"([^\d]*[^\d-])(-?\d*)", base) for base in bases]
    return Fraction(factor), tuple(sorted((m[1], int(m[2] or 1)) for m in powers if m))


def _table() -> dict[str, Unit]:
    table: dict[str, Unit] = {}
    for names, text in _TABLE["units"].items():
        for name in names.split():
            table[name.replace("_", " ")] = table[name.replace("_", "")] = _unit(text)
    for name, english in _TABLE["elsewhere"].items():
        power = int(english[-1]) if english[-1] in "23" else 1
        factor, dimension = table[english.rstrip("23")]
        table.setdefault(name, (factor**power, _times((), dimension, power)))
    for noun in _TABLE["counted"]["words"].split():
        table.setdefault(noun, (Fraction(1), ((noun, 1),)))
    return table


def _times(one: Dimension, other: Dimension, power: int) -> Dimension:
    powers = dict(one)
    for base, exponent in other:
        powers[base] = powers.get(base, 0) + exponent * power
    return tuple(sorted((base, exponent) for base, exponent in powers.items() if exponent))


UNITS = _table()


def find_unit(name: str) -> Unit | None:
    """The unit or counted thing of one word, singular or plural; None for any other word."""
    if name in UNITS:
        return UNITS[name]
    word = name.casefold().rstrip(".")
    if len(word) < 3 and word.isascii():
        return UNITS.get(name.rstrip(".")) if len(word) == 2 else None
    for singular in (
        word,
        _TABLE["irregular"].get(word),
        word.removesuffix("s"),
        word.removesuffix("es"),
    ):
        if (singular in UNITS and len(singular or "") > 2) or (singular and not word.isascii()
                                                           and singular in UNITS):  # fmt: skip
            return UNITS[singular]
    return None


@lru_cache(maxsize=4096)
def read_unit(text: str) -> Unit | None:
    r"""The unit that a text is in full, as `\text{m/s}^2`, `km/h` or `square feet`; else None."""
    tokens = _unit_tokens(re.sub(r"\\text\{([kM])\}\\Omega", r"\\text{\1ohm}", text))
    if not tokens:
        return None
    return _UnitReader(tokens).unit()


def _unit_tokens(text: str, inside: bool = False) -> list[str] | None:
    tokens: list[str] = []
    end, stands = 0, inside or bool(_BARE_SPEED.fullmatch(text))
    for match in _UNIT_TOKEN.finditer(text):
        if match.start() != end:
            return None
        end = match.end()
        if match["text"] is not None:
            within = _unit_tokens(match["text"].strip(), inside=True)
            if within is None:
                return None
            tokens += within
            stands = True
        elif match["word"] is not None:
            stands = stands or _stands_bare(match["word"])
            tokens.append(match["word"])
        elif not match.group().isspace():
            stands = stands or (match.group() not in "*/(){}^" and not match["power"])
            tokens.append(match.group())
    return tokens if end == len(text) and stands else None


def _stands_bare(word: str) -> bool:
    return len(word) > 2 or word in _BARE or not word.isascii() or word in ("sq", "in")


class _UnitReader:
    """Products and quotients of units with powers."""

    def __init__(self, tokens: list[str]):
        self.tokens = tokens
        self.at = 0

    def unit(self) -> Unit | None:
        factor, dimension, sign, found, power = Fraction(1), (), 1, False, 1
        while self.at < len(self.tokens):
            token = self.tokens[self.at]
            self.at += 1
            word = token.casefold()
            if token == "\\frac":
                pair = self._groups()
                if pair is None:
                    return None
                above, below = (_UnitReader(part).unit() for part in pair)
                if above is None or below is None:
                    return None
                unit: Unit | None = (above[0] / below[0], _times(above[1], below[1], -1))
            elif token in ("/", "*", "a") or word == "per":
                sign = sign if token == "*" else -1
                if not found and word != "per":
                    return None
                continue
            elif token in "(){}":
                continue
            elif word in _POWERS and word not in ("squared", "cubed") and self._goes_on():
                power = _POWERS[word]
                continue
            elif word in _MORE_WORDS and found and word != "in":
                continue
            else:
                unit = _named(token)
            if unit is None:
                return None
            exponent = power * self._exponent()
            power, found = 1, True
            factor *= unit[0] ** (sign * exponent)
            dimension = _times(dimension, unit[1], sign * exponent)
        return (factor, dimension) if found else None

    def _goes_on(self) -> bool:
        return self.at < len(self.tokens)

    def _exponent(self) -> int:
        following = self.tokens[self.at] if self._goes_on() else ""
        if following.startswith("^") and following[1:2] != "\\":
            self.at += 1
            return int(following.strip("^{}"))
        if following.casefold() in ("squared", "cubed"):
            self.at += 1
            return _POWERS[following.casefold()]
        return 1

    def _groups(self) -> tuple[list[str], list[str]] | None:
        groups = []
        for _ in range(2):
            if (
                not self._goes_on()
                or self.tokens[self.at] != "{"
                or "}" not in self.tokens[self.at :]
            ):
                return None
            end = self.tokens.index("}", self.at)
            groups.append(self.tokens[self.at + 1 : end])
            self.at = end + 1
        return groups[0], groups[1]


def _named(token: str) -> Unit | None:
    if token.startswith("^\\circ"):
        return find_unit("°" + re.sub(r"[^CF]", "", token.removeprefix("^\\circ")))
    if token.startswith("\\mu"):
        return find_unit("\\mu " + re.sub(r"\\mu|\\text|[{} ]", "", token))
    if token in ("'", "''"):
        return (Fraction(1, 60 if token == "'" else 3600), (("degree", 1),))
    return find_unit(token)
