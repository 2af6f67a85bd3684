"""Looking at a policy: fresh completions with what policy and critic thought at every token."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from distrl_envs.task import Task, distinct_rows
from rllib_distrl.algorithm.weight_sync import runner_weights
from rllib_distrl.learner.token_table import read_tokens
from rllib_distrl.method.prompt_samplers import PromptRequest
from rllib_distrl.method.token_table import (
    QUANTILES,
    REPLY_AT,
    REPLY_TEXTS,
    TOKEN_NUMBERS,
    TokenTable,
)
from rllib_distrl.rollout.completion_env_runner import CompletionEnvRunner
from rllib_distrl.rollout.groups import SamplingError, shards_of

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
# A character has at most four bytes, and a token at least one of them.
_LONGEST_CHARACTER = 4


def token_texts(tokenizer: Any, prompt_ids: Sequence[int], ids: Sequence[int]) -> list[str]:
    """The text that each token adds.

    Byte-level tokenizers split characters: the last token of a character carries it and the ones
    before it are empty. Every piece is decoded behind the token before it, because tokenizers
    drop a space at the start of a text.

    Args:
        tokenizer: of Hugging Face.
        prompt_ids: what came before.
        ids: T tokens of the completion.

    Returns:
        T texts.
    """
    texts: list[str] = []
    before, pending = list(prompt_ids[-1:]), []
    for token in ids:
        pending.append(token)
        start = _decode(tokenizer, before)
        whole = _decode(tokenizer, before + pending)
        text = whole[len(start) :] if whole.startswith(start) else _decode(tokenizer, pending)
        if text.endswith(UNFINISHED) and len(pending) < _LONGEST_CHARACTER:
            texts.append("")
            continue
        texts.append(text)
        before, pending = [token], []
    if pending:
        texts[-1] = UNFINISHED
    return texts


def single_texts(tokenizer: Any, ids: Iterable[np.ndarray]) -> dict[int, str]:
    """The text of each token by itself, for all ids that occur."""
    arrays = [np.ravel(some) for some in ids]
    unique = np.unique(np.concatenate(arrays)) if arrays else np.zeros(0, np.int64)
    return {token: _decode(tokenizer, [token]) for token in unique.tolist()}


def _decode(tokenizer: Any, ids: list[int]) -> str:
    known = len(tokenizer)
    parts = (
        [
            str(tokenizer.decode([token], skip_special_tokens=False))
            if token < known
            else UNFINISHED
            for token in ids
        ]
        if any(token >= known for token in ids)
        else [str(tokenizer.decode(ids, skip_special_tokens=False))]
    )
    return "".join(parts)


N_TOP = 5
_PER_TOKEN = (*TOKEN_NUMBERS, QUANTILES, "top_ids", "top_logps")


def inspect_policy(
    algo: Any,
    *,
    rows: Sequence[int] | None = None,
    problems: int = 16,
    num_generations: int | None = None,
    split: str | None = None,
    n_top: int = N_TOP,
) -> TokenTable:
    """Samples with the current weights and asks the learner about every token.

    Training is not touched: sampling runs in a runner of its own, with random numbers of its own.

    Args:
        algo: a built `Algorithm`, ours or stock, wired by `wire_language_model`.
        rows: problems of the task; None: the first ``problems`` different ones.
        problems: how many, where ``rows`` is None; fewer if the task has fewer.
        num_generations: completions per problem; None: as in training.
        split: of the task; None: the one that is trained on.
        n_top: likeliest tokens to keep per token.

    Returns:
        The table. What the algorithm does not have (quantiles of a scalar critic) is missing;
        `TokenTable.why_missing` says why.

    Raises:
        ValueError: fewer problems than learners, or none.
        SamplingError: for an error while sampling.
    """
    runner = held_out_runner(algo, split)
    try:
        task = runner.token_env.unwrapped.task
        chosen = list(rows) if rows is not None else distinct_rows(task, problems)
        generations = num_generations or runner.rollout.num_generations
        groups = sample(algo, runner, chosen, generations)
        tokenizer = runner.token_env.unwrapped.tokenizer
        frame = _frame(groups, score(algo, groups, n_top), task, tokenizer)
    finally:
        runner.stop()
    return TokenTable(frame, _info(algo, frame, task.split))


def held_out_runner(algo: Any, split: str | None) -> Any:
    """A local runner with random numbers of its own; the caller stops it.

    Args:
        algo: whose env and settings it takes.
        split: of the task; None: the one that is trained on.
    """
    config = algo.config.copy(copy_frozen=False)
    config.env_runners(num_env_runners=0)
    made = isinstance(config.env_config.get("task"), Task)  # Such a task has its split.
    if split is not None or not made:
        split = split or config.env_config.get("split") or "train"
        config.environment(env_config={**config.env_config, "split": split})
    config.in_evaluation = True  # random numbers apart from those of training
    return CompletionEnvRunner(config=config, worker_index=0)


def sample(algo: Any, runner: Any, rows: list[int], generations: int) -> list[list[Any]]:
    """Completes rows with the learner's present weights; one list of episodes per row.

    Raises:
        ValueError: fewer rows than learners.
        SamplingError: for an error while sampling.
    """
    learners = max(algo.config.num_learners, 1)
    if len(rows) < learners:
        raise ValueError(f"got {len(rows)} problems; {learners} learners need one each")
    update, (_, weights_hash) = runner_weights(algo.learner_group, runner.rollout.dtype)
    runner.set_state(update)
    report = runner.sample_prompts([PromptRequest(row, 0) for row in rows], generations)
    if report.error is not None:
        raise SamplingError(f"Sampling failed: {report.error.text}")
    if report.weights_hash != weights_hash:
        raise RuntimeError("The runner sampled with other weights than the learner's.")
    episodes = report.episodes
    return [episodes[i : i + generations] for i in range(0, len(episodes), generations)]


def score(algo: Any, groups: list[list[Any]], n_top: int) -> list[dict[str, Any]]:
    """One dict of arrays per episode, in the order of ``groups``."""
    learners = max(algo.config.num_learners, 1)
    shards = shards_of(groups, learners)
    results = algo.learner_group.foreach_learner(
        read_tokens, shards=shards, k=max(algo.iteration, 1), n_top=n_top
    )
    scored: dict[tuple[int, int], dict[str, Any]] = {}
    for result in results:
        found = result.get()
        rank, mask = found.pop("rank"), found.pop("mask")
        size = len(groups[0])
        for number, marked in enumerate(mask):
            place = (rank + learners * (number // size), number % size)
            scored[place] = {name: column[number][marked] for name, column in found.items()}
    return [scored[group, sample] for group, sample in sorted(scored)]


def _frame(
    groups: list[list[Any]], scored: list[dict[str, Any]], task: Any, tokenizer: Any
) -> pd.DataFrame:
    rows = []
    episodes = [(number, episode) for number, group in enumerate(groups) for episode in group]
    vocabulary = single_texts(tokenizer, [columns["top_ids"] for columns in scored])
    for (number, episode), columns in zip(episodes, scored, strict=True):
        first, last = episode.infos[0], episode.infos[-1]
        problem = task.problem(first["row"])
        ids = np.asarray(episode.actions.data, dtype=np.int64)
        grade = last["grade"]
        texts, replies = _texts(tokenizer, first, ids.tolist())
        rows.append(
            {
                "problem": number,
                "row": first["row"],
                "sample": first["sample"],
                "key": problem.key,
                "prompt": problem.prompt,
                "completion": last["completion"],
                "score": float(episode.get_return()),
                "status": grade.status,
                "finish_reason": last["finish_reason"],
                "answer": grade.answer,
                "token": ids.astype(np.int32),
                "text": texts,
                REPLY_AT: np.array([at for at, _ in replies], dtype=np.int32),
                REPLY_TEXTS: [text for _, text in replies],
                "top_texts": [vocabulary[i] for i in columns["top_ids"].ravel().tolist()],
                **{name: _flat(columns[name]) for name in _PER_TOKEN if name in columns},
            }
        )
    frame = pd.DataFrame(rows)
    if not any(map(len, frame[REPLY_AT])):
        frame = frame.drop(columns=[REPLY_AT, REPLY_TEXTS])
    return frame


def _texts(
    tokenizer: Any, first: dict[str, Any], ids: list[int]
) -> tuple[list[str], list[tuple[int, str]]]:
    """Texts of the sampled tokens, and of the replies among them with their places."""
    texts, replies, before, start = [], [], list(first["prompt_ids"]), 0
    for at, reply in first.get("replies", ()):
        turn = ids[start:at]
        texts += token_texts(tokenizer, before, turn)
        replies.append((at, "".join(token_texts(tokenizer, turn, reply))))
        before, start = list(reply), at
    return texts + token_texts(tokenizer, before, ids[start:]), replies


def _flat(column: np.ndarray) -> np.ndarray:
    return column.ravel().astype(np.int32 if column.dtype.kind == "i" else np.float32)


def _info(algo: Any, frame: pd.DataFrame, split: str) -> dict[str, Any]:
    name = type(algo).__name__
    reasons = {
        "value": f"{name} has no critic.",
        "quantiles": f"the critic of {name} predicts one number, not a distribution.",
        "bonus": f"{name} adds no bonus here.",
        "advantage": f"{name} computes its advantages from whole training batches.",
        "advantage_used": f"{name} computes its advantages from whole training batches.",
    }
    return {
        "algorithm": name,
        "model": str(algo.config.model_config["model"]),
        "environment": str(algo.config.env),
        "iteration": int(algo.iteration),
        "split": split,
        "missing": {key: why for key, why in reasons.items() if key not in frame.columns},
    }
