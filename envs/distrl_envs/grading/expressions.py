r"""Formulas as trees: a reader of normalised LaTeX that understands a text in full or not at all.

A tree is a nested tuple whose first item names its kind:
`("number", Fraction)`, `("decimal", Fraction)`, `("name", str)`, `("constant", str)`,
`("+", a, b)`, `("*", a, b)`, `("/", a, b)`, `("^", a, b)`, `("-", a)`, `("!", a)`,
`("call", function, a)`, `("root", a, degree)`, `("log", base, a)`, `("binom", n, k)`.
Whatever this grammar does not cover raises `Unsupported`: it is never read in part.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from typing import Any

from distrl_envs.grading.normal_form import words

Tree = tuple[Any, ...]

LONGEST = 4_000
DEEPEST = 60
MOST_DIGITS = 4_000
"""Python refuses to read integers that are longer than about this."""
FUNCTIONS = frozenset(
    words(r"""\sin \cos \tan \cot \sec \csc \arcsin \arccos \arctan \sinh \cosh \tanh \ln \exp""")
)
CONSTANTS = {"\\pi": "pi", "e": "e", "i": "i", "\\infty": "infty"}
GREEK = frozenset(
    words(
        r"""\alpha \beta \gamma \delta \epsilon \zeta \eta \theta \kappa \lambda \mu \nu \xi \rho
        \sigma \tau \phi \chi \psi \omega \Gamma \Delta \Theta \Lambda \Sigma \Phi \Psi \Omega
        \hbar \ell \odot \unitvectori \unitvectorj \unitvectork"""
    )
)
ACCENTS = frozenset(words(r"""\dot \ddot \bar \overline \hat \vec \tilde \widehat"""))
PAIRS = {"(": ")", "{": "}", "[": "]"}
ROUNDED_BRACKETS = {"\\lfloor": ("\\rfloor", "floor"), "\\lceil": ("\\rceil", "ceil")}
_STOPS = frozenset(["", "+", "-", ")", "}", "]", "*", "/", "!", "|", "\\rfloor", "\\rceil",
                    "\\choose", "\\over", "\\dots"])  # fmt: skip
_SPLITTERS = {"\\choose": "binom", "\\over": "/"}
_TOKEN = re.compile(
    r"(?:\d{1,3}(?: \d{3})+|\d+)(?:\.\d+|\.(?!\.))?(?:[eE][-+]?\d+(?![\d.A-Za-z]))?"
    r"|\.\d+(?:[eE][-+]?\d+)?|\\text\{[^{}]*\}|\\[A-Za-z]+|[A-Za-z]'*|[-+*/^_!(){}\[\]|]| "
)
_PLAIN_LETTER = re.compile(r"\\text\{([A-Za-z])\}")
_INDEX = re.compile(r"\\text\{[\w ]+\}|[\w'\\*+-]+")


class Unsupported(Exception):
    """The text is outside the grammar, or its value cannot be computed quickly."""


@lru_cache(maxsize=8192)
def read_expression(text: str) -> Tree:
    """The tree of a normalised formula.

    Raises:
        Unsupported: If the text is not understood in full.
    """
    if len(text) > LONGEST:
        raise Unsupported("too long")
    try:
        reader = _Reader(text)
        tree = reader.sum()
    except (ArithmeticError, ValueError, RecursionError) as error:
        raise Unsupported(str(error)) from error
    if reader.peek():
        raise Unsupported(f"cannot read on from {reader.peek()!r}")
    return tree


def number_tree(text: str) -> Tree:
    """The leaf of a number that is written out with digits, a point and an exponent."""
    if len(text) > MOST_DIGITS:
        raise Unsupported("too many digits")
    mantissa, _, exponent = text.replace(" ", "").lower().partition("e")
    if len(exponent) > 4:
        raise Unsupported("the exponent is too large")
    value = Fraction(mantissa) * Fraction(10) ** int(exponent or 0)
    return ("decimal" if "." in mantissa or exponent else "number", value)


class _Reader:
    def __init__(self, text: str):
        self.tokens: list[str] = []
        self.spaced: list[bool] = []
        self.at = 0
        self.depth = 0
        end, blank = 0, False
        for match in _TOKEN.finditer(text):
            if match.start() != end:
                break
            end = match.end()
            if match.group() == " ":
                blank = True
                continue
            letter = _PLAIN_LETTER.fullmatch(match.group())
            self.tokens.append(letter[1] if letter else match.group())
            self.spaced.append(blank)
            blank = False
        if end != len(text) or not self.tokens:
            raise Unsupported(f"cannot read {text[end : end + 10]!r}")

    def peek(self, ahead: int = 0) -> str:
        return self.tokens[self.at + ahead] if self.at + ahead < len(self.tokens) else ""

    def take(self, expected: str | None = None) -> str:
        token = self.peek()
        if not token or (expected is not None and token != expected):
            raise Unsupported(f"expected {expected or 'more'}, got {token!r}")
        self.at += 1
        return token

    def sum(self) -> Tree:
        self.depth += 1
        if self.depth > DEEPEST:
            raise Unsupported("nested too deeply")
        terms = [self.product()]
        while self.peek() in ("+", "-"):
            sign = self.take()
            if sign == "+" and self.peek() == "\\dots":
                self.take()
                self.take("+")
                terms = [_arithmetic_series(terms, self.product())]
                continue
            term = self.product()
            terms.append(term if sign == "+" else ("-", term))
        self.depth -= 1
        tree = terms[0]
        for term in terms[1:]:
            tree = ("+", tree, term)
        if self.peek() in _SPLITTERS:
            return (_SPLITTERS[self.take()], tree, self.sum())
        return tree

    def product(self) -> Tree:
        value = self.signed()
        while True:
            token = self.peek()
            if token in ("*", "/"):
                self.take()
                value = (token, value, self.signed())
            elif token not in _STOPS and self._may_follow(token):
                value = ("*", value, self.power())
            else:
                return value

    def _may_follow(self, token: str) -> bool:
        if token[0].isdigit() or token[0] == ".":
            # No product is written so: two numbers in a row, or a name such as F3.
            raise Unsupported("a number after a factor")
        return True

    def signed(self) -> Tree:
        if self.peek() in ("+", "-"):
            return ("-", self.signed()) if self.take() == "-" else self.signed()
        return self.power()

    def power(self) -> Tree:
        base = self.factorials(self.atom())
        if self.peek() != "^":
            return base
        self.take()
        if self.peek() == "\\circ":
            raise Unsupported("an angle")
        return self.factorials(("^", base, self.script()))

    def factorials(self, value: Tree) -> Tree:
        while self.peek() == "!":
            self.take()
            if self.peek() == "!":
                raise Unsupported("a double factorial")
            value = ("!", value)
        return value

    def script(self) -> Tree:
        """What stands after ^: a group, or a single symbol with its sign."""
        if self.peek() == "{":
            return self.group("{", "}")
        if self.peek() in ("-", "+"):
            return ("-", self.script()) if self.take() == "-" else self.script()
        return self.factorials(self.atom())

    def group(self, opening: str, closing: str) -> Tree:
        self.take(opening)
        value = self.sum()
        self.take(closing)
        return value

    def atom(self) -> Tree:
        token = self.peek()
        if token in PAIRS:
            return self.group(token, PAIRS[token])
        if token == "|":
            return ("call", "abs", self.group("|", "|"))
        self.take()
        if token[0].isdigit() or token[0] == ".":
            return self.number(token)
        if token in ROUNDED_BRACKETS:
            closing, name = ROUNDED_BRACKETS[token]
            value = self.sum()
            self.take(closing)
            return ("call", name, value)
        if token in FUNCTIONS:
            return self.function(token)
        special = {"\\frac": self.frac, "\\sqrt": self.sqrt, "\\log": self.log}.get(token)
        if special is not None:
            return special()
        if token == "\\binom":
            return ("binom", self.argument_group(), self.argument_group())
        if token in CONSTANTS and self.peek() not in ("_", "'"):
            return ("constant", CONSTANTS[token])
        if token[0].isalpha() or token in GREEK or token in ACCENTS:
            return self.name(token)
        raise Unsupported(f"unknown {token!r}")

    def number(self, token: str) -> Tree:
        if self.peek() == "_":
            raise Unsupported("a number with an index")
        if self.peek() in ("\\overline", "\\bar", "\\dot") and "." in token:
            self.take()
            return self.repeating(token, self.digits_group())
        if token.endswith(".") and self.peek() == "(":
            return self.repeating(token, self.digits_group())  # 0.(6), where no factor can follow.
        if self.peek() == "\\dots" and "." in token:
            self.take()
            return _continued(token)
        value = number_tree(token)
        if value[0] == "number" and (fraction := self.mixed()):
            return ("+", value, fraction)
        return value

    def digits_group(self) -> str:
        grouped = self.peek() in ("{", "(") and PAIRS[self.take()]
        digits = self.take()
        if grouped:
            self.take(grouped)
        if not digits.isdigit():
            raise Unsupported("no digits to repeat")
        return digits

    def repeating(self, start: str, period: str) -> Tree:
        r"""0.1\overline{6}: the digits under the bar repeat for ever."""
        whole, _, fixed = start.partition(".")
        shift = 10 ** len(fixed)
        repeated = Fraction(int(period), (10 ** len(period) - 1) * shift)
        return ("number", Fraction(int(whole + fixed or 0), shift) + repeated)

    def mixed(self) -> Tree | None:
        r"""The fraction of a mixed number, as in 3 1/2 or 3\frac{1}{2}; None where none follows."""
        ahead = [self.peek(n) for n in range(7)]
        if ahead[0] == "\\frac" and [ahead[n] for n in (1, 3, 4, 6)] == ["{", "}", "{", "}"]:
            above, below, taken = ahead[2], ahead[5], 7
        elif ahead[1] == "/" and self.at < len(self.tokens) and self.spaced[self.at]:
            above, below, taken = ahead[0], ahead[2], 3
        else:
            return None
        if not (above.isdigit() and below.isdigit()) or len(above + below) > MOST_DIGITS:
            return None
        self.at += taken
        return ("number", Fraction(int(above), int(below)))

    def name(self, token: str) -> Tree:
        if token in ACCENTS:
            token += " " + (self.index() if self.peek() == "{" else self.take())
        if self.peek() == "_":
            self.take()
            token += "_" + self.index()
        if self.peek() == "^" and self.peek(1) == "{" and set(self.peek(2)) == {"'"}:
            raise Unsupported("a prime in an exponent")
        if [self.peek(), self.peek(2)] == ["(", ")"] and self.peek(1).isdigit():
            # I(0) is a value of I, no product.
            token += f"({self.peek(1)})"
            self.at += 3
        return ("name", token)

    def index(self) -> str:
        if self.peek() != "{":
            return self.take()
        self.take()
        inside = []
        while self.peek() != "}":
            if not _INDEX.fullmatch(self.peek()):
                raise Unsupported("an index that is no name")
            inside.append(self.take())
        self.take("}")
        return "".join(inside)

    def function(self, name: str) -> Tree:
        exponent = None
        if self.peek() == "^":
            self.take()
            exponent = self.script()
            if exponent == ("-", ("number", Fraction(1))):
                raise Unsupported("an inverse function")
        value = ("call", name[1:], self.argument())
        return value if exponent is None else ("^", value, exponent)

    def argument(self) -> Tree:
        """A group, or the factors up to the next operator or function, as in sin 2x."""
        if self.peek() in PAIRS:
            return self.atom()
        value = self.signed() if self.peek() == "-" else self.power()
        while self.peek() not in _STOPS | {"(", "\\log", *FUNCTIONS}:
            self._may_follow(self.peek())
            value = ("*", value, self.power())
        return value

    def argument_group(self) -> Tree:
        if self.peek() == "{":
            return self.group("{", "}")
        token = self.peek()
        if token.isdigit() and len(token) > 1:
            # \frac12 takes a digit at a time.
            self.tokens[self.at] = token[1:]
            return number_tree(token[0])
        return self.atom()

    def frac(self) -> Tree:
        above = self.argument_group()
        return ("/", above, self.argument_group())

    def sqrt(self) -> Tree:
        degree: Tree = ("number", Fraction(2))
        if self.peek() == "[":
            degree = self.group("[", "]")
        return ("root", self.argument_group(), degree)

    def log(self) -> Tree:
        base: Tree = ("number", Fraction(10))
        if self.peek() == "_":
            self.take()
            base = self.script_index()
        tree = self.function("\\log")
        if tree[0] == "^":
            return ("^", ("log", base, tree[1][2]), tree[2])
        return ("log", base, tree[2])

    def script_index(self) -> Tree:
        return self.group("{", "}") if self.peek() == "{" else self.atom()


def _continued(token: str) -> Tree:
    r"""0.333\dots, where the digits show at least twice, and three digits long, what repeats."""
    whole, _, digits = token.partition(".")
    for start in range(len(digits)):
        tail = digits[start:]
        for length in range(1, len(tail) // 2 + 1):
            repeated = tail[:length] * (len(tail) // length + 1)
            if len(tail) >= max(3, 2 * length) and repeated.startswith(tail):
                shift = 10**start
                value = Fraction(int(tail[:length]), (10**length - 1) * shift)
                return ("number", Fraction(int((whole or "0") + digits[:start]), shift) + value)
    raise Unsupported("digits that go on unknown")


def _arithmetic_series(terms: list[Tree], last: Tree) -> Tree:
    """The sum of an arithmetic progression whose first terms are numbers: a + b + … + last."""
    values = [term[1] for term in terms if term[0] == "number"]
    if len(values) != len(terms) or len(values) < 2:
        raise Unsupported("a sum with an unknown middle")
    step = values[1] - values[0]
    if not step or any(b - a != step for a, b in pairwise(values)):
        raise Unsupported("no arithmetic progression")
    first = ("number", values[0])
    span = ("/", ("+", last, ("-", first)), ("number", step))
    count = ("+", span, ("number", Fraction(1)))
    return ("/", ("*", ("+", first, last), count), ("number", Fraction(2)))
