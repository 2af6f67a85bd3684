"""Numbers written out: exact values, and the verdicts that need nothing more."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

LARGEST_EXPONENT = 400
MOST_DIGITS = 4_000
"""Python refuses to read integers that are longer than about this."""
ROUNDED = Fraction(1, 10**9)
"""How close a decimal must be to a fraction that no decimal equals to stand for it (our choice)."""

_DECIMAL = r"(?:\d+\.?\d*|\.\d+)"
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d*)?%?")
_NUMBER = re.compile(
    rf"(?P<sign>[-+]*)(?:(?P<whole>\d+)(?: (?=\d+/)|(?=\\frac)))?(?:"
    rf"\\frac\{{(?P<above>-?{_DECIMAL})\}}\{{(?P<below>-?{_DECIMAL})\}}"
    rf"|(?P<over>{_DECIMAL})/(?P<under>{_DECIMAL})"
    rf"|(?P<mantissa>{_DECIMAL})(?:[eE](?P<exponent>[-+]?\d+)|\*10\^\{{?(?P<power>[-+]?\d+)\}}?)?"
    rf"|10\^\{{?(?P<ten>[-+]?\d+)\}}?)(?P<percent>%?)"
)


@dataclass(frozen=True)
class Number:
    """A number that is written out.

    Attributes:
        value: Its exact value, the percent sign left aside.
        decimal: Whether it has a decimal point or a power of ten.
        percent: Whether a percent sign follows.
    """

    value: Fraction
    decimal: bool
    percent: bool

    def readings(self) -> tuple[Fraction, ...]:
        """What it may stand for: with a percent sign, the figure or the share."""
        return (self.value, self.value / 100) if self.percent else (self.value,)


@lru_cache(maxsize=4096)
def read_number(text: str) -> Number | None:
    """The number that a normalised answer is, or None where it is anything else."""
    text = _without_parentheses(text)
    if len(text) > MOST_DIGITS:
        return None
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    exponent = int(match["exponent"] or match["power"] or match["ten"] or 0)
    if abs(exponent) > LARGEST_EXPONENT:
        return None
    above = match["above"] or match["over"] or match["mantissa"] or "1"
    below = match["below"] or match["under"] or "1"
    if not Fraction(below):
        return None
    value = Fraction(above) / Fraction(below) * Fraction(10) ** exponent
    value += int(match["whole"] or 0)
    if match["sign"].count("-") % 2:
        value = -value
    decimal = "." in above + below or bool(match["exponent"] or match["power"])
    return Number(value, decimal, bool(match["percent"]))


def same_number(one: Number, other: Number) -> bool:
    """Whether two numbers are the same, a percent sign read either way."""
    pairs = [(a, b) for a in one.readings() for b in other.readings()]
    if any(a == b for a, b in pairs):
        return True
    if one.decimal == other.decimal:
        return False
    return any(rounds(*((a, b) if one.decimal else (b, a))) for a, b in pairs)


def rounds(decimal: Fraction, exact: Fraction) -> bool:
    """Whether a decimal is the rounded form of a fraction that no decimal can equal."""
    below = exact.denominator
    for factor in (2, 5):
        while below % factor == 0:
            below //= factor
    return below > 1 and abs(decimal - exact) <= ROUNDED * abs(exact)


def quick_verdict(gold: str, answer: str) -> bool | None:
    """Decides equal texts and numbers that are written out; None for anything else.

    Args:
        gold: Normalised gold.
        answer: Normalised answer.
    """
    if gold == answer:
        return True
    if gold.isdigit() and answer.isdigit():
        return gold.lstrip("0") == answer.lstrip("0")
    one, other = read_number(gold), read_number(answer)
    return None if one is None or other is None else same_number(one, other)


def canonical(text: str) -> str:
    """A normalised answer so that equal numbers read the same, as `7/2` for 3.5."""
    number = read_number(text)
    if number is None:
        return text
    return f"{number.value}%" if number.percent else str(number.value)


def _without_parentheses(text: str) -> str:
    outer = 0
    while outer < len(text) // 2 and text[outer] == "(" and text[-1 - outer] == ")":
        outer += 1
    inner = text[outer : len(text) - outer]
    return inner if not any(mark in inner for mark in "(),") else text
