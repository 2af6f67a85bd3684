"""Whether two answers say the same: by kinds, exactly; what is not understood is not equal.

`compare` and `same` answer True, False, or None for "not decided here", which computer algebra may
decide. `gold` is the trusted side: it alone may say more than the answer must repeat.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from mpmath import mp

from distrl_envs.grading import values
from distrl_envs.grading.expressions import Tree, Unsupported, read_expression
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
from distrl_envs.grading.real_sets import FLIPPED, INFINITE, equal_ends, flat, intervals
from distrl_envs.grading.structures import MOST_PARTS, SYNONYMS, decides, read

Verdict = bool | None
_COMMUTING = frozenset("abcxyz")
"""Letters of which two or three in a row are a product in any order, and no word (our choice)."""
_PI = ("constant", "pi")


def compare(gold: str, answer: str) -> Verdict:
    """Whether two normalised answers mean the same, None where computer algebra must decide."""
    if gold == answer:
        return True
    if "," in answer and re.fullmatch(r"-?\d+,\d{1,2}", answer):
        # A decimal comma, as much of the world writes it, or a list of two.
        if same(read(gold), read(answer.replace(",", "."))):
            return True
    elif re.fullmatch(r"-?\d+,\d{1,2}", gold) and same(read(gold.replace(",", ".")), read(answer)):
        return True
    return same(read(gold), read(answer))


def same(gold: Any, answer: Any) -> Verdict:
    """Whether two things that were read are the same."""
    if gold == answer:
        return True
    if isinstance(gold, Alternatives):
        verdicts = [same(part, answer) for part in (*gold.parts, Members(gold.parts))]
        return True if True in verdicts else None if None in verdicts else False
    try:
        for one, other, rule in _RULES:
            if isinstance(gold, one) and isinstance(answer, other):
                verdict = rule(gold, answer)
            elif isinstance(gold, other) and isinstance(answer, one) and one is not other:
                verdict = rule(answer, gold) if rule not in _GOLD_FIRST else NotImplemented
            else:
                continue
            if verdict is not NotImplemented:
                return verdict
    except Unsupported:
        return None
    return None if isinstance(gold, Unknown) or isinstance(answer, Unknown) else False


def _trees(gold: Tree, answer: Tree) -> bool:
    return values.same_tree(gold, answer)


def _values(gold: Value, answer: Value) -> Verdict:
    if _trees(gold.tree, answer.tree):
        return True
    # 1k is a thousand where no k is spoken of.
    for one, other in ((gold, answer), (answer, gold)):
        if one.tree[0] == "*" and one.tree[2] == ("name", "k") and not values.has_names(other.tree):
            return _trees(("*", one.tree[1], ("number", Fraction(1000))), other.tree)
    return False


def _quantities(gold: Quantity, answer: Quantity) -> Verdict:
    if gold.dimension and answer.dimension and gold.dimension != answer.dimension:
        angles = {gold.dimension, answer.dimension}
        if angles == {(("degree", 1),), (("rad", 1),)}:
            return _trees(*(_in_radians(one) for one in (gold, answer)))
        return False
    return _trees(_in_si(gold), _in_si(answer))


def _quantity_and_value(quantity: Quantity, value: Value) -> Verdict:
    return quantity.single and _trees(quantity.tree, value.tree)


def _value_and_angle(gold: Value, answer: Quantity) -> Verdict:
    """An answer in degrees is right where the gold is in radians; who asks for degrees says so."""
    if answer.dimension != (("degree", 1),):
        return NotImplemented
    return _trees(gold.tree, answer.tree) or _trees(gold.tree, _in_radians(answer))


def _in_si(quantity: Quantity) -> Tree:
    return ("*", quantity.tree, ("number", quantity.factor))


def _in_radians(quantity: Quantity) -> Tree:
    if quantity.dimension == (("rad", 1),):
        return quantity.tree
    return ("/", ("*", _in_si(quantity), _PI), ("number", Fraction(180)))


def _percents(gold: Percent, answer: Percent) -> Verdict:
    return _trees(gold.tree, answer.tree)


def _percent_and_value(percent: Percent, value: Value) -> Verdict:
    """A percent sign is read either way: the figure, or the share."""
    share = ("/", percent.tree, ("number", Fraction(100)))
    return _trees(percent.tree, value.tree) or _trees(share, value.tree)


def _words(gold: Word, answer: Word) -> Verdict:
    one, other = (" ".join(re.findall(r"\w+", word.text.casefold())) for word in (gold, answer))
    if one == other or any(one in group and other in group for group in SYNONYMS):
        return True
    small = len(gold.text) <= 3 and set(gold.text) <= _COMMUTING
    return small and sorted(gold.text) == sorted(answer.text)


def _word_and_value(word: Word, value: Value) -> Verdict:
    """A product of letters, as abc for a b c."""
    if not word.text.isalpha() or not word.text.isascii() or len(word.text) > 4:
        return False
    return _trees(read_expression(word.text), value.tree)


def _synonyms(gold: Any, answer: Any) -> Verdict:
    texts = [getattr(node, "text", "").casefold() for node in (gold, answer)]
    return True if any(set(texts) <= group for group in SYNONYMS) else NotImplemented


def _choices(gold: Choice, answer: Choice) -> Verdict:
    return gold.letter == answer.letter


def _choice_and_other(gold: Any, answer: Any) -> Verdict:
    """(C) 12 beside 12: the value decides, where there is one."""
    choice, other = (gold, answer) if isinstance(gold, Choice) else (answer, gold)
    if choice.beside is not None:
        return same(choice.beside, other)
    if isinstance(other, Value) and other.tree[0] in ("name", "constant"):
        return other.tree[1] == choice.letter.lower() and choice is not gold
    return False


def _several_choices(word: Word, members: Members) -> Verdict:
    """AB beside A, B: several letters of a multiple choice."""
    letters = [part.letter for part in members.parts if isinstance(part, Choice)]
    if len(letters) != len(members.parts) or sorted(word.text) != list(word.text):
        return False
    return sorted(letters) == list(word.text)


def _members(gold: Any, answer: Any) -> Verdict:
    """The same members, in any order and however often each; names must agree where both name."""
    ours, theirs = flat(gold), flat(answer)
    if max(len(ours), len(theirs)) > MOST_PARTS:
        return False
    if any(isinstance(part, Ordered) for part in (*ours, *theirs)):
        ours, theirs = _as_tuples(ours), _as_tuples(theirs)
    verdicts = [[same(one, other) for other in theirs] for one in ours]
    lines = [*verdicts, *zip(*verdicts, strict=True)]
    if all(True in line for line in lines):
        return True
    return False if any(True not in line and None not in line for line in lines) else None


def _as_tuples(parts: list[Any]) -> list[Any]:
    """P = 5, q = 2, p = 7, q = 2 as the tuples of their values, in the order of the alphabet."""
    if not parts or not all(isinstance(part, Named) for part in parts):
        return parts
    names = list(dict.fromkeys(part.name for part in parts))
    if len(names) < 2 or len(parts) % len(names):
        return parts
    groups = [parts[n : n + len(names)] for n in range(0, len(parts), len(names))]
    if any([part.name for part in group] != names for group in groups):
        return parts
    order = sorted(range(len(names)), key=names.__getitem__)
    return [Ordered("()", 1, tuple(group[n].node for n in order)) for group in groups]


def _nameds(gold: Named, answer: Named) -> Verdict:
    if isinstance(gold.node, Members) or isinstance(answer.node, Members):
        return _members(gold, answer)
    if _owner(gold.name) == _owner(answer.name):
        return same(gold.node, _renamed(answer, gold.name))
    one, other = _as_equation(gold), _as_equation(answer)
    return False if one is None or other is None else _equations(one, other)


def _owner(name: str) -> str:
    return name.split("(")[0] or name


def _renamed(answer: Named, wanted: str) -> Any:
    """A function's value in the variable of another: f(n) = n is f(x) = x."""
    own, other = (re.fullmatch(r"[A-Za-z]\(([A-Za-z])\)", name) for name in (answer.name, wanted))
    if own is None or other is None or not isinstance(answer.node, Value):
        return answer.node
    return Value(_substituted(answer.node.tree, own[1], other[1]))


def _substituted(tree: Tree, name: str, other: str) -> Tree:
    if tree == ("name", name):
        return ("name", other)
    return tuple(
        _substituted(part, name, other) if isinstance(part, tuple) else part for part in tree
    )


def _as_equation(named: Named) -> Equation | None:
    """A named value as an equation, where both sides hold variables."""
    try:
        right = named.node
        tree = read_expression(right.text) if isinstance(right, Word) else right.tree
        return Equation(read_expression(named.name), tree) if values.has_names(tree) else None
    except AttributeError:
        return None
    except Unsupported:
        return None


def _named_and_other(named: Named, other: Any) -> Verdict:
    if isinstance(other, Equation):
        equation = _as_equation(named)
        return _equations(equation, other) if equation else False
    if isinstance(other, Relation) or isinstance(named.node, (Relation, Joined)):
        return _real_sets(named, other)
    return same(named.node, other)


def _equations(gold: Equation, answer: Equation) -> Verdict:
    """Multiples of one another by a number."""
    one, other = (("+", side.left, ("-", side.right)) for side in (gold, answer))
    factor = _ratio_at(one, other, 0)
    return None if factor is None else _proportional(one, other)


def _ratio_at(one: Tree, other: Tree, point: int) -> Any:
    first, second = (values.evaluate(tree, point) for tree in (one, other))
    return first / second if second else None


def _proportional(one: Tree, other: Tree, positive: bool = False) -> Verdict:
    ratios = [_ratio_at(one, other, point) for point in range(values.POINTS)]
    with mp.workdps(values.DIGITS):
        if any(ratio is None or not ratio or abs(ratio - ratios[0]) > 1e-20 * abs(ratios[0])
               for ratio in ratios):  # fmt: skip
            # Different multiples may still describe the same set: that is for computer algebra.
            return None
        return not positive or (not mp.im(ratios[0]) and mp.re(ratios[0]) > 0)


def _real_sets(gold: Any, answer: Any) -> Verdict:
    first, second = _variable(gold), _variable(answer)
    if first and second and first != second:
        return False
    one, other = intervals(gold), intervals(answer)
    if one is not None and other is not None:
        return len(one) == len(other) and all(
            a[1] == b[1] and a[3] == b[3] and equal_ends(a[0], b[0]) and equal_ends(a[2], b[2])
            for a, b in zip(one, other, strict=True)
        )
    if isinstance(gold, Relation) and isinstance(answer, Relation):
        return _relations(gold, answer)
    if isinstance(gold, Joined) and isinstance(answer, Joined) and gold.how == answer.how:
        return _members(Members(gold.parts), Members(answer.parts))
    return _open_sides(gold, answer)


def _variable(node: Any) -> str | None:
    if isinstance(node, Named):
        return node.name
    if isinstance(node, Joined):
        return next((found for part in node.parts if (found := _variable(part))), None)
    if isinstance(node, Relation):
        letters = [side for side in node.sides if re.fullmatch(r"[A-Za-z]", side)]
        return letters[0] if len(letters) == 1 else None
    return None


def _relations(gold: Relation, answer: Relation) -> Verdict:
    """Inequalities that are positive multiples of one another, side by side."""
    if len(gold.signs) != len(answer.signs):
        return None
    one, other = _towards_less(gold), _towards_less(answer)
    if one.signs != other.signs:
        return False
    for index in range(len(one.signs)):
        trees = [
            ("+", read_expression(node.sides[index]), ("-", read_expression(node.sides[index + 1])))
            for node in (one, other)
        ]
        if not _proportional(*trees, positive="\\ne" not in one.signs):
            return False if len(one.signs) == 1 else None
    return True


def _towards_less(node: Relation) -> Relation:
    if node.signs[0] in (">", "\\ge"):
        return Relation(node.sides[::-1], tuple(FLIPPED[sign] for sign in node.signs[::-1]))
    return node


def _open_sides(gold: Any, answer: Any) -> Verdict:
    """-2 < x < b beside (-2, b): ends that are formulas."""
    pair = [
        _formal_interval(node.node if isinstance(node, Named) else node) for node in (gold, answer)
    ]
    if None in pair:
        return None
    (kind, ends), (other, others) = pair  # type: ignore[misc]
    if kind != other:
        return False
    return all(same(a, b) for a, b in zip(ends, others, strict=True))


def _formal_interval(node: Any) -> tuple[str, tuple[Any, ...]] | None:
    if isinstance(node, Ordered) and len(node.parts) == 2:
        return node.kind, node.parts
    if not isinstance(node, Relation):
        return None
    node = _towards_less(node)
    brackets = ["[" if sign == "\\le" else "(" for sign in node.signs]
    if len(node.sides) == 3:
        return brackets[0] + _CLOSING[brackets[1]], (read(node.sides[0]), read(node.sides[2]))
    if re.fullmatch(r"[A-Za-z]", node.sides[0]):
        return "(" + _CLOSING[brackets[0]], (Value(INFINITE[1]), read(node.sides[1]))
    return brackets[0] + ")", (read(node.sides[0]), Value(INFINITE[0]))


_CLOSING = {"[": "]", "(": ")"}


def _ordereds(gold: Ordered, answer: Ordered) -> Verdict:
    """Member by member; a matrix of one row or column is also a tuple, a determinant is neither."""
    kinds = {gold.kind, answer.kind}
    if len(kinds) > 1 and kinds != {"pmatrix", "()"}:
        return False
    if len(kinds) == 1 and gold.rows != answer.rows:
        return False
    if (
        len(kinds) > 1
        and (max(gold.rows, answer.rows) > 1)
        and len(gold.parts) != max(gold.rows, answer.rows)
    ):
        return False
    if len(gold.parts) != len(answer.parts):
        return False
    verdicts = [same(a, b) for a, b in zip(gold.parts, answer.parts, strict=True)]
    return False if False in verdicts else None if None in verdicts else True


def _ratios(gold: Ratio, answer: Ratio) -> Verdict:
    if len(gold.parts) != len(answer.parts):
        return False
    return all(
        _trees(("*", a, answer.parts[0]), ("*", b, gold.parts[0]))
        for a, b in zip(gold.parts[1:], answer.parts[1:], strict=True)
    )


def _ratio_and_value(ratio: Ratio, value: Value) -> Verdict:
    """A : b is the fraction a/b, and no whole number."""
    found = values.exact(value.tree)
    if len(ratio.parts) != 2 or found is None or found.denominator == 1:
        return False
    return _trees(("/", ratio.parts[0], ratio.parts[1]), value.tree)


def _clocks(gold: Clock, answer: Clock) -> Verdict:
    times = [(clock.hours, clock.minutes, clock.seconds) for clock in (gold, answer)]
    return times[0] == times[1] and (not answer.half or not gold.half or gold.half == answer.half)


def _based_and_value(based: Based, value: Any) -> Verdict:
    """The problem names the base, so that an answer may leave it out; its digits decide."""
    text = value.text if isinstance(value, (Word, Unknown)) else ""
    if isinstance(value, Value) and value.tree[0] == "number":
        text = str(value.tree[1])
    return text == based.digits


def _congruents(gold: Congruent, answer: Congruent) -> Verdict:
    one, other = values.exact(gold.tree), values.exact(answer.tree)
    if gold.modulus != answer.modulus or one is None or other is None or not gold.modulus:
        return False
    return (one - other) % gold.modulus == 0


def _congruent_and_value(congruent: Congruent, value: Value) -> Verdict:
    return _trees(congruent.tree, value.tree)


def _remark_and_other(remark: Remark, other: Any) -> Verdict:
    """A gold may carry a note that changes nothing; a word that may change it must be repeated."""
    return False if decides(remark.text) else same(remark.node, other)


_RULES: tuple[tuple[Any, Any, Callable[[Any, Any], Verdict]], ...] = (
    (object, object, _synonyms),
    (Choice, Choice, _choices),
    (Choice, object, _choice_and_other),
    (Remark, object, _remark_and_other),
    (Word, Members, _several_choices),
    (Named, Named, _nameds),
    (Members, object, _members),
    (Named, object, _named_and_other),
    (Value, Value, _values),
    (Quantity, Quantity, _quantities),
    (Value, Quantity, _value_and_angle),
    (Quantity, Value, _quantity_and_value),
    (Percent, Percent, _percents),
    (Percent, Value, _percent_and_value),
    (Word, Word, _words),
    (Word, Value, _word_and_value),
    (Equation, Equation, _equations),
    (Relation, object, _real_sets),
    (Joined, object, _real_sets),
    (Word, Ordered, _real_sets),
    (Ordered, Ordered, _ordereds),
    (Ratio, Ratio, _ratios),
    (Ratio, Value, _ratio_and_value),
    (Clock, Clock, _clocks),
    (Based, object, _based_and_value),
    (Congruent, Congruent, _congruents),
    (Congruent, Value, _congruent_and_value),
)
_GOLD_FIRST = frozenset([_remark_and_other, _value_and_angle])
"""Rules that ask which side is the gold."""
