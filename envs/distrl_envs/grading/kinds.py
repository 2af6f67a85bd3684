"""The kinds of things that an answer may say."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from distrl_envs.grading.expressions import Tree
from distrl_envs.grading.units import Dimension


@dataclass(frozen=True)
class Value:
    """A formula."""

    tree: Tree


@dataclass(frozen=True)
class Quantity:
    """A formula with a unit; `single` where it is one figure, no sum as 3 ft 4 in."""

    tree: Tree
    factor: Fraction
    dimension: Dimension
    single: bool = True


@dataclass(frozen=True)
class Percent:
    """A figure with a percent sign."""

    tree: Tree


@dataclass(frozen=True)
class Word:
    """Words, compared by their spelling."""

    text: str


@dataclass(frozen=True)
class Choice:
    """A letter of a multiple choice, and what stands beside it."""

    letter: str
    beside: Any = None


@dataclass(frozen=True)
class Members:
    """A list or set: its members in any order."""

    parts: tuple[Any, ...]
    braces: bool = False


@dataclass(frozen=True)
class Ordered:
    """A tuple, interval, matrix or determinant: `kind` is its brackets or its environment."""

    kind: str
    rows: int
    parts: tuple[Any, ...]


@dataclass(frozen=True)
class Named:
    """A name and what it is equal to."""

    name: str
    node: Any
    sides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Equation:
    """An equation that names no value: left and right side."""

    left: Tree
    right: Tree


@dataclass(frozen=True)
class Relation:
    """A chain of inequalities over one variable, or several: sides and signs."""

    sides: tuple[str, ...]
    signs: tuple[str, ...]


@dataclass(frozen=True)
class Joined:
    """Sets joined by union (`any`), intersection (`all`), `without` or a comma (`list`)."""

    how: str
    parts: tuple[Any, ...]


@dataclass(frozen=True)
class Ratio:
    """a : b : c."""

    parts: tuple[Tree, ...]


@dataclass(frozen=True)
class Clock:
    """A time of the day."""

    hours: int
    minutes: int
    seconds: int
    half: str


@dataclass(frozen=True)
class Based:
    """Digits to a base."""

    digits: str
    base: int


@dataclass(frozen=True)
class Congruent:
    """A residue and its modulus."""

    tree: Tree
    modulus: int


@dataclass(frozen=True)
class Remark:
    """A number with a text that is no unit, which only a gold may leave aside."""

    node: Any
    text: str


@dataclass(frozen=True)
class Alternatives:
    """A list in the notation of Python, as data sets hold golds: any of them, or all."""

    parts: tuple[Any, ...]


@dataclass(frozen=True)
class Unknown:
    """What is not understood."""

    text: str
