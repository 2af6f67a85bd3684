r"""Whether two formulas are equal: exactly where they are rational, else at points.

Three arithmetics on the same tree. Rational numbers are computed as they are. Rational functions
and numbers too large to write out are computed modulo large primes, at random points, where two
that differ agree with a probability below 1e-80 (Schwartz-Zippel). Everything else is computed in
floating point at points drawn from a continuum, with more digits than its parts are apart.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from hashlib import blake2b
from typing import Any

from mpmath import mp

from distrl_envs.grading.expressions import Tree, Unsupported
from distrl_envs.grading.plain_numbers import rounds

PRIMES = (1267650600228229401496703205653, 2535301200456458802993406423129,
          1606938044258990275541962092341162602522202993782792835301611)  # fmt: skip
"""The first prime above 2^100, one above 2^101 and the first above 2^200."""
DIGITS = 40
"""Digits computed with, beyond those by which the parts of an expression are apart."""
LITTLE = 10
"""Orders of magnitude that those digits cover anyway."""
ROUNDED = 15
"""Digits given to rounding: two values that agree in the others are one."""
MOST_DIGITS = 3_000
"""Digits beyond which a value is left undecided."""
SAME_DECIMAL = 1e-9
"""A decimal of as many digits may stand for the value that it rounds (our choice)."""
POINTS = 3
MOST_BITS = 60_000
"""Length up to which rational numbers are written out."""
LARGEST_POWER = 10**7
LARGEST_FACTORIAL = 3 * 10**5
_FLOATS: dict[str, Callable[[Any], Any]] = {
    "sin": mp.sin, "cos": mp.cos, "tan": mp.tan, "cot": mp.cot, "sec": mp.sec, "csc": mp.csc,
    "arcsin": mp.asin, "arccos": mp.acos, "arctan": mp.atan, "sinh": mp.sinh, "cosh": mp.cosh,
    "tanh": mp.tanh, "ln": mp.log, "exp": mp.exp, "abs": abs, "floor": mp.floor, "ceil": mp.ceil,
}  # fmt: skip
_FAILURES = (ArithmeticError, ValueError, TypeError, RecursionError)


class NotRational(Exception):
    """The value is not a rational number or function, or not one that is computed as such."""


def same_tree(one: Tree, other: Tree) -> bool:
    """Whether two trees are equal wherever both are defined.

    Raises:
        Unsupported: If one cannot be computed quickly.
    """
    if one == other:
        return True
    decimal = has_decimal(one) != has_decimal(other)
    first, second = exact(one), exact(other)
    if first is not None and second is not None:
        if first == second or not decimal:
            return first == second
        return rounds(first, second) if has_decimal(one) else rounds(second, first)
    if not decimal:
        verdict = _same_residues(one, other)
        if verdict is not None:
            return verdict
    return _same_floats(one, other, SAME_DECIMAL if decimal else None)


@lru_cache(maxsize=8192)
def exact(tree: Tree) -> Fraction | None:
    """The rational number that a tree stands for; None for anything else."""
    try:
        return _exact(tree)
    except (NotRational, Unsupported, *_FAILURES):
        return None


def has_decimal(tree: Tree) -> bool:
    """Whether a decimal occurs, which may be a rounded value."""
    return tree[0] == "decimal" or any(
        has_decimal(part) for part in tree[1:] if isinstance(part, tuple)
    )


def has_names(tree: Tree) -> bool:
    """Whether a variable occurs."""
    return tree[0] == "name" or any(has_names(part) for part in tree[1:] if isinstance(part, tuple))


@lru_cache(maxsize=1024)
def _rounds_off(tree: Tree) -> bool:
    """Whether whole numbers are made of others, which small ones do not tell apart."""
    return tree[:2] in (("call", "floor"), ("call", "ceil")) or any(
        _rounds_off(part) for part in tree[1:] if isinstance(part, tuple)
    )


def number(tree: Tree) -> Any:
    """The value of a constant: a Fraction where it is rational, else a float of `DIGITS` digits.

    Raises:
        Unsupported: If it is no real constant.
    """
    value = exact(tree)
    if value is not None:
        return value
    if has_names(tree):
        raise Unsupported("no constant")
    value = evaluate(tree)
    if mp.im(value):
        raise Unsupported("not real")
    return mp.re(value)


def evaluate(tree: Tree, point: int = 0, digits: int = DIGITS) -> Any:
    """The value of a tree in floating point, every variable at its value of that point.

    Raises:
        Unsupported: If it has no value there or cannot be computed quickly.
    """
    return _measured(tree, point, digits)[0]


def _exact(tree: Tree) -> Fraction:
    kind = tree[0]
    if kind in ("number", "decimal"):
        return tree[1]
    if kind in ("name", "constant"):
        raise NotRational
    if kind == "-":
        return -_exact(tree[1])
    if kind == "root":
        return _exact_root(_exact(tree[1]), _exact(tree[2]))
    if kind == "call":
        rounding = {"abs": abs, "floor": lambda v: Fraction(v // 1), "ceil": lambda v: -(-v // 1)}
        if tree[1] not in rounding:
            raise NotRational
        return Fraction(rounding[tree[1]](_exact(tree[2])))
    if kind == "log":
        return _exact_log(_exact(tree[1]), _exact(tree[2]))
    parts = [_exact(part) for part in tree[1:]]
    value = _COMBINED[kind](*parts)
    if value.numerator.bit_length() + value.denominator.bit_length() > MOST_BITS:
        raise NotRational
    return value


def _exact_power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        return _exact_power(_exact_root(base, Fraction(exponent.denominator)),
                            Fraction(exponent.numerator))  # fmt: skip
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(base) != 1 and size * abs(exponent) > MOST_BITS:
        raise NotRational
    return base ** int(exponent)


def _exact_root(value: Fraction, degree: Fraction) -> Fraction:
    if degree.denominator != 1 or not 2 <= degree <= 64 or value < 0:
        raise NotRational
    found = Fraction(_integer_root(value.numerator, int(degree)),
                     _integer_root(value.denominator, int(degree)))  # fmt: skip
    if found**degree != value:
        raise NotRational
    return found


def _integer_root(value: int, degree: int) -> int:
    low, high = 0, 1 << (value.bit_length() // degree + 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**degree <= value else (low, middle - 1)
    return low


def _exact_log(base: Fraction, value: Fraction) -> Fraction:
    if base <= 1 or value <= 0 or base.denominator != 1:
        raise NotRational
    sign, target = (1, value) if value >= 1 else (-1, 1 / value)
    power, count = Fraction(1), 0
    while power < target and count < 10_000:
        power, count = power * base, count + 1
    if power != target:
        raise NotRational
    return Fraction(sign * count)


def _exact_factorial(value: Fraction) -> Fraction:
    if value.denominator != 1 or not 0 <= value <= 5_000:
        raise NotRational
    result = 1
    for factor in range(2, int(value) + 1):
        result *= factor
    return Fraction(result)


def _exact_binomial(n: Fraction, k: Fraction) -> Fraction:
    if n.denominator != 1 or k.denominator != 1 or not 0 <= k <= n <= 5_000:
        raise NotRational
    from math import comb

    return Fraction(comb(int(n), int(k)))


_COMBINED: dict[str, Callable[..., Fraction]] = {
    "+": lambda a, b: a + b, "*": lambda a, b: a * b, "/": lambda a, b: a / b,
    "^": _exact_power, "!": _exact_factorial, "binom": _exact_binomial,
}  # fmt: skip


def _same_residues(one: Tree, other: Tree) -> bool | None:
    """Whether two rational functions agree modulo the primes; None where one is not such."""
    try:
        for prime in PRIMES:
            if _residue(one, prime) != _residue(other, prime):
                return False
    except (NotRational, Unsupported, *_FAILURES):
        return None
    return True


def _residue(tree: Tree, prime: int) -> int:
    kind = tree[0]
    if kind in ("number", "decimal"):
        return tree[1].numerator * pow(tree[1].denominator, -1, prime) % prime
    if kind == "name":
        return _draw(tree[1], prime) % prime
    if kind == "^":
        exponent = _exact(tree[2])
        if exponent.denominator != 1:
            raise NotRational
        return pow(_residue(tree[1], prime), int(exponent), prime)
    if kind == "!":
        return _residue_factorial(_exact(tree[1]), prime)
    if kind in ("constant", "call", "root", "log"):
        value = exact(tree)
        if value is None:
            raise NotRational
        return value.numerator * pow(value.denominator, -1, prime) % prime
    if kind == "binom":
        n, k = _exact(tree[1]), _exact(tree[2])
        below = _residue_factorial(k, prime) * _residue_factorial(n - k, prime)
        return _residue_factorial(n, prime) * pow(below, -1, prime) % prime
    parts = [_residue(part, prime) for part in tree[1:]]
    if kind == "-":
        return -parts[0] % prime
    if kind == "/":
        return parts[0] * pow(parts[1], -1, prime) % prime
    return (parts[0] + parts[1] if kind == "+" else parts[0] * parts[1]) % prime


def _residue_factorial(value: Fraction, prime: int) -> int:
    if value.denominator != 1 or not 0 <= value <= LARGEST_FACTORIAL:
        raise NotRational
    result = 1
    for factor in range(2, int(value) + 1):
        result = result * factor % prime
    return result


def _draw(name: str, seed: int) -> int:
    return int.from_bytes(blake2b(f"{name}|{seed}".encode(), digest_size=32).digest(), "big")


def _same_floats(one: Tree, other: Tree, near: float | None) -> bool:
    wide = _rounds_off(one) or _rounds_off(other)
    for point in range(POINTS):
        digits = DIGITS
        while True:
            first, lowest, highest = _measured(one, point, digits, wide)
            second, low, high = _measured(other, point, digits, wide)
            with mp.workdps(digits):
                tight = mp.mpf(10) ** (ROUNDED - digits)
                if not _close(first, second, near or tight):
                    return False
            # Parts of very different size may hide in one another: then more digits decide.
            apart = max(highest, high) - min(lowest, low)
            if near or DIGITS + apart <= digits + LITTLE:
                break
            digits = DIGITS + apart
            if digits > MOST_DIGITS:
                raise Unsupported("parts of too different size")
    return True


def _measured(tree: Tree, point: int, digits: int, wide: bool = False) -> tuple[Any, int, int]:
    """A value, with the smallest and largest order of magnitude among its parts."""
    floats = _Floats(point, wide)
    with mp.workdps(digits):
        try:
            value = floats.value(tree)
        except _FAILURES as error:
            raise Unsupported(str(error)) from error
        if mp.isnan(value):
            raise Unsupported("no value")
    return value, floats.lowest, floats.highest


def _close(one: Any, other: Any, near: Any) -> bool:
    if mp.isinf(one) or mp.isinf(other):
        return one == other
    return abs(one - other) <= near * max(abs(one), abs(other))


class _Floats:
    """Computes a tree at one point and notes the orders of magnitude of its parts."""

    def __init__(self, point: int, wide: bool = False):
        self.point = point
        self.start, self.width = (mp.mpf(10), 30) if wide else (mp.mpf("0.5"), 2)
        self.lowest = self.highest = 0

    def value(self, tree: Tree) -> Any:
        value = self._value(tree)
        if value and mp.isfinite(value):
            order = int(mp.log10(abs(value))) if not isinstance(value, int) else 0
            self.lowest, self.highest = min(self.lowest, order), max(self.highest, order)
        return value

    def _value(self, tree: Tree) -> Any:
        kind = tree[0]
        if kind in ("number", "decimal"):
            return mp.mpf(tree[1].numerator) / tree[1].denominator
        if kind == "name":
            return self.start + self.width * mp.mpf(_draw(tree[1], self.point)) / 2**256
        if kind == "constant":
            return {"pi": +mp.pi, "e": +mp.e, "i": mp.mpc(0, 1), "infty": mp.inf}[tree[1]]
        if kind == "call":
            return self._call(tree[1], self.value(tree[2]))
        parts = [self.value(part) for part in tree[1:]]
        if kind == "-":
            return -parts[0]
        return getattr(self, _METHODS[kind])(*parts)

    def _call(self, name: str, value: Any) -> Any:
        if name in ("sin", "cos", "tan", "sec", "csc", "cot", "exp") and abs(value) > 10**6:
            raise Unsupported("too far out")
        if name in ("floor", "ceil"):
            near = mp.nint(mp.re(value))
            if abs(value - near) < mp.mpf(10) ** -20:
                return near
        return _FLOATS[name](value)

    def add(self, one: Any, other: Any) -> Any:
        value = one + other
        # What cancels to rounding alone is nothing.
        most = max(abs(one), abs(other))
        return mp.mpf(0) if mp.isfinite(most) and abs(value) < most * mp.eps * 64 else value

    def multiply(self, one: Any, other: Any) -> Any:
        return one * other

    def divide(self, one: Any, other: Any) -> Any:
        return one / other

    def power(self, base: Any, exponent: Any) -> Any:
        if not mp.isfinite(exponent) or abs(exponent) > LARGEST_POWER:
            raise Unsupported("the power is too large")
        return mp.power(base, exponent)

    def factorial(self, value: Any) -> Any:
        if abs(value) > LARGEST_POWER:
            raise Unsupported("the factorial is too large")
        return mp.factorial(value)

    def binomial(self, n: Any, k: Any) -> Any:
        if max(abs(n), abs(k)) > LARGEST_POWER:
            raise Unsupported("the binomial is too large")
        return mp.binomial(n, k)

    def root(self, value: Any, degree: Any) -> Any:
        if degree == 2:
            return mp.sqrt(value)
        if abs(degree) > LARGEST_POWER:
            raise Unsupported("the root is too large")
        odd = degree == int(mp.re(degree)) and int(mp.re(degree)) % 2
        negative = not mp.im(value) and mp.re(value) < 0
        return -mp.power(-value, 1 / degree) if odd and negative else mp.power(value, 1 / degree)

    def log(self, base: Any, value: Any) -> Any:
        return mp.log(value) / mp.log(base)


_METHODS = {"+": "add", "*": "multiply", "/": "divide", "^": "power", "!": "factorial",
            "binom": "binomial", "root": "root", "log": "log"}  # fmt: skip
