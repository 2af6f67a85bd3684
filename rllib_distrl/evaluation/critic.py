"""What a trained critic is worth on an evaluation's samples: choosing among them, and stopping."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import ray

from distrl_envs.task import Grade
from distrl_envs.token_env import Verdict
from distrl_envs.tokenizers import load_tokenizer
from rllib_distrl.algorithm.wiring import env_settings
from rllib_distrl.engine.protocol import Completion, Request
from rllib_distrl.evaluation.data import EvalData
from rllib_distrl.evaluation.evaluate import env_arguments, make_env
from rllib_distrl.evaluation.result import SCHEMA, EvalResult, read_part, sample_parts
from rllib_distrl.evaluation.sampling import replies_of
from rllib_distrl.learner.token_table import judge_tokens
from rllib_distrl.maths.choosing import (
    Stopping,
    best_by_value,
    group_answers,
    stopping,
    weighted_vote,
)
from rllib_distrl.rollout.episodes import Played, build_episode, play

LEVEL = 0.9
"""Of the quantile that decides about stopping."""
THRESHOLDS = (0.02, 0.05, 0.1, 0.2)
_AT_ONCE = 256  # completions whose columns the critic reads at a time


def check_judge(config: Any) -> None:
    """Refuses a run whose critic cannot judge samples.

    Args:
        config: its algorithm's.

    Raises:
        ValueError: for no critic, or one of RLlib's own algorithms.
    """
    critic = getattr(config, "critic", None)
    if critic is None:
        raise ValueError(
            f"--critic names a run of {type(config).__name__.removesuffix('Config')}; it must be "
            "a run of one of our algorithms, whose critic knows the law of the return."
        )
    if critic == "none":
        raise ValueError("--critic names a run with critic = 'none'. Name one that has a critic.")


def judge_samples(algo: Any, model: str, data: EvalData, result: EvalResult) -> dict[str, Any]:
    """Lets a critic read all samples of an evaluation.

    A completion's value is that of the state before its last token. All completions ran on, also
    where the critic had given them up, so what a stop would have cost is exact for the sample.

    Args:
        algo: a built algorithm of ours with the critic's weights.
        model: what sampled; its tokens must be those of the critic.
        data: what was asked.
        result: the samples.

    Returns:
        ``best@k`` of each k (the completion of the highest value among k), ``vote@n`` (the answer
        of the highest sum of values among all n) and ``maj@n`` (of most votes) where grades name
        answers, ``level``, and ``stopping``: `choosing.Stopping` as a dict for each of
        `THRESHOLDS`, None for NaN.

    Raises:
        ValueError: another vocabulary, or completions that do not fit into the critic's window.
    """
    env = judge_env(algo.config, model, data)
    try:
        judged = [one for part in _parts(result) for one in _judged(algo, env, part)]
    finally:
        env.close()
    frame = pd.DataFrame(judged).sort_values(["problem", "sample"], kind="stable")
    frame = frame.reset_index(drop=True)
    found: dict[str, Any] = _choices(frame, result) | {"level": LEVEL}
    scores = np.maximum(frame["score"].to_numpy(), 0.0)
    upper = list(frame["upper"])
    found["stopping"] = [_plain(stopping(upper, scores, each)) for each in THRESHOLDS]
    return found


def _plain(found: Stopping) -> dict[str, float | None]:
    """As JSON can hold it, which knows no NaN."""
    return {name: None if np.isnan(value) else value for name, value in vars(found).items()}


def judge_env(config: Any, model: str, data: EvalData) -> Any:
    """The environment of an evaluation, as a critic reads it.

    Args:
        config: of the critic's algorithm.
        model: what is evaluated.
        data: what is asked.

    Raises:
        ValueError: another vocabulary, a task that does not tell what the critic observes, or
            samples that may not fit into the critic's window.
    """
    critic = config.model_config["model"]
    of_critic = env_settings(critic, config.rollout_settings, "token")
    told = {name: of_critic[name] for name in ("window", "eos_token_ids") if name in of_critic}
    if config.critic_observation != "none":
        told["critic_observation"] = config.critic_observation
    env = make_env(data.env_id, {**env_arguments(model, data.env_config, data.settings), **told})
    try:
        _check_tokens(env.unwrapped, critic)
    except Exception:
        env.close()
        raise
    return env


def _check_tokens(env: Any, model: str) -> None:
    own = None if model.startswith("builtin:") else model
    if load_tokenizer(own, env.task).get_vocab() != env.tokenizer.get_vocab():
        raise ValueError(
            f"--critic reads the tokens of {model!r}, and the samples are of another vocabulary: "
            "evaluate a model with the critic's tokenizer."
        )


def _parts(result: EvalResult) -> Iterator[list[dict[str, Any]]]:
    """The samples with their tokens, some at a time."""
    if result.folder is None:
        tables = [pa.Table.from_pandas(result.frame, SCHEMA, preserve_index=False)]
    else:
        tables = (read_part(part, SCHEMA.names) for part in sample_parts(result.folder))
    problems = set(result.frame["problem"].tolist())
    for table in tables:
        for batch in table.to_batches(max_chunksize=_AT_ONCE):
            yield [record for record in batch.to_pylist() if record["problem"] in problems]


def _judged(algo: Any, env: Any, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not records:
        return []
    episodes = ray.put([_episode(env, record) for record in records])
    (told,) = algo.learner_group.foreach_learner(judge_tokens, shard=episodes, level=LEVEL)
    values, upper = told.get()
    kept = ("problem", "sample", "score", "answer")
    return [
        {**{name: record[name] for name in kept}, "value": float(value[-1]), "upper": bound}
        for record, value, bound in zip(records, values, upper, strict=True)
    ]


def _episode(env: Any, record: Mapping[str, Any]) -> Any:
    _, info = env.reset(options={"row": record["row"]})
    tokens = np.asarray(record["token_ids"], dtype=np.int64)
    completion = Completion(
        tokens,
        np.zeros(len(tokens)),
        record["finish_reason"],
        replies=tuple(replies_of(record)),
        versions=np.zeros_like(tokens),
    )
    request = Request(info["prompt_ids"], (0, record["row"], record["sample"], 0))
    if env.unwrapped.critic_observation == "stock":  # The rewards before the end are needed too.
        grade = Grade(record["score"], record["status"], record["answer"])
        played = play(env, request, completion, Verdict(record["completion"], grade))
        return build_episode(env, request, completion, played, {})
    infos = [info, *[{}] * len(tokens)]
    rewards = [0.0] * (len(tokens) - 1) + [record["score"]]
    played = Played([0, *tokens.tolist()], rewards, infos, terminated=True, truncated=False)
    return build_episode(env, request, completion, played, {})


def _choices(frame: pd.DataFrame, result: EvalResult) -> dict[str, float]:
    """Means over problems."""
    problems = [group for _, group in frame.groupby("problem", sort=True)]
    n = len(problems[0])
    ks = [k for k in result.settings.ks if k <= n]
    found = {
        f"best@{k}": _mean(best_by_value(p["value"], p["score"], k) for p in problems) for k in ks
    }
    if all(pd.isna(answer) for answer in frame["answer"]):
        return found
    labels = [
        group_answers([None if pd.isna(a) else a for a in p["answer"]], result.equivalent)
        for p in problems
    ]
    votes = list(zip(labels, problems, strict=True))
    found[f"vote@{n}"] = _mean(
        weighted_vote(label, p["score"], np.maximum(p["value"], 0.0)) for label, p in votes
    )
    ones = np.ones(n)
    found[f"maj@{n}"] = _mean(weighted_vote(label, p["score"], ones) for label, p in votes)
    return found


def _mean(values: Iterator[float]) -> float:
    return float(np.mean(list(values)))
