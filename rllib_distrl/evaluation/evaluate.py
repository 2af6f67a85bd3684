"""The evaluation loop: problems in, graded samples out, in bounded memory and resumable."""

import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import gymnasium
import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distrl_envs.task import Grade, Problem, Task, distinct_rows, grades_of
from distrl_envs.tasks.data_task import DataTask
from distrl_envs.tokenizers import decode_completion
from rllib_distrl.engine.protocol import Completion, Request, RolloutEngine
from rllib_distrl.engine.torch_engine import TorchEngine
from rllib_distrl.engine.weight_proof import check_engine
from rllib_distrl.evaluation.result import EvalResult
from rllib_distrl.evaluation.settings import EvalSettings, Progress
from rllib_distrl.evaluation.store import SCHEMA, SampleStore
from rllib_distrl.evaluation.summary import Equivalence
from rllib_distrl.model.loading import eos_token_ids, load_config, load_model

BUILTIN_PREFIX = "builtin:"
ENGINES = ("torch",)

ProgressCallback = Callable[[Progress], None]


@dataclass(frozen=True)
class Prompted:
    """A problem with its place in the evaluation and its prompt as tokens."""

    position: int
    problem: Problem
    prompt_ids: Sequence[int]


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

    Problems are worked on a chunk at a time, so that memory does not grow with their number.
    With ``out``, each finished chunk is on disk before the next begins, and a later call with
    the same arguments continues after the last one; samples whose gold or grader has changed
    since are graded anew. A sample's randomness is addressed by
    (seed, row, sample), so it does not matter in which process it is drawn. The score is the
    grade's; step rewards of tasks that have them are not part of it.

    Args:
        model: folder, hub id, ``builtin:…``, or a loaded causal LM.
        env_id: a Gymnasium id such as ``distrl_envs:distrl/Countdown-v0``.
        env_config: arguments of the environment; a model given by name brings its tokenizer,
            a loaded one needs ``tokenizer`` here unless it speaks the task's own.
        settings: how to sample.
        out: folder for `evaluation.json` and `samples/part-*.parquet`; in memory when None.
        engine: "torch", or an engine for this model, which gets the model's weights.
        on_progress: called at the start and after every chunk.
        equivalent: compares normalised answers in votes; as the task does when None.
        overwrite: forget samples of another evaluation in ``out`` instead of refusing; those of
            this one are continued all the same.

    Returns:
        The graded samples.

    Raises:
        ValueError: settings out of bounds, an unknown environment or engine, a task that serves
            another split than the settings name (training problems are asked only where
            ``split="train"``), prompts too long for the model's window, or ``out`` holding
            another evaluation.
    """
    settings = settings or EvalSettings()
    settings.validate()
    if isinstance(engine, str) and engine not in ENGINES:
        raise ValueError(f"engine {engine!r} is unknown: choose one of {', '.join(ENGINES)}.")
    env = _make_env(env_id, _env_arguments(model, env_config or {}, settings))
    try:
        _check_split(env.get_wrapper_attr("task"), settings.split)
        loaded = _load(model, settings) if isinstance(model, str) else model
        run = _Evaluation(loaded, env.unwrapped, settings, engine)
        info = {"env_id": env_id, "env_config": _plain(env_config or {}), **run.identity()}
        folder = None if out is None else Path(out)
        if folder is None:
            records = [r for part in run.parts({}, on_progress) for r in part]
            frame = pd.DataFrame(records, columns=SCHEMA.names)
        else:
            frame = _sample_to_disk(
                run, SampleStore(folder, info, overwrite=overwrite), on_progress
            )
        if equivalent is None and isinstance(run.task, DataTask):
            equivalent = run.task.same_answer
        return EvalResult(frame, settings, folder, info, equivalent)
    finally:
        env.close()


class _Evaluation:
    """Model, engine and problems of one evaluation."""

    def __init__(
        self,
        model: PreTrainedModel,
        env: Any,
        settings: EvalSettings,
        engine: str | RolloutEngine,
    ):
        self.settings = settings
        self.task: Task = env.task
        self.length_until_stop: Callable[[Sequence[int]], int] = env.length_until_stop
        self.tokenizer: PreTrainedTokenizerBase = env.tokenizer
        self.max_tokens: int = settings.max_tokens or env.max_completion_tokens
        self.prompted = _prompts(env, settings.problems)
        _check_window(model, self.prompted, self.max_tokens)
        self.eos: Collection[int] = eos_token_ids(model, self.tokenizer)
        own = isinstance(engine, str)
        if own:
            engine = _torch_engine(model, self.eos, settings.max_batch_size)
        self.engine = engine
        self.weights = engine.load_weights(model.state_dict(), 0)
        if own:
            dtype = "float32" if model.dtype == torch.float32 else "bfloat16"
            check_engine(engine, model, settings.sampling(self.max_tokens), dtype)

    def identity(self) -> dict[str, Any]:
        """What decides the samples, beside the environment."""
        return {
            **self.settings.identity(),
            "max_tokens": self.max_tokens,
            "task": self.task.name,
            "weights": self.weights,
        }

    def changed(self, finished: Mapping[int, str]) -> str:
        """Says where finished problems are not those of the data any more; "" if they all are."""
        for prompted in self.prompted:
            key, now = finished.get(prompted.position), prompted.problem.key
            if key not in (None, now):
                return f"problem {prompted.position} was {key!r} and is {now!r}"
        return ""

    def is_stale(self, position: int, grading: str | None) -> bool:
        """Whether a stored grade is one of another gold or grader."""
        return position < len(self.prompted) and grading != self._gradings[position]

    def grade_anew(self, records: list[dict[str, Any]]) -> int:
        """Grades stored samples again whose gold or grader is another now; how many they were.

        The records are changed in place.
        """
        stale = [
            (record, self.prompted[record["problem"]].problem)
            for record in records
            if self.is_stale(record["problem"], record["grading"])
        ]
        grades = grades_of(
            self.task,
            [problem for _, problem in stale],
            [record["completion"] for record, _ in stale],
            [record["finish_reason"] == "length" for record, _ in stale],
        )
        for (record, _), grade in zip(stale, grades, strict=True):
            record |= _graded(grade, self._gradings[record["problem"]])
        return len(stale)

    @cached_property
    def _gradings(self) -> list[str]:
        """What identifies the grading of each problem."""
        return [self.task.grading_key(prompted.problem) for prompted in self.prompted]

    def parts(
        self, finished: Collection[int], on_progress: ProgressCallback | None
    ) -> Iterator[list[dict[str, Any]]]:
        """Yields the samples of one chunk of unfinished problems after another."""
        todo = [p for p in self.prompted if p.position not in finished]
        total, resumed = len(self.prompted), len(self.prompted) - len(todo)
        report = on_progress or (lambda progress: None)
        report(Progress(resumed, total, resumed))
        started, samples, tokens, score = time.perf_counter(), 0, 0, 0.0
        size = self.settings.problems_at_once(self.max_tokens)
        for start in range(0, len(todo), size):
            chunk = todo[start : start + size]
            records = self._sample(chunk)
            yield records
            samples += len(records)
            tokens += sum(r["tokens"] for r in records)
            score += sum(r["score"] for r in records)
            seconds = time.perf_counter() - started
            done = resumed + start + len(chunk)
            report(Progress(done, total, resumed, samples, tokens, seconds, score / samples))

    def _sample(self, chunk: Sequence[Prompted]) -> list[dict[str, Any]]:
        """Generates and grades all samples of some problems."""
        jobs = [(prompted, sample) for prompted in chunk for sample in range(self.settings.n)]
        requests = [
            Request(p.prompt_ids, (self.settings.seed, p.problem.row, sample, 0))
            for p, sample in jobs
        ]
        completions = [
            completion.cut(self.length_until_stop(completion.tokens.tolist()))
            for completion in self.engine.generate(
                requests, self.settings.sampling(self.max_tokens)
            )
        ]
        texts = [
            decode_completion(self.tokenizer, c.tokens.tolist(), self.eos) for c in completions
        ]
        truncated = [c.finish_reason == "length" for c in completions]
        grades = grades_of(self.task, [p.problem for p, _ in jobs], texts, truncated)
        return [
            _record(*job, completion, text) | _graded(grade, self._gradings[job[0].position])
            for job, completion, text, grade in zip(jobs, completions, texts, grades, strict=True)
        ]


def _sample_to_disk(
    run: _Evaluation, store: SampleStore, on_progress: ProgressCallback | None
) -> pd.DataFrame:
    """Finishes what ``store`` lacks; returns the samples of the problems asked for."""
    finished = store.finished()
    if changed := run.changed(finished):
        finished = store.forget(f"holds samples of other data: {changed}")
    if regraded := store.update(run.is_stale, run.grade_anew):
        print(
            f"Graded {regraded:,} stored samples anew: their gold or the grader has changed.",
            file=sys.stderr,
        )
    for part in run.parts(finished, on_progress):
        store.write(part)
    frame = store.light_frame()
    wanted = frame["problem"].to_numpy() < len(run.prompted)
    return frame.loc[wanted].reset_index(drop=True)


def _graded(grade: Grade, grading: str) -> dict[str, Any]:
    """The columns of `store.SCHEMA` that a grade decides."""
    return {
        "status": grade.status,
        "score": float(grade.score),
        "answer": grade.answer,
        "grading": grading,
    }


def _record(prompted: Prompted, sample: int, completion: Completion, text: str) -> dict[str, Any]:
    """One row of `store.SCHEMA`, its grade aside."""
    collapsed = " ".join(text.split())
    return {
        "problem": prompted.position,
        "row": prompted.problem.row,
        "key": prompted.problem.key,
        "sample": sample,
        "prompt": prompted.problem.prompt,
        "completion": text,
        "token_ids": completion.tokens.tolist(),
        "text_hash": blake2b(collapsed.encode(), digest_size=8).hexdigest(),
        "tokens": len(completion.tokens),
        "finish_reason": completion.finish_reason,
        "logp_sum": float(completion.logps.sum(dtype="float64")),
    }


def _env_arguments(
    model: str | PreTrainedModel, env_config: Mapping[str, Any], settings: EvalSettings
) -> dict[str, Any]:
    """The environment's arguments with split, limit and tokenizer filled in."""
    arguments: dict[str, Any] = dict(env_config)
    if not isinstance(env_config.get("task"), Task):  # A task that is made already has its split.
        arguments["split"] = settings.split
    if settings.max_tokens is not None:
        arguments["max_completion_tokens"] = settings.max_tokens
    if isinstance(model, str) and not model.startswith(BUILTIN_PREFIX):
        arguments.setdefault("tokenizer", model)
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


def _make_env(env_id: str, arguments: Mapping[str, Any]) -> gymnasium.Env:
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
