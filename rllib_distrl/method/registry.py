"""Methods by name: what a recipe's `[training.advantage] name = "maxk", k = 8` stands for.

A new method is one function in this package with `@register(kind, name)` above it (data first,
settings keyword-only): every module here is imported when a name is first looked up. One of your
own needs no place here: `name = "module:function"` imports it, in every process that uses it, and
where it carries `@register` takes what that declares.

What the function is given and returns, by kind; `batch` is a `SequenceBatch` of whole groups:

    reward                 (batch) to rewards (B, T)
    advantage              (batch) to (B, T)
    shaper                 (batch, advantages) to (B, T)
    policy_loss            (logp, batch) to (B, T); the batch may be any part of the minibatch, or,
                           where it needs `demonstrations`, of these (`batch.shown`)
    group_loss             (logp, batch) to (B,); in the place of a policy_loss
    regulariser            (logp, batch) to (B, T)
    target                 (batch) to (B, T, M): what the critic's quantiles learn
    read_out               (law) to (B, T): the actor's value of a state, see `maths.laws.Law`
    head                   a class: see `method.critic.Head`
    bonus_statistic        (batch) to (B, T): how uncertain a state is
    aggregation            (batch, a minibatch) to weights (B, T) of its tokens
    importance_correction  (learner's logp, batch) to weights (B, T) of the policy's loss
    controller             a class: `setting` (entropy_coeff, one of the policy loss's, or
                           sampling_temperature, which is then also an attribute `temperature`),
                           `update` of the first few of (entropy, mean_return, temperature,
                           vocab_size), `get_state`, `set_state`
    prompt_sampler         a class: see `PromptSampler`
    allocator              a class: see `allocators.Allocator`
    branching              a class: see `branching.Arpo`

A setting that bears the name of one of `[training]` (`gamma`, `clip_param`) is that one: it is
given there once, and whoever sets it where no chosen method has it is told so
(`algorithm.unread_settings`).
"""

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from pydantic import create_model

from rllib_distrl.recipe_schema import ALIKE, nearest
from rllib_distrl.settings import Settings

KINDS = (
    "reward", "advantage", "shaper", "policy_loss", "group_loss", "regulariser", "target",
    "head", "read_out", "bonus_statistic", "aggregation", "importance_correction", "controller",
    "prompt_sampler", "allocator", "branching",
)  # fmt: skip
# Uncertainties that a learner learns beside the critic (`learner.uncertainty`) and writes into the
# batch's `extras`.
LEARNED_STATS = ("ensemble", "distance")
NEEDS = frozenset(LEARNED_STATS) | {
    "entropy", "ref_logp", "prompt_logp", "hidden", "head_gradient", "quantiles", "values",
    "groups", "demonstrations",
}  # fmt: skip
LOGP_AT = "logp_at_"
Spec = Mapping[str, Any] | str
"""How a recipe names a method: by its name, or as a table of the name and settings."""
_F = TypeVar("_F", bound=Callable[..., Any])
# What a method needs, or a function of its settings that says so.
Needs = Collection[str] | Callable[[Mapping[str, Any]], Collection[str]]
# What of its settings a method does not read, given all of them.
Ignores = Callable[[Mapping[str, Any]], Collection[str]]


def logp_at(factor: float) -> str:
    """Need, and column of the batch's `extras`: logps at `factor` times the sampling temperature.

    Of the tokens, by the policy before the update. A method declares it in a function of its
    settings. Σ_v p_v² is exp(2 logp_at(1) − logp_at(1/2)), whichever the token.
    """
    return f"{LOGP_AT}{factor:g}"


class _MethodSettings(Settings, use_attribute_docstrings=False):
    """Made of a signature: pydantic would tokenise source files for docstrings it cannot have."""


@dataclass(frozen=True)
class Registered:
    """A registered function (or class, for a method with state) and what it declares."""

    kind: str
    name: str
    function: Callable[..., Any]
    needs: Needs = ()
    prepare: Callable[..., None] | None = None
    check: Callable[..., None] | None = None
    fits: Callable[..., None] | None = None
    ignores: Ignores | None = None
    own_defaults: frozenset[str] = frozenset()

    def settings(self) -> dict[str, inspect.Parameter]:
        """The keyword-only parameters, which are what a recipe may set."""
        signature = inspect.signature(self.function)
        keyword = inspect.Parameter.KEYWORD_ONLY
        return {name: p for name, p in signature.parameters.items() if p.kind == keyword}

    def checked(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of the annotated types, as Python's values.

        Raises:
            ValueError: For one of another type.
        """
        checked = _schema(self.kind, self.name, self.function)(**settings)
        return {name: getattr(checked, name) for name in settings}


@dataclass(frozen=True)
class Stage:
    """A method with its settings bound; call it with the data alone."""

    method: Registered
    params: Mapping[str, Any] = field(default_factory=dict)
    given: frozenset[str] = frozenset()
    """Those of the settings that stand in the method's own table."""

    @property
    def name(self) -> str:
        """The registered name."""
        return self.method.name

    @property
    def needs(self) -> frozenset[str]:
        """Columns beyond the basic ones that the method reads, a subset of `NEEDS`."""
        needs = self.method.needs
        return frozenset(needs(self.settings) if callable(needs) else needs)

    @property
    def settings(self) -> dict[str, Any]:
        """All settings, with the defaults of those that the recipe leaves out."""
        defaults = {key: p.default for key, p in self.method.settings().items()}
        return {**defaults, **self.params}

    @property
    def ignored(self) -> frozenset[str]:
        """Settings that the others of them switch off."""
        return frozenset(self.method.ignores(self.settings) if self.method.ignores else ())

    def __call__(self, *data: Any) -> Any:
        """Runs the method (or builds it, where it is a class)."""
        return self.method.function(*data, **self.params)

    def moved(self, values: Mapping[str, Any]) -> "Stage":
        """The stage with those of its settings that controllers have moved."""
        own = {name: values[name] for name in values.keys() & self.method.settings().keys()}
        return replace(self, params={**self.params, **own}) if own else self

    def check_fits(self, config: Any) -> None:
        """Refuses other settings of `[training]` with which the method makes no sense.

        Raises:
            ValueError: With the setting to change.
        """
        if self.method.kind == "group_loss":
            _demand_whole_groups(config, f"policy_loss {self.name!r}")
        if self.method.fits is not None:
            self.method.fits(config, **self.settings)

    def prepare(self, batch: Any) -> None:
        """Lets the method write columns on the whole batch, before it runs on parts of it."""
        if self.method.prepare is not None:
            self.method.prepare(batch, **self.settings)

    def of_whole(self, batch: Any, *data: Any) -> Any:
        """Prepares a whole batch, and runs the method on it."""
        self.prepare(batch)
        return self(batch, *data)


_METHODS: dict[tuple[str, str], Registered] = {}


def register(
    kind: str,
    name: str,
    needs: Needs | None = None,
    prepare: Callable[..., None] | None = None,
    check: Callable[..., None] | None = None,
    fits: Callable[..., None] | None = None,
    ignores: Ignores | None = None,
    own_defaults: Collection[str] = (),
) -> Callable[[_F], _F]:
    """Decorator that makes a function or class available by name.

    Args:
        kind: One of `KINDS`.
        name: Descriptive and unique within its kind.
        needs: A subset of `NEEDS`, or a function from the settings to one; None: what `of_batch`
            has found, or nothing.
        prepare: Called with (whole batch, settings) on every learner before the method runs, and
            before minibatches are cut: the place to write columns into the batch's `extras`.
        check: Called with all settings by `resolve`; raises ValueError for one out of bounds.
        fits: Called with the algorithm's configuration and all settings; see `demand`.
        ignores: Called with all settings; names those that it then does not read.
        own_defaults: Settings of `[training]` for which the method has another default than
            `[training]`; it takes what is set there only where that was changed.

    Returns:
        The decorator, which returns what it is given.

    Raises:
        ValueError: For an unknown kind or need, or a name taken by something else.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    if needs is not None and not callable(needs) and (unknown := set(needs) - NEEDS):
        raise ValueError(f"{kind} {name!r} needs {sorted(unknown)}; known: {sorted(NEEDS)}")
    if kind in ("prompt_sampler", "allocator", "branching") and prepare is not None:
        raise ValueError(f"{kind} {name!r} has no batch to prepare: it lives beside the learner")
    if kind != "policy_loss" and not callable(needs) and "demonstrations" in (needs or ()):
        raise ValueError(f"{kind} {name!r} needs demonstrations, which a policy_loss alone may.")

    def decorate(function: _F) -> _F:
        reads = getattr(function, "needs", ()) if needs is None else needs
        taken = _METHODS.get((kind, name))
        if taken is not None and taken.function.__qualname__ != function.__qualname__:
            raise ValueError(f"{kind} {name!r} is already {taken.function.__qualname__}")
        _METHODS[kind, name] = Registered(
            kind, name, function, reads, prepare, check, fits, ignores, frozenset(own_defaults)
        )
        return function

    return decorate


def demand(config: Any, method: str, **settings: Any) -> None:
    """Refuses a configuration whose settings are not those that a method is defined with.

    Args:
        config: The algorithm's configuration.
        method: What to call the method in the message.
        **settings: The values it needs.

    Raises:
        ValueError: For the first that differs.
    """
    for name, value in settings.items():
        if (got := getattr(config, name)) != value:
            raise ValueError(f"{method} is defined with {name} = {value!r}; got {got!r}. "
                             f"Set {name} = {value!r}.")  # fmt: skip


def smallest_group(config: Any) -> int:
    """The fewest completions that a prompt may get under an algorithm's configuration."""
    stage = resolve("allocator", config.allocator)
    return stage(config.rollout_settings.num_generations, 0).least


def _demand_whole_groups(config: Any, method: str) -> None:
    """What every loss on whole groups needs: minibatches that hold them, and returns."""
    group, size = config.rollout_settings.num_generations, config.minibatch_size
    if group < 2 or (size or group) % group:
        raise ValueError(
            f"{method} compares the completions of a prompt, of which there are {group}, and "
            f"minibatch_size is {size}. Set num_generations >= 2, and minibatch_size to a multiple "
            "of it, or leave minibatch_size out."
        )
    # It reads the returns themselves, and logps of the present policy alone.
    demand(config, method, advantage={"name": "zero"}, bonus_coeff=0.0, gamma=1.0,
           importance_correction="none")  # fmt: skip


def names(kind: str) -> list[str]:
    """All names of a kind, sorted.

    Args:
        kind: One of `KINDS`.

    Returns:
        The names.
    """
    _load_package()
    return sorted(name for of_kind, name in _METHODS if of_kind == kind)


def resolve(kind: str, spec: Spec, given: Collection[str] | None = None) -> Stage:
    """The stage that a recipe's table names, its settings checked against the signature.

    Args:
        kind: One of `KINDS`; "policy_loss" also finds group losses.
        spec: `{"name": …, **settings}`, or the name alone. A name of the form `module:function`
            is imported.
        given: Those of the settings that the recipe's own table gives; None: all.

    Returns:
        The stage.

    Raises:
        ValueError: For an unknown name or setting (with the nearest known one), a table without
            a name, a setting that is missing or of another type, or one that the method's own
            check refuses.
    """
    settings = {"name": spec} if isinstance(spec, str) else dict(spec)
    if "name" not in settings:
        raise ValueError(f"the {kind} table needs a name; known: {', '.join(names(kind))}")
    name = settings.pop("name")
    method = _imported(kind, name) if ":" in str(name) else _named(kind, name)
    kind, allowed = method.kind, method.settings()
    for key in settings:
        if key not in allowed:
            raise ValueError(f"{kind} {name!r} has no setting {key!r}{_nearest(key, allowed)}")
    required = [key for key, p in allowed.items() if p.default is inspect.Parameter.empty]
    if missing := [key for key in required if key not in settings]:
        raise ValueError(f"{kind} {name!r} needs the setting {', '.join(missing)}")
    own = frozenset(settings if given is None else given)
    stage = Stage(method, method.checked(settings), own)
    if method.check is not None:
        method.check(**stage.settings)
    return stage


def _places(kind: str) -> tuple[str, ...]:
    """The kinds that may stand where a recipe names one."""
    return (kind, "group_loss") if kind == "policy_loss" else (kind,)


def _named(kind: str, name: str) -> Registered:
    known = {known: place for place in _places(kind) for known in names(place)}
    if name not in known:
        raise ValueError(f"unknown {kind} {name!r}{_nearest(name, known)}")
    return _METHODS[known[name], name]


def _imported(kind: str, name: str) -> Registered:
    """A method of the user's own."""
    from distrl_envs.user_code import load_attribute

    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    try:
        function = load_attribute(name)
    except ValueError as error:
        raise ValueError(f"{kind}: {error}") from error
    if not callable(function):
        raise ValueError(f"{kind} {name!r} is {function!r:.80}; it must be a function.")
    declared = [method for method in _METHODS.values() if method.function is function]
    fitting = [method for method in declared if method.kind in _places(kind)]
    if declared and not fitting:
        raise ValueError(f"{kind}: {name!r} is registered as a {declared[0].kind}.")
    if not fitting:
        _check_positional(kind, name, function)
    return fitting[0] if fitting else Registered(kind, name, function)


def _check_positional(kind: str, name: str, function: Callable[..., Any]) -> None:
    """Refuses what cannot be called as the built-in methods of the kind are."""
    if not (known := names(kind)):
        return
    given = [
        parameter
        for parameter in inspect.signature(_METHODS[kind, known[0]].function).parameters
        if parameter not in _METHODS[kind, known[0]].settings()
    ]
    try:
        signature = inspect.signature(function)
        signature.bind_partial(*given)
        own = {
            key
            for key, p in list(signature.parameters.items())[len(given) :]
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
        }
        if own:
            raise TypeError(f"it also asks for {', '.join(sorted(own))}")
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{kind} {name!r} cannot be called with ({', '.join(given)}): {error}. Give it these "
            "arguments, and its settings as keyword-only ones after a *."
        ) from None


def forget(kind: str, name: str) -> None:
    """Takes a method out again, such as one of a notebook that is to be written anew."""
    del _METHODS[kind, name]


def methods(kind: str) -> list[Registered]:
    """All methods of a kind, by name.

    Args:
        kind: One of `KINDS`.

    Returns:
        The methods.
    """
    return [_METHODS[kind, name] for name in names(kind)]


@functools.cache
def _schema(kind: str, name: str, function: Callable[..., Any]) -> type[_MethodSettings]:
    """The types of a method's settings; what must be given is checked by `resolve`."""
    fields: Any = {
        key: (Any if p.annotation is inspect.Parameter.empty else p.annotation, None)
        for key, p in inspect.signature(function, eval_str=True).parameters.items()
        if p.kind is inspect.Parameter.KEYWORD_ONLY
    }
    schema = create_model(name, __base__=_MethodSettings, **fields)
    schema.table = f"{kind}.{name}"
    return schema


def _nearest(word: Any, known: Any) -> str:
    known = list(known)
    near = nearest(str(word), known, ALIKE)
    hint = f": did you mean {near!r}?" if near else ";"
    return f"{hint} known: {', '.join(known) if known else 'none'}"


@functools.cache
def _load_package() -> None:
    package = importlib.import_module("rllib_distrl.method")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
