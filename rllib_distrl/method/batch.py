"""The batch that every stage works on: whole completions, one per row, right-padded."""

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from rllib_distrl.maths.laws import Law
from rllib_distrl.maths.statistics import AllReduce, identity, zero_padding

PROMPTS_REMEMBERED = 100_000


def forget_oldest(table: dict[int, Any]) -> None:
    """Keeps what came last of what a stage remembers of prompts: `PROMPTS_REMEMBERED` entries."""
    for prompt in list(table)[: max(0, len(table) - PROMPTS_REMEMBERED)]:
        del table[prompt]


@dataclass
class SequenceBatch:
    """B completions of up to T tokens; padding may hold anything, NaN included.

    Attributes:
        rewards: (B, T), reward of each token.
        loss_mask: (B, T), bool, True at the completion's tokens: a prefix of each row.
        action_logp: (B, T), log-probability of each token under what sampled it.
        group: (B,), int64, equal for completions of one prompt; groups are never split.
        values: (B, T), read-out of the quantiles (or the scalar critic) before token t.
        quantiles: (B, T, N), of the critic's law before token t, without gradient.
        probs: (B, T, K), where the critic's law has fixed atoms, their probabilities.
        support: These K atoms; empty where the law is the quantiles.
        advantages: (B, T), set by the advantage stage and its shapers.
        target_quantiles: (B, T, M), the critic's targets.
        entropy: (B, T), of the policy before the update, without gradient.
        ref_logp: (B, T), of the tokens under the reference policy.
        prompt_logp: (B, P), of the prompt's tokens, 0 at the first and in the padding.
        hidden: (B, T, H), the policy's last hidden states.
        head_gradient: (B, H), mean over tokens of W_y − Σ_v p_v W_v, W the LM head's rows.
        prompt: (B,), int64, the prompt's row in the task: equal whenever it is served.
        reward_parts: (B, C), the return of the task and what each reward transform has added.
        extras: More columns with B rows, such as what a stage's `prepare` selects.
        k: Training iteration, from 1.
        width: A number of columns ≥ T that all learners share; needed with several learners.
        generator: Randomness of stages that draw; part of the learner's state.
        all_reduce: Sum over learners.
        all_gather: Rows of all learners, in the same order on each.
        memory: What stages keep from one iteration to the next, by their names; checkpointed. Equal
            on all learners: stages write only what is of all of them.
        metrics: Filled by stages; shared by all slices of a batch.
        demonstrations: Of a whole batch, where a stage needs them: for each prompt a right
            completion that was shown and not sampled, one per row; `group` says whose it is.
            Stages may leave some out.
        shown: Whether the rows are such: `action_logp` and `rewards` are then 0.
    """

    rewards: Tensor
    loss_mask: Tensor
    action_logp: Tensor
    group: Tensor
    values: Tensor | None = None
    quantiles: Tensor | None = None
    probs: Tensor | None = None
    support: tuple[float, ...] = ()
    advantages: Tensor | None = None
    target_quantiles: Tensor | None = None
    entropy: Tensor | None = None
    ref_logp: Tensor | None = None
    prompt_logp: Tensor | None = None
    hidden: Tensor | None = None
    head_gradient: Tensor | None = None
    prompt: Tensor | None = None
    reward_parts: Tensor | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)
    k: int = 1
    width: int | None = None
    generator: torch.Generator | None = None
    all_reduce: AllReduce = identity
    all_gather: AllReduce = identity
    memory: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    demonstrations: "SequenceBatch | None" = None
    shown: bool = False

    def __len__(self) -> int:
        return self.loss_mask.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> "SequenceBatch":
        """The given rows: a slice, or an int64 or bool tensor of rows. Shares `metrics`."""
        return self._map(lambda tensor: tensor[rows])

    def cut(self, steps: int) -> "SequenceBatch":
        """The first `steps` columns of everything that has one column per token."""
        width = self.loss_mask.shape[1]
        per_row = {"group", "prompt_logp", "prompt", "reward_parts", "head_gradient"}
        columns: dict[str, Any] = {
            name: value[:, :steps] for name, value in self.filled().items() if name not in per_row
        }
        extras = {
            name: value[:, :steps] if value.dim() > 1 and value.shape[1] == width else value
            for name, value in self.extras.items()
        }
        return replace(self, **columns, extras=extras)

    def to(self, device: torch.device | str) -> "SequenceBatch":
        """The batch with every tensor on `device`."""
        return self._map(lambda tensor: tensor.to(device))

    def _map(self, function: Any) -> "SequenceBatch":
        columns: dict[str, Any] = {
            f.name: function(value)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        extras = {name: function(tensor) for name, tensor in self.extras.items()}
        return replace(self, **columns, extras=extras)

    @property
    def lengths(self) -> Tensor:
        """(B,), int64, tokens of each completion."""
        return self.loss_mask.sum(1)

    @property
    def returns(self) -> Tensor:
        """(B,), undiscounted sum of each row's rewards."""
        return torch.where(self.loss_mask, self.rewards, 0.0).sum(1)

    @property
    def law(self) -> Law:
        """What the critic says of the return to go before each token, (B, T), exactly.

        Padding has atoms, or probabilities, of 0.
        """
        if self.probs is None:
            return Law(zero_padding(self.column("quantiles"), self.loss_mask))
        probs = zero_padding(self.probs, self.loss_mask)
        return Law(probs.new_tensor(self.support).expand_as(probs), probs)

    def at_tokens(self, per_row: Tensor) -> Tensor:
        """(B,) to (B, T): the row's number at each of its tokens, 0 in the padding."""
        return torch.where(self.loss_mask, per_row.unsqueeze(1), 0.0)

    def column(self, name: str) -> Tensor:
        """A column that must be there.

        Args:
            name: A field, or a key of `extras`.

        Returns:
            The tensor.

        Raises:
            ValueError: If nothing filled it.
        """
        value = self.extras.get(name, getattr(self, name, None))
        if not isinstance(value, Tensor):
            filled = sorted({**self.extras, **self.filled()})
            raise ValueError(f"the batch has no column {name!r}; it has {', '.join(filled)}")
        return value

    def filled(self) -> Mapping[str, Tensor]:
        """The columns that are there, without `extras`."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}


# Formulas of `maths` as methods: their tensors come from the batch, the rest are settings.

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
