"""Every setting of ours, once: name, type, bound, default and what it means.

Recipes, builder methods and `DistRLConfig.validate` read these models. A value is taken as Python
or TOML writes it (`1e6` is an integer, NumPy's numbers and `pathlib` paths are as good as Python's)
and refused otherwise, in one sentence with what was got and what is allowed.
"""

import importlib
import inspect
import re
import typing
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import annotated_types
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from rllib_distrl.recipe_schema import (
    as_python,
    check_names,
    in_words,
    literal_choices,
    nearest,
    toml_types,
)

LARGEST = 10**9
"""Beyond it a number is a slip: it overflows once it is multiplied (our choice)."""
Number = Annotated[FiniteFloat, Field(ge=-LARGEST, le=LARGEST)]
Positive = Annotated[FiniteFloat, Field(gt=0, le=LARGEST)]
NotNegative = Annotated[FiniteFloat, Field(ge=0, le=LARGEST)]
Temperature = Annotated[FiniteFloat, Field(ge=1e-3, le=1e3)]
Share = Annotated[FiniteFloat, Field(ge=0, le=1)]
Rate = Annotated[FiniteFloat, Field(gt=0, le=1)]
"""A learning rate. Adam moves a weight by about as much in a step: beyond 1 all of them diverge."""
Count = Annotated[int, Field(ge=1, le=LARGEST)]
NotNegativeInt = Annotated[int, Field(ge=0)]
Choice = str | dict[str, Any]
"""A method by its name, or ``{name, ...}`` with settings of its own; see `method.registry`."""
Schedule = list[list[Number]]
"""RLlib's: [[env step, value], ...], linear between them."""

TWIN = "twin"
NUMBERS_FOR_CRITICS = ("state", "stock")
"""Values of ``critic_observation`` that are numbers at every token, a column of the batch."""
CRITIC_TRUNKS = {"separate": 1, TWIN: 2}
"""How many trunks of its own a ``critic`` has; others read the policy's states."""
MOST_MICRO_BATCH_TOKENS = 16_384
"""``micro_batch_tokens`` where memory allows (our choice)."""
TRACKERS = {
    "mlflow": "ray.air.integrations.mlflow.MLflowLoggerCallback",
    "wandb": "ray.air.integrations.wandb.WandbLoggerCallback",
}
"""Names of `run.trackers` and Ray's callbacks behind them; the name is the package's, too."""

_NO_VLLM = (
    "rollout.engine is 'vllm', but vLLM is not installed here. On a machine with a GPU: "
    "pip install 'rllib-distrl[vllm]'. On CPU it needs an environment of its own: see "
    "docs/vllm.md. Or use engine = 'torch'."
)


def _named_in(module: str, *attributes: str) -> AfterValidator:
    """A string among those that a module of formulas names, imported at the first check."""

    def check(value: str) -> str:
        formulas = importlib.import_module(f"rllib_distrl.maths.{module}")
        allowed = [name for attribute in attributes for name in getattr(formulas, attribute)]
        if value not in allowed:
            raise ValueError(_not_among(value, allowed))
        return value

    return AfterValidator(check)


def _not_among(value: Any, allowed: typing.Sequence[str]) -> str:
    hint = f" Did you mean {nearest(value, allowed)!r}?" if isinstance(value, str) else ""
    return f"it must be one of {', '.join(allowed)}.{hint}"


class Settings(BaseModel):
    """A table of settings. Immutable; ``model_copy(update=...)`` gives a changed one.

    Raises:
        ValueError: for an unknown name (with the nearest one), a value of another type, or one
            out of bounds.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )
    table: ClassVar[str] = ""
    """How a recipe calls it, for messages."""

    if not TYPE_CHECKING:  # Type checkers shall see the fields.

        def __init__(self, **values: Any) -> None:
            check_names(f"[{self.table}]", values, type(self).model_fields)
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise ValueError(self._sentence(error)) from None

    @field_validator("*", mode="before")
    @classmethod
    def _as_python(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        value = as_python(value, annotation)
        as_tuple = typing.get_origin(annotation) is tuple and isinstance(value, list)
        return tuple(value) if as_tuple else value

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they travel in a module's ``model_config`` or stand in a recipe."""
        return self.model_dump()

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """{name: default}."""
        return {
            name: field.get_default(call_default_factory=True)
            for name, field in cls.model_fields.items()
        }

    @classmethod
    def _sentence(cls, error: ValidationError) -> str:
        first = error.errors(include_url=False)[0]
        path = [part for part in first["loc"] if not isinstance(part, str) or part.isidentifier()]
        if not path:  # A check of the whole table says all of it.
            return str(first.get("ctx", {}).get("error", first["msg"]))
        field = cls.model_fields[str(path[0])]
        indices = [part for part in path[1:] if isinstance(part, int)]
        where = ".".join(filter(None, (cls.table, str(path[0]))))
        where += "".join(f"[{index}]" for index in indices)
        if first["type"] == "value_error":
            said = str(first.get("ctx", {}).get("error"))
            return f"{where} is {first['input']!r}; {said}" if said.startswith("it must") else said
        annotation = field.annotation
        if indices:
            annotation = typing.get_args(annotation)[0]
        return f"{where} is {first['input']!r}; {_must_be(annotation, field, first)}"


def signature_of(cls: type[Settings]) -> inspect.Signature:
    """The signature of a builder method that sets the fields of ``cls``, and RLlib's beside."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    ours = [
        inspect.Parameter(
            name, keyword, default=default, annotation=cls.model_fields[name].annotation
        )
        for name, default in cls.defaults().items()
    ]
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    rest = inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD, annotation=Any)
    return inspect.Signature([first, *ours, rest])


def _must_be(annotation: Any, field: Any, error: Mapping[str, Any]) -> str:
    """What a field allows, as the end of a sentence."""
    choices = literal_choices(annotation)
    if choices and error["type"] == "literal_error":
        return _not_among(error["input"], choices)
    kinds = toml_types(annotation) or frozenset({type(error["input"])})
    words = in_words(kinds - {str} if choices else kinds)
    if error["type"] == "finite_number":
        words = "a finite number"
    found = field.metadata or _inner_metadata(annotation)
    if not {LARGEST, -LARGEST} & set(error.get("ctx", {}).values()):
        # A limit that is only beyond all reason needs no word where another is broken.
        generic = (annotated_types.Le(LARGEST), annotated_types.Ge(-LARGEST))
        found = [item for item in found if item not in generic]
    bounds = _bounds(found)
    if isinstance(error["input"], str) and dict in (toml_types(annotation) or ()):
        words += f" such as {{name = {error['input']!r}}}"
    others = list(map(repr, choices))
    others += ["left out"] if type(None) in typing.get_args(annotation) else []
    or_else = f", or {' or '.join(others)}" if others else ""
    if error["type"].startswith(("greater", "less")):
        words = ""
    return "it must be " + " ".join(filter(None, (words, bounds))) + f"{or_else}."


def _inner_metadata(annotation: Any) -> list[Any]:
    """The bounds within `Annotated[...] | None`."""
    found: list[Any] = []
    for part in typing.get_args(annotation):
        for item in getattr(part, "__metadata__", ()):
            found += item.metadata if hasattr(item, "metadata") else [item]
    return found


def _bounds(metadata: list[Any]) -> str:
    low = high = ""
    for item in metadata:
        if isinstance(item, annotated_types.Gt):
            low = f"({item.gt}"
        elif isinstance(item, annotated_types.Ge):
            low = f"[{item.ge}"
        elif isinstance(item, annotated_types.Lt):
            high = f"{item.lt})"
        elif isinstance(item, annotated_types.Le):
            high = f"{item.le}]"
        elif isinstance(item, annotated_types.MultipleOf):
            return f"that is a multiple of {item.multiple_of}"
    if low and high:
        return f"in {low}, {high}"
    if low:
        return (">= " if low[0] == "[" else "above ") + low[1:]
    return high and ("at most " if high[-1] == "]" else "below ") + high[:-1]


class RolloutSettings(Settings):
    """`[rollout]`: how prompts become completions, for our algorithms and stock ones."""

    table = "rollout"

    engine: Literal["torch", "vllm"] = "torch"
    """What generates."""
    engine_options: dict[str, Any] = {}
    """Further arguments of the vLLM engine: ``sleep``, and those of ``vllm.LLM``, such as
    ``gpu_memory_utilization``."""
    prompts_per_iteration: Count = 32
    """Prompts that one training iteration serves."""
    num_generations: Count = 8
    """Completions per prompt (a group)."""
    evaluation_generations: Count = 1
    """Completions per problem in RLlib's evaluation while training: a pool for pass@k and maj@k."""
    max_completion_tokens: Count = 64
    """Length limit; part of the task, see `TokenEnv`."""
    temperature: Temperature = 1.0
    """Of the sampling distribution; the learner uses the same. Greedy sampling is chosen with
    ``explore = false`` in [env_runners]."""
    top_p: Annotated[FiniteFloat, Field(gt=0, le=1)] = 1.0
    """Nucleus mass kept, 1 keeps all."""
    top_k: NotNegativeInt = 0
    """Tokens kept, 0 keeps all."""
    max_batch_size: Count = 256
    """Rows that the engine decodes at once."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the engine's weights and cache."""
    max_staleness: NotNegativeInt = 0
    """Updates by which the weights of a token may lag behind the learner's: 0 is strictly
    on-policy; with k the runners sample the next k batches while the learner learns."""
    segment_tokens: NotNegativeInt = 0
    """Tokens of a completion, or of an episode's turns, that are sampled in one iteration: what is
    not over then goes on in the next, with newer weights, and a group is learned from when it is
    whole, so that batches vary in size; 0: all in the same iteration."""
    torch_threads: Count = 1
    """Torch threads of each process that samples or learns."""
    max_env_runners: NotNegativeInt = 0
    """Most env runners that scaling may ask Ray for; 0: as many as fit into the nodes that the
    cluster has at that time."""

    @classmethod
    def of(cls, model_config: Mapping[str, Any]) -> "RolloutSettings":
        """Those that travel in a module's ``model_config``, for any algorithm."""
        return cls(**model_config.get("rollout", {}))

    @property
    def episodes_per_iteration(self) -> int:
        """Prompts times completions per prompt."""
        return self.prompts_per_iteration * self.num_generations

    @model_validator(mode="after")
    def _options_fit(self) -> "RolloutSettings":
        if self.engine == "torch" and self.engine_options:
            raise ValueError(
                f"[rollout] engine_options has {', '.join(self.engine_options)}, but the torch "
                "engine takes none. Remove them, or set engine = 'vllm'."
            )
        return self

    def check_machine(self) -> None:
        """Checks what depends on the machine.

        Raises:
            ValueError: where the engine is not installed.
        """
        if self.engine == "vllm" and find_spec("vllm") is None:
            raise ValueError(_NO_VLLM)


class RunSettings(Settings):
    """`[run]`: what is trained, how long, and what is kept."""

    table = "run"

    algorithm: str = "DistRL"
    """A registered algorithm ("DistRL") or one of RLlib's own ("PPO")."""
    model: str = "builtin:countdown"
    """A Hugging Face id, a folder, a GGUF file, "package:NAME" for the GGUF file that an installed
    package ships, or "builtin:countdown"."""
    name: str = ""
    """Names the default output folder; the recipe's file name without ending if empty."""
    iterations: Count = 200
    """Training iterations, where there is no budget of tokens."""
    budget_tokens: NotNegativeInt = 0
    """Training ends with the first iteration by which so many completion tokens have been
    generated, those that were dropped or only trained the critic included and evaluations not; 0
    means that `iterations` ends it."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """Seeds sampling, initialisation and shuffling."""
    checkpoint_interval: NotNegativeInt = 50
    """Iterations between checkpoints; 0 means only at the end."""
    keep_checkpoints: Count = 2
    """How many of the newest checkpoints stay on disk."""
    checkpoint_metric: str = ""
    """A key of `progress.jsonl` such as "evaluation/env_runners/episode_return_mean": a checkpoint
    is also written whenever it is better than ever, and the best one stays; "" means none."""
    checkpoint_mode: Literal["max", "min"] = "max"
    """Whether the best has the highest ("max") or the lowest ("min") value."""
    storage: str = ""
    """A folder on another file system, such as "s3://bucket/folder" or "file:///mnt/disk": the run
    is copied below it with every checkpoint, and resumed from there where its folder is gone; ""
    means none."""
    log_interval: Count = 10
    """Iterations between printed lines where there is no terminal."""
    trackers: tuple[dict[str, Any], ...] = ()
    """Experiment trackers, `{name = "wandb" | "mlflow", ...}` each; what follows the name goes to
    Ray's callback (`project`, `group`; `tracking_uri`, `experiment_name`)."""

    @model_validator(mode="after")
    def _named(self) -> "RunSettings":
        for key in ("algorithm", "model"):
            if not getattr(self, key).strip():
                raise ValueError(f"run.{key} is empty. Name one.")
        if self.name and not re.fullmatch(r"[\w][\w.+-]*", self.name):
            raise ValueError(
                f"run.name: {self.name!r} cannot name a folder. Use letters, digits, '-', '_', '.'."
            )
        return self

    @model_validator(mode="after")
    def _trackers_known(self) -> "RunSettings":
        names = [tracker.get("name") for tracker in self.trackers]
        for name in names:
            if not isinstance(name, str) or name not in TRACKERS:
                raise ValueError(
                    f"run.trackers: got the name {name!r}; known are {', '.join(TRACKERS)}. "
                    'Write for example trackers = [{name = "wandb", project = "countdown"}].'
                )
            if names.count(name) > 1:
                raise ValueError(f"run.trackers: {name} stands there {names.count(name)} times.")
        return self

    def check_machine(self) -> None:
        """Checks what depends on the machine.

        Raises:
            ValueError: for a tracker that is not installed.
        """
        for tracker in self.trackers:
            if find_spec(name := tracker["name"]) is None:
                raise ValueError(
                    f"run.trackers: {name} is not installed. pip install '{name}', or take it out."
                )


class EvalSettings(Settings):
    """How an evaluation samples, whatever model and data it is of."""

    table = "eval"

    problems: Count = 200
    """The first so many distinct problems; all of a data set that has fewer."""
    n: Count = 64
    """Completions per problem, one pool for every k."""
    k: tuple[int, ...] = ()
    """The k of pass@k and maj@k, each at most n; powers of two up to n where empty."""
    split: Literal["train", "validation", "test"] = "test"
    """Which problems of a task that has splits."""
    max_tokens: Count | None = None
    """Limit of a completion, EOS included; None: `rollout.max_completion_tokens` of a recipe, the
    environment's own without one."""
    temperature: Temperature = 1.0
    """Divides the logits."""
    top_p: Annotated[FiniteFloat, Field(gt=0, le=1)] = 1.0
    """Nucleus; 1 turns it off."""
    top_k: NotNegativeInt = 0
    """Most probable tokens kept; 0 turns it off."""
    greedy: bool = False
    """Takes the most probable token; n is 1 then."""
    seed: NotNegativeInt | None = None
    """Of the sampling; None: `run.seed` of a recipe, 0 without one."""
    chunk: NotNegativeInt = 0
    """Problems graded and written at a time, which is what a kill can lose; 0: a batch of rows."""
    max_batch_size: Count | None = None
    """Rows that the engine decodes at once; None: `rollout.max_batch_size` of a recipe, 256 without
    one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the model's weights; auto is float32 on a CPU and bfloat16 on a GPU."""
    distinct_by: Literal["answer", "completion"] = "answer"
    """What tells correct solutions apart: the normalised answer, or the text where one answer is
    right."""

    @model_validator(mode="after")
    def _samples_fit(self) -> "EvalSettings":
        for k in self.k:
            if not 1 <= k <= self.n:
                raise ValueError(
                    f"eval.k: pass@{k} needs 1 <= k <= n and eval.n is {self.n}. "
                    "Raise eval.n or lower k."
                )
        if self.greedy and self.n > 1:
            raise ValueError(
                f"eval.greedy: greedy samples are all the same and eval.n is {self.n}. Set n = 1."
            )
        return self

    def changed(self, **values: Any) -> typing.Self:
        """These settings with others in their place; the k follow n where only n is given.

        Args:
            **values: Fields; None stands for "as it is".

        Raises:
            ValueError: See `Settings`.
        """
        given = {name: value for name, value in values.items() if value is not None}
        if isinstance(n := given.get("n"), int) and "k" not in given:
            given["k"] = tuple(k for k in self.k if k <= n)
        return type(self)(**{**self.to_dict(), **given})

    @property
    def ks(self) -> tuple[int, ...]:
        """The k's, ascending."""
        from rllib_distrl.maths.pass_k import default_ks

        return tuple(sorted(set(self.k))) or default_ks(self.n)

    @property
    def rows_at_once(self) -> int:
        """Rows that the engine decodes at once."""
        return self.max_batch_size or RolloutSettings().max_batch_size

    @property
    def problems_per_part(self) -> int:
        """Problems graded and written at a time."""
        return self.chunk or max(1, self.rows_at_once // self.n)


class EvalTable(EvalSettings):
    """`[eval]`: the evaluations before and after training, and validations in between."""

    k: tuple[int, ...] = (1, 8)
    """The k of pass@k and maj@k, each at most n; powers of two up to n where empty."""
    before: bool = True
    """Whether the model is evaluated before training too."""
    interval: NotNegativeInt = 0
    """Iterations between validations while training (RLlib's evaluation); 0 means none."""
    validation_problems: Count = 100
    """Problems of one validation, the same every time, each completed
    `rollout.evaluation_generations` times."""
    critic_prefixes: NotNegativeInt = 200
    """Completions of other problems than those of training that are cut at a random token, to see
    whether the critic is right there, after training and in `distrl eval`; 0 means none."""
    critic_continuations: Count = 32
    """Completions from each such prefix."""
    token_problems: NotNegativeInt = 64
    """Validation problems whose completions, one group each, are stored with what the critic
    thought at every token once training ends (`distrl view`); 0 means none."""


class PretrainingSettings(Settings):
    """`[training.critic_pretraining]`: where the completions come from, and how to learn.

    Large minibatches and several epochs are what makes a critic of 0/1 returns good: see
    docs/critic.md.
    """

    table = "critic_pretraining"

    rollouts: NotNegativeInt = 0
    """Completions that the initial policy is asked for; or"""
    samples: str | None = None
    """a Parquet file of completions of `distrl train`, or the folder `samples` of `distrl eval`, of
    problems of the split that is trained on, each completed by the initial policy."""
    epochs: Count = 6
    """Passes over them."""
    lr: Rate | None = None
    """Of Adam, falling linearly to zero; None: `critic_lr`."""
    minibatch_size: Count = 512
    """Sequences per optimiser step, over all learners."""

    @model_validator(mode="after")
    def _one_source(self) -> "PretrainingSettings":
        if (self.rollouts > 0) == (self.samples is not None):
            raise ValueError(
                f"critic_pretraining has rollouts={self.rollouts} and "
                f"samples={self.samples!r}; give one of them: how many completions to "
                "sample, or a file of samples."
            )
        return self


class EnsembleSettings(Settings):
    """`[training.ensemble]`, for `bonus_stat = "ensemble"`."""

    table = "ensemble"

    size: Annotated[int, Field(ge=2)] = 8
    """K, members."""
    prior_scale: NotNegative = 0.3
    """Weight of the fixed random networks, in units of the return."""
    width: Annotated[int, Field(multiple_of=2, ge=2)] = 32
    """Of each member's trunk, an even number."""
    depth: Count = 1
    """Blocks of each trunk."""
    lr: Rate = 3e-3
    """Of Adam."""


class DistanceSettings(Settings):
    """`[training.distance]`, for `bonus_stat = "distance"`."""

    table = "distance"

    features: Count = 256
    """Most features; wider hidden states are projected at random."""
    decay: Annotated[FiniteFloat, Field(gt=0, le=1)] = 0.99
    """Weight that an iteration's states keep in the next one; 1 never forgets."""
    ridge: Positive = 1e-3
    """Added to the features' mean squares."""


class SweepSettings(Settings):
    """`[sweep]` of a file of settings to search."""

    table = "sweep"

    metric: str = "evaluation/env_runners/episode_return_mean"
    """A key of the training result, joined by '/'; the last one counts."""
    mode: Literal["max", "min"] = "max"
    """Whether more or less of it is better."""
    search: Literal["grid", "random", "optuna"] = "random"
    """"grid" tries all combinations of choices, "random" draws, "optuna" draws where earlier trials
    did well."""
    scheduler: Literal["none", "asha", "pbt"] = "none"
    """"asha" stops trials that fall behind, "pbt" lets them copy and change those that lead, "none"
    lets all end."""
    trials: Count = 8
    """How many are drawn; a grid has as many as it has combinations."""
    seed: NotNegativeInt = 0
    """Of the drawing."""
    grace_iterations: Count = 10
    """No trial is stopped by "asha" before."""
    grace_tokens: Count = 50_000
    """The same where the recipe has a budget of tokens: trials are then compared at equal tokens,
    whatever an iteration of theirs generates."""
    perturbation_interval: Count = 10
    """Iterations between the changes of "pbt"."""


def micro_batch_budget(micro_batch_tokens: int | str) -> int:
    """Tokens; of a configuration that was not validated, in which ``auto`` stands yet, the most."""
    return MOST_MICRO_BATCH_TOKENS if micro_batch_tokens == "auto" else int(micro_batch_tokens)


class TrainingSettings(Settings):
    """`[training]`: the method, beside what RLlib's own ``training`` takes.

    Of RLlib's, ``lr``, ``gamma``, ``grad_clip``, ``num_epochs`` and ``minibatch_size`` (which
    counts sequences here) are read.
    """

    table = "training"

    @classmethod
    def of(cls, config: Any) -> "TrainingSettings":
        """Those of an algorithm's configuration, which has them as attributes."""
        return cls(**{name: getattr(config, name) for name in cls.model_fields})

    lambda_: Share = 0.95
    """Of the actor's advantages."""
    clip_param: Positive = 0.2
    """Half width of the clip band of the ratio."""
    clip_param_high: Positive | None = None
    """Upper half width, if it differs."""
    dual_clip: Annotated[FiniteFloat, Field(gt=1)] | None = None
    """Bound on the ratio where the advantage is negative; None: off."""
    vf_loss_coeff: Annotated[FiniteFloat, Field(ge=0)] = 1.0
    """Weight of the critic's loss."""
    vf_clip_param: Positive = 10.0
    """Bound on the squared error of a scalar critic (one quantile)."""
    entropy_coeff: NotNegative | Schedule = 0.0
    """Weight of the entropy bonus, in nats; or RLlib's schedule of it over env steps."""
    importance_correction: Choice = "none"
    """What is done about a sampler that is not the learner's policy (another engine or type, stale
    weights, top-p, top-k): importance weights or none."""
    importance_bound: Annotated[FiniteFloat, Field(gt=1)] = 2.0
    """C: weights are cut at C, or masked outside of [1/C, C]."""
    micro_batch_tokens: Count | Literal["auto"] = "auto"
    """Token places in one forward and backward pass, attention's padding included. ``auto``: 16,384
    where memory allows by the estimate of ``distrl explain``, or else as many as it allows, but at
    least the longest sequence."""
    max_sampling_rounds: Count = 1
    """Above 1, groups whose returns are all equal are sampled anew with other prompts, in so many
    rounds at most (DAPO's dynamic sampling). A critic then learns the law of those that are kept,
    which is not the policy's: its values near 0 and 1 are drawn towards the middle."""
    max_nonfinite_steps: Count = 3
    """Optimiser steps in a row that may be refused because their loss or gradient is not finite;
    then training stops."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """``bf16`` is autocast with float32 weights and logits."""
    activation_checkpointing: bool = False
    """Whether the backward pass runs each block once more instead of keeping its activations."""
    sharding: Literal["none", "fsdp"] = "none"
    """``fsdp``: every learner holds a share of weights, gradients, moments and reference (FSDP2)
    instead of a copy."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """Of both learning rates."""
    lr_warmup_iterations: NotNegativeInt = 0
    """Iterations over which they rise linearly; 0: none."""
    lr_decay_iterations: Count | None = None
    """Iteration at which ``cosine`` ends."""
    lr_min_ratio: Share = 0.0
    """Where it ends, as a share of the learning rate."""
    aggregation: Choice = "token_mean"
    """How token losses become one: ``token_mean``, ``sequence_mean``, ``sequence_sum`` or
    ``constant``."""
    critic: Literal["separate", "twin", "shared", "detached", "none"] = "separate"
    """Whether the critic has a trunk of its own, is two critics with a trunk each, of which in
    every state the one with the smaller mean counts (DSAC-T), has the policy's trunk, that without
    its gradient, or whether there is none."""
    critic_observation: Literal["none", "state", "text", "stock"] = "none"
    """What the critic, and never the policy, sees beside the tokens: ``state``, numbers of the
    task's verifier at every token (`Task.critic_observation`); ``text``, such as a reference
    answer, before the rows of a critic with a trunk of its own (`Task.critic_text`); ``stock``, the
    return so far, where rewards come before the end."""
    critic_checkpoint: str | None = None
    """Folder written by ``distrl export --critic`` to start a critic with a trunk of its own from;
    None: a copy of the policy's trunk."""
    critic_lr: Rate | None = None
    """Learning rate of the critic's own parameters; None: ``lr``."""
    critic_epochs: Count | None = None
    """Passes of the critic over a batch, those beyond ``num_epochs`` alone and after the policy's;
    None: ``num_epochs``."""
    critic_freeze: Literal["none", "attention"] = "none"
    """What of a critic's own trunk stays as it was: nothing, or its attention."""
    critic_warmup_iterations: NotNegativeInt = 0
    """Iterations in which only the critic learns."""
    critic_pretraining: PretrainingSettings | None = None
    """Teaches the critic before the policy moves, such as ``{rollouts = 8192}``; its tokens count
    as sampled. None: not."""
    head: Choice = "quantile"
    """What the critic says of a state: ``quantile``; ``bernoulli``, a probability, for returns in
    [0, 1]; ``categorical``, probabilities of evenly spaced returns (HL-Gauss or two-hot), between
    those of the first batch unless it says `low` and `high`; ``gaussian``, mean and variance."""
    n_quantiles: Count = 16
    """N; 1 is a scalar critic with RLlib's own value loss. Of other heads the quantiles of their
    law that targets are made of."""
    quantile_huber_kappa: Positive = 0.001
    """Width of the quadratic part, in units of the return. A wide one narrows the law."""
    quantile_loss: Annotated[str, _named_in("quantiles", "PAIRINGS")] = "pairwise"
    """Each quantile against every target, or ``matched``: against its own."""
    target: Choice = "comonotone"
    """``comonotone`` (D-GAE), ``mixture``, ``sample_replacement``, ``expected_value`` or
    ``monte_carlo``."""
    critic_lambda: Share = 1.0
    """Lambda of the critic's targets; at 1 they are the observed returns, whatever ``target``.
    Below, ``comonotone`` narrows the law, ``sample_replacement`` and ``mixture_mean`` do not."""
    head_center: Annotated[str, _named_in("quantiles", "HEAD_CENTERS")] = "mean"
    """What the centre of the head is: ``mean`` or ``median``."""
    init_spread: Positive = 0.1
    """Distance of the outermost quantiles at the start."""
    init_value: Number | None = None
    """Value of all states at the start, after reward transforms; None: the first batch's mean."""
    read_out: dict[str, Any] = {"name": "mean"}
    """``{name, level}`` of the quantiles that the actor takes as the value."""
    bonus_coeff: NotNegative = 3.0
    """c of the optimism bonus; 0 switches it off."""
    bonus_stat: Choice = "ltv_sqrt"
    """``ltv_sqrt``, ``ltv`` or ``std`` of the quantiles; ``ensemble`` (disagreement of small
    critics) or ``distance`` (of the policy's features from those seen)."""
    bonus_at: Annotated[str, _named_in("optimism", "BONUS_PLACES")] = "next"
    """``next``, ``difference`` or ``current``: the state or states whose statistic counts."""
    bonus_center: bool = True
    """Whether the bonus is centred per position."""
    bonus_schedule: Annotated[str, _named_in("optimism", "BONUS_SCHEDULES")] = "dltv"
    """``dltv``, ``linear`` or ``constant`` over iterations."""
    bonus_horizon: Count | None = None
    """Iterations until a linear schedule reaches zero."""
    bonus_max_ratio: Positive | None = 0.5
    """Cap of std(bonus) / std(advantage); None: no cap."""
    ensemble: dict[str, Any] = {}
    """The fields of `EnsembleSettings`, such as ``{size = 8, prior_scale = 0.3}``."""
    distance: dict[str, Any] = {}
    """The fields of `DistanceSettings`."""
    whiten_advantages: bool = True
    """Whether advantages are standardised over the batch."""
    reward_transforms: list[dict[str, Any]] = []
    """Stages applied to the rewards, in order."""
    advantage: dict[str, Any] = {"name": "gae"}
    """``{name, ...}`` of the advantage estimator."""
    shapers: list[dict[str, Any]] = []
    """Stages applied to the advantages, in order, before whitening."""
    policy_loss: dict[str, Any] = {"name": "clip"}
    """``{name, ...}`` of the token loss, or of a loss on whole groups such as ``copg``."""
    regularisers: list[dict[str, Any]] = []
    """Stages added to the token loss, such as ``kl`` to the reference."""
    controllers: list[dict[str, Any]] = []
    """Stages that move a coefficient between iterations."""
    prompt_sampler: dict[str, Any] = {"name": "without_replacement"}
    """``{name, ...}`` of what chooses each iteration's prompts."""
    allocator: dict[str, Any] = {"name": "equal"}
    """``{name, ...}`` of what shares an iteration's completions out among its prompts."""
    branching: Choice = "none"
    """Where the completions of a prompt branch off from one another, in a task that replies."""
