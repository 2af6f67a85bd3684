"""Formulas of `maths` as methods: their tensors come from the batch, the rest are settings."""

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from torch import Tensor

from rllib_distrl.method.batch import SequenceBatch

_F = TypeVar("_F", bound=Callable[..., Any])
# What a formula may ask for by the name of its parameter. Not ``k``: that is also best of k.
_OF_BATCH = {field.name for field in fields(SequenceBatch)} | {"returns", "lengths"}
_OF_BATCH -= {"k", "extras", "metrics", "memory"}
_MAY_BE_NONE = {"generator", "width", "all_reduce", "all_gather", "returns", "lengths"}
# A parameter's name to what the registry calls that need.
_NEEDS = {name: name for name in ("entropy", "ref_logp", "quantiles", "values")}
_NEEDS["group"] = "groups"


def of_batch(
    formula: Callable[..., Tensor],
    *,
    given: Collection[str] = (),
    renamed: Mapping[str, str] | None = None,
    without: Collection[str] = (),
    per_row: bool = False,
) -> Callable[..., Tensor]:
    """The formula as a function of (given tensors, batch, settings), for `register`.

    A parameter that bears the name of a column of `SequenceBatch` (or of ``all_reduce``,
    ``generator``, ``width``) is taken from there. All others are settings, with the formula's own
    types, defaults and docstring.

    Args:
        formula: Torch in, torch out.
        given: Parameters that the caller passes before the batch, such as ``logp``.
        renamed: A parameter to the name of its setting.
        without: Parameters that stay at their defaults.
        per_row: Whether the formula gives (B,), which then stands at each token of its row.

    Returns:
        A function to register; its attribute ``needs`` says what it reads beyond the basics.
    """
    renamed = dict(renamed or {})
    parameters = inspect.signature(formula, eval_str=True).parameters
    columns = [name for name in parameters if name in _OF_BATCH and name not in (*given, *without)]
    settings = {
        renamed.get(name, name): parameter
        for name, parameter in parameters.items()
        if name not in (*columns, *given, *without)
    }
    names = {shown: parameter.name for shown, parameter in settings.items()}

    @functools.wraps(formula)
    def method(*data: Any, **chosen: Any) -> Tensor:
        *tensors, batch = data
        found = formula(
            **dict(zip(given, tensors, strict=True)),
            **{name: _read(batch, name) for name in columns},
            **{names[shown]: value for shown, value in chosen.items()},
        )
        return batch.at_tokens(found) if per_row else found

    data = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        for name in (*given, "batch")
    ]
    keywords = [
        parameter.replace(name=shown, kind=inspect.Parameter.KEYWORD_ONLY)
        for shown, parameter in settings.items()
    ]
    method.__signature__ = inspect.Signature([*data, *keywords])  # type: ignore[attr-defined]
    method.needs = {_NEEDS[name] for name in columns if name in _NEEDS}  # type: ignore[attr-defined]
    return method


def _read(batch: SequenceBatch, name: str) -> Any:
    return getattr(batch, name) if name in _MAY_BE_NONE else batch.column(name)


def takes_settings_of(
    formula: Callable[..., Any], *, without: Collection[str] = ()
) -> Callable[[_F], _F]:
    """Decorator of a function whose ``**settings`` are passed on to a formula.

    Args:
        formula: Whose keyword-only parameters the function has, beside its own.
        without: Parameters that the function itself gives, beside those of the batch.
    """

    def decorate(function: _F) -> _F:
        own = inspect.signature(function, eval_str=True).parameters.values()
        further = [
            parameter
            for name, parameter in inspect.signature(formula, eval_str=True).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
            and name not in (*_OF_BATCH, *without)
        ]
        kept = [each for each in own if each.kind is not inspect.Parameter.VAR_KEYWORD]
        signature = inspect.Signature([*kept, *further])
        function.__signature__ = signature  # type: ignore[attr-defined]
        return function

    return decorate
