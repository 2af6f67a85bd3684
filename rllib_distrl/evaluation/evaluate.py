"""One path from a model and some data to graded samples, numbers and a plot."""

import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distrl_envs.task import Task, distinct_rows
from distrl_envs.tasks.data_task import DataTask
from distrl_envs.turns import context_limit
from rllib_distrl.engine.protocol import RolloutEngine, SamplingParams
from rllib_distrl.engine.torch_engine import TorchEngine
from rllib_distrl.engine.weights import check_engine
from rllib_distrl.evaluation.data import EvalData, resolve_data
from rllib_distrl.evaluation.measures import Equivalence
from rllib_distrl.evaluation.result import SCHEMA, EvalResult, SampleStore, load_result
from rllib_distrl.evaluation.sampling import ProgressCallback, Prompted, Sampler
from rllib_distrl.model.loading import eos_token_ids, load_config, load_model, resolve
from rllib_distrl.settings import EvalSettings

REPORT = "eval.json"
PLOT = "pass_at_k.png"
BUILTIN_PREFIX = "builtin:"
ENGINES = ("torch",)
# What may change between two calls that continue one another.
_FREE = {"problems", "k", "chunk", "max_batch_size", "distinct_by", "max_tokens", "dtype"}


def run_evaluation(
    model: str | PreTrainedModel,
    data: str | EvalData,
    settings: EvalSettings | Mapping[str, Any] | None = None,
    out: Path | str | None = None,
    *,
    env_config: Mapping[str, Any] | None = None,
    data_dir: Path | str | None = None,
    task: str = "math",
    engine: str | RolloutEngine = "torch",
    compare: Sequence[Path | str] = (),
    label: str | None = None,
    overwrite: bool = False,
    on_progress: ProgressCallback | None = None,
    also: Mapping[str, Any] | None = None,
) -> EvalResult:
    """Evaluates ``model`` on ``data``: the whole of `distrl eval`.

    Writes `eval.json` (every number with its interval), `samples/part-*.parquet` and
    `pass_at_k.png` to ``out``; an interrupted evaluation continues there.

    Args:
        model: folder, hub id, ``builtin:…``, or a loaded causal LM.
        data: a preset's name, a file, ``hf:name/split``, an environment id, or what
            `data.recipe_data` returns.
        settings: all of them, or only those that differ from the data's own (None: not given).
        out: folder to write; nothing is written when None.
        env_config: further arguments of the environment, where ``data`` is a name.
        data_dir: folder with the presets' files, instead of the hub.
        task: what grades a file: "math", "code" or "custom".
        engine: "torch" or an engine.
        compare: folders of earlier evaluations to draw into the plot.
        label: name of this one in the plot; the folder's by default.
        overwrite: replace another evaluation in ``out``.
        on_progress: called whenever a sample has ended.
        also: further entries of `eval.json`.

    Returns:
        The graded samples; `EvalResult.report` has the numbers.

    Raises:
        ValueError: bad input, before anything is generated.
    """
    if isinstance(data, str):
        data = resolve_data(data, data_dir, task=task, env_config=env_config)
    if not isinstance(settings, EvalSettings):
        settings = data.settings.changed(**(settings or {}))
    others = {Path(folder).name: load_result(folder) for folder in compare}
    result = evaluate_model(
        model,
        data.env_id,
        data.env_config,
        settings,
        out=out,
        engine=engine,
        on_progress=on_progress,
        overwrite=overwrite,
    )
    if out is not None:
        from rllib_distrl.figures import plot_pass_k  # Matplotlib takes its time.

        folder = Path(out)
        result.to_json(folder / REPORT, also=also)
        subtitle = f"{data.name}, {result.problems} problems × {result.samples} samples"
        runs = {label or folder.resolve().name: result, **others}
        plot_pass_k(runs, folder / PLOT, subtitle=subtitle)
    return result


def evaluate_model(
    model: str | PreTrainedModel,
    env_id: str,
    env_config: Mapping[str, Any] | None = None,
    settings: EvalSettings | None = None,
    *,
    out: Path | str | None = None,
    engine: str | RolloutEngine = "torch",
    on_progress: ProgressCallback | None = None,
    equivalent: Equivalence | None = None,
    overwrite: bool = False,
) -> EvalResult:
    """Samples every problem n times, grades the samples, and keeps them.

    The engine decodes as many rows as it takes, whatever n is, and memory does not grow with the
    number of problems. With ``out``, finished problems are on disk, and a later call with
    the same arguments continues after the last one; samples whose gold or grader has changed
    since are graded anew. A sample's randomness is addressed by
    (seed, row, sample), so it does not matter in which process it is drawn, or beside which others.
    The score is the grade's; step rewards of tasks that have them are not part of it.

    Args:
        model: folder, hub id, ``builtin:…``, or a loaded causal LM.
        env_id: a Gymnasium id such as ``distrl_envs:distrl/Countdown-v0``.
        env_config: arguments of the environment; a model given by name brings its tokenizer,
            a loaded one needs ``tokenizer`` here unless it speaks the task's own.
        settings: how to sample.
        out: folder for `evaluation.json` and `samples/part-*.parquet`; in memory when None.
        engine: "torch", or an engine for this model, which gets the model's weights.
        on_progress: called at the start, whenever a sample has ended, and after grading.
        equivalent: compares normalised answers in votes; as the task does when None.
        overwrite: forget samples of another evaluation in ``out`` instead of refusing; those of
            this one are continued all the same.

    Returns:
        The graded samples.

    Raises:
        ValueError: an unknown environment or engine, a task that serves another split than the
            settings name (training problems are asked only where ``split="train"``), prompts too
            long for the model's window, or ``out`` holding another evaluation.
    """
    settings = settings or EvalSettings()
    if isinstance(engine, str) and engine not in ENGINES:
        raise ValueError(f"engine {engine!r} is unknown: choose one of {', '.join(ENGINES)}.")
    env = make_env(env_id, env_arguments(model, env_config or {}, settings))
    try:
        task: Task = env.get_wrapper_attr("task")
        _check_split(task, settings.split)
        loaded = _load(model, settings) if isinstance(model, str) else model
        limits = _turn_limits(loaded, env.unwrapped, env_config or {})
        sampler, weights = _sampler(loaded, env.unwrapped, settings, engine)
        info = {
            "env_id": env_id,
            "env_config": _plain(env_config or {}),
            **_identity(settings),
            "max_tokens": sampler.params.max_tokens,
            **limits,
            "task": task.name,
            "weights": weights,
        }
        folder = None if out is None else Path(out)
        if folder is None:
            records = [record for part in sampler.parts({}, on_progress) for record in part]
            frame = pd.DataFrame(records, columns=SCHEMA.names)
        else:
            store = SampleStore(folder, info, overwrite=overwrite)
            frame = _sample_to_disk(sampler, store, on_progress)
        if equivalent is None and isinstance(task, DataTask):
            equivalent = task.same_answer
        return EvalResult(frame, settings, folder, info, equivalent)
    finally:
        env.close()


def _turn_limits(model: PreTrainedModel, env: Any, env_config: Mapping[str, Any]) -> dict[str, int]:
    """Limits of episodes with replies, kept within the model's window; {} without replies."""
    if not env.has_turns:
        return {}
    given, most = env_config.get("max_context_tokens"), env.max_context_tokens
    env.max_context_tokens = context_limit(given, most, env.max_prompt_tokens, _window(model))
    return {
        name: getattr(env, name) for name in ("max_turns", "max_reply_tokens", "max_context_tokens")
    }


def _sampler(
    model: PreTrainedModel, env: Any, settings: EvalSettings, engine: str | RolloutEngine
) -> tuple[Sampler, str]:
    """What samples the environment's problems with ``model``, and the hash of its weights."""
    max_tokens: int = settings.max_tokens or env.max_completion_tokens
    prompted = _prompts(env, settings.problems)
    _check_window(model, prompted, max_tokens)
    eos = eos_token_ids(model, env.tokenizer)
    params = SamplingParams.of(settings.to_dict(), max_tokens, greedy=settings.greedy)
    own = isinstance(engine, str)
    if own:
        engine = _torch_engine(model, eos, settings.rows_at_once)
    weights = engine.load_weights(model.state_dict(), 0)
    if own:
        dtype = "float32" if model.dtype == torch.float32 else "bfloat16"
        check_engine(engine, model, params, dtype)
    if env.has_turns:
        env.eos_token_ids = frozenset(eos)  # the model's: they end its turns
    return Sampler(prompted, settings, params, engine, env, eos), weights


def _identity(settings: EvalSettings) -> dict[str, Any]:
    """The settings that decide what is sampled; those of training are not asked here."""
    known = EvalSettings.model_fields.keys() - _FREE
    values = {name: value for name, value in settings.to_dict().items() if name in known}
    return {**values, "seed": settings.seed or 0}


def _sample_to_disk(
    sampler: Sampler, store: SampleStore, on_progress: ProgressCallback | None
) -> pd.DataFrame:
    """Finishes what ``store`` lacks; returns the samples of the problems asked for."""
    finished = store.finished()
    if changed := sampler.changed(finished):
        finished = store.forget(f"holds samples of other data: {changed}")
    if regraded := store.update(sampler.is_stale, sampler.grade_anew):
        print(
            f"Graded {regraded:,} stored samples anew: their gold or the grader has changed.",
            file=sys.stderr,
        )
    for part in sampler.parts(finished, on_progress):
        store.write(part)
    frame = store.light_frame()
    wanted = frame["problem"].to_numpy() < len(sampler.prompted)
    return frame.loc[wanted].reset_index(drop=True)


def env_arguments(
    model: str | PreTrainedModel, env_config: Mapping[str, Any], settings: EvalSettings
) -> dict[str, Any]:
    """The environment's arguments with split, limit and tokenizer filled in."""
    arguments: dict[str, Any] = dict(env_config)
    if not isinstance(env_config.get("task"), Task):  # A task that is made already has its split.
        arguments["split"] = settings.split
    if settings.max_tokens is not None:
        arguments["max_completion_tokens"] = settings.max_tokens
    if isinstance(model, str) and not model.startswith(BUILTIN_PREFIX):
        arguments.setdefault("tokenizer", resolve(model))
    if arguments.get("on_long_prompt") == "skip":
        arguments.setdefault("window", _window(model))
    return arguments


def _check_split(task: Task, split: str) -> None:
    """Refuses an evaluation on another split than the settings name."""
    if task.split != split:
        raise ValueError(
            f"The task {task.name!r} serves the split {task.split!r}, but the evaluation asks for "
            f"{split!r}. Make the task with split={split!r} (a task of your own sets self.split), "
            f"or say so: split={task.split!r} in EvalSettings, eval.split in a recipe."
        )


def make_env(env_id: str, arguments: Mapping[str, Any]) -> gymnasium.Env:
    """The environment of an id.

    Raises:
        ValueError: If nothing is registered under it.
    """
    try:
        return gymnasium.make(env_id, disable_env_checker=True, **arguments)
    except (gymnasium.error.UnregisteredEnv, ModuleNotFoundError) as error:
        raise ValueError(
            f"there is no environment {env_id!r} ({error}): give an id such as "
            "distrl_envs:distrl/Countdown-v0."
        ) from error


def _prompts(env: Any, count: int) -> list[Prompted]:
    """The first ``count`` distinct problems, or all of a smaller data set."""
    rows = distinct_rows(env.task, count)
    if len(rows) < min(count, len(env.task)):
        print(
            f"Asking {len(rows)} different problems; {len(env.task) - len(rows)} of "
            f"{len(env.task)} rows repeat one.",
            file=sys.stderr,
        )
    prompted = []
    for position, row in enumerate(rows):
        _, info = env.reset(options={"row": row})
        prompted.append(Prompted(position, info["problem"], list(info["prompt_ids"])))
    return prompted


def _check_window(model: PreTrainedModel, prompted: Sequence[Prompted], max_tokens: int) -> None:
    window = _window(model)
    longest = max(len(p.prompt_ids) for p in prompted)
    if window is not None and longest + max_tokens > window:
        skip = (
            "leave such problems out (on_long_prompt='skip' in env_config, --on-long-prompt skip)"
        )
        lower = f"set max_tokens to at most {window - longest}, or " if longest < window else ""
        raise ValueError(
            f"the longest prompt ({longest} tokens) and max_tokens ({max_tokens}) exceed the "
            f"model's window of {window} tokens: {lower}{skip}."
        )


def _window(model: str | PreTrainedModel) -> int | None:
    config = load_config(model) if isinstance(model, str) else model.config
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _torch_engine(
    model: PreTrainedModel, eos: Collection[int], max_batch_size: int
) -> RolloutEngine:
    return TorchEngine(
        model.config, eos, max_batch_size=max_batch_size, device=_device(), dtype=model.dtype
    )


def _load(name: str, settings: EvalSettings) -> PreTrainedModel:
    automatic = "bfloat16" if _device() == "cuda" else "float32"
    dtype = automatic if settings.dtype == "auto" else settings.dtype
    return load_model(name, getattr(torch, dtype))


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _plain(env_config: Mapping[str, Any]) -> dict[str, Any]:
    """``env_config`` with objects by their names, so that it can be compared between runs."""
    names = {
        key: value.name_or_path if isinstance(value, PreTrainedTokenizerBase) else value.name
        for key, value in env_config.items()
        if isinstance(value, PreTrainedTokenizerBase | Task)
    }
    return {**env_config, **names}
