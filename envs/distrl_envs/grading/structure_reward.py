"""A reward for structured output: does it parse, fit the schema, say what is true, and no more."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

WEIGHTS = {"parse": 0.1, "schema": 0.2, "content": 0.6, "validity": 0.1}


class Structure(NamedTuple):
    """The checks of a text, each in [0, 1].

    Attributes:
        parse: Whether there is a JSON object.
        schema: Fields that are there with their type, as a share of all that should or do stand.
        content: Share of the fields that have the right value.
        validity: Whether the text is the object alone: nothing around it, no key twice, no NaN.
        found: The object, or None.
    """

    parse: float
    schema: float
    content: float
    validity: float
    found: dict[str, Any] | None

    def reward(self, weights: Mapping[str, float]) -> float:
        """Σ w check / Σ w, in [0, 1]; `checked_weights` makes the weights."""
        return sum(w * getattr(self, name) for name, w in weights.items()) / sum(weights.values())


def structure_of(text: str, expected: Mapping[str, Any]) -> Structure:
    """Checks a text against the object that it should be.

    After RL-Struct's multi-part reward, whose parts are named as its; how each is measured is our
    choice. Any text is gradable: what does not parse gets 0 everywhere.

    Args:
        text: Of the model.
        expected: Fields and right values; a value's type is its field's.
    """
    whole = text.strip()
    strict, found = _load(whole, strict=True), _load(whole, strict=False)
    if found is None:
        first, last = whole.find("{"), whole.rfind("}")
        found = _load(whole[first : last + 1], strict=False) if 0 <= first < last else None
    if found is None:
        return Structure(0.0, 0.0, 0.0, 0.0, None)
    typed = [name for name, value in expected.items() if type(found.get(name)) is type(value)]
    right = [name for name in typed if found[name] == expected[name]]
    everything = len(expected.keys() | found.keys())
    return Structure(
        1.0, len(typed) / everything, len(right) / len(expected), float(strict is not None), found
    )


def checked_weights(weights: Mapping[str, float] | None) -> dict[str, float]:
    """The weights of the checks, `WEIGHTS` (our choice) where none are given.

    Raises:
        ValueError: For an unknown check, a negative weight, or none above 0.
    """
    chosen = dict(WEIGHTS if weights is None else weights)
    if unknown := sorted(chosen.keys() - WEIGHTS.keys()):
        raise ValueError(f"Got a weight of {unknown[0]!r}; the checks are {', '.join(WEIGHTS)}.")
    if not chosen or min(chosen.values()) < 0 or not sum(chosen.values()) > 0:
        raise ValueError(f"Got weights {chosen}; they must be >= 0, and one of them above 0.")
    return {name: float(weight) for name, weight in chosen.items()}


def _load(text: str, *, strict: bool) -> dict[str, Any] | None:
    """The object that a text is; a strict one has no key twice and no NaN."""
    hooks: dict[str, Any] = {"object_pairs_hook": _once, "parse_constant": _refuse}
    try:
        found = json.loads(text, **(hooks if strict else {}))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
