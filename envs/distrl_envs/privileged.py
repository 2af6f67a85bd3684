"""What learners are told and no policy: numbers or a text for the critic, and worked solutions.

Nothing that an environment lets a policy observe depends on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from distrl_envs.prompts import KEPT_PROMPTS, Prompts
from distrl_envs.task import (
    CRITIC_OBSERVATIONS,
    GENERATED_ROWS,
    MOST_CRITIC_NUMBERS,
    Problem,
    Task,
    TaskError,
    Turn,
    ask,
    described,
)
from distrl_envs.tokenizers import encode_marked, mark_special
from distrl_envs.turns import EnvReply

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_CRITIC_TEXT = 512
"""Tokens at which a text for the critic is cut, if the model's window does not cut it before."""


def critic_numbers(
    task: Task,
    problem: Problem,
    completion: Sequence[int],
    replies: Sequence[EnvReply],
    decoded: Callable[[Sequence[int]], str],
) -> np.ndarray:
    """What the task tells a critic of the state before each sampled token.

    Args:
        task: With `critic_observation`.
        problem: Of the episode.
        completion: All T tokens that were sampled.
        replies: What was replied, in order.
        decoded: Tokens of a turn as text.

    Returns:
        (T, n) float32, a column for each of the task's `critic_numbers`.

    Raises:
        TaskError: If the task fails, or gives other than n finite numbers per token.
    """
    found: list[Sequence[float]] = []
    turns: list[Turn] = []
    start = 0
    for reply in (*replies, None):
        end = len(completion) if reply is None else reply.at
        turn = completion[start:end]
        texts = [decoded(turn[:length]) for length in range(len(turn))]
        if texts:
            found += ask(task, "critic_observation", problem, tuple(turns), texts)
        turns.append(Turn(decoded(turn), reply.reply if reply is not None else None))
        start = end
    return _checked_numbers(task, problem, found, len(completion))


def _checked_numbers(task: Task, problem: Problem, found: Any, tokens: int) -> np.ndarray:
    numbers = len(task.critic_numbers)
    try:
        array = np.asarray(found, dtype=np.float32)
    except (TypeError, ValueError):
        array = np.full(0, np.nan, dtype=np.float32)
    if array.shape != (tokens, numbers) or not np.isfinite(array).all():
        raise TaskError(
            f"{described(task, 'critic_observation')} on row {problem.row} returned "
            f"{found!r:.80}; it must return, for each of the texts, {numbers} finite numbers: "
            f"{', '.join(task.critic_numbers)}."
        )
    return array


def critic_text(
    task: Task, problem: Problem, tokenizer: PreTrainedTokenizerBase, room: int
) -> list[int]:
    """The task's text for the critic as tokens.

    Args:
        task: With `critic_text`.
        problem: What it is about.
        tokenizer: Of the model.
        room: Tokens at which it is cut; see `room_of_critic`.

    Raises:
        TaskError: If the task fails, or returns no text.
    """
    text = ask(task, "critic_text", problem)
    if not isinstance(text, str):
        what = f"{described(task, 'critic_text')} on row {problem.row}"
        raise TaskError(f"{what} returned {text!r:.80}; it must return a text.")
    return list(encode_marked(tokenizer, mark_special(tokenizer, text), special=False))[:room]


def room_of_critic(
    task: Task, wanted: str, *, replies: bool, context_tokens: int, window: int | None
) -> int:
    """Most tokens of a text for the critic.

    Args:
        task: Of the environment.
        wanted: One of `CRITIC_OBSERVATIONS`.
        replies: Whether the task replies.
        context_tokens: Longest episode.
        window: Tokens that the model takes at most.

    Raises:
        ValueError: If the task tells a critic nothing of what is asked for, or there is no room
            for it.
    """
    if wanted not in CRITIC_OBSERVATIONS:
        raise ValueError(
            f"Got critic_observation {wanted!r}; it must be one of "
            f"{', '.join(CRITIC_OBSERVATIONS)}."
        )
    method = {"state": "critic_observation", "text": "critic_text"}.get(wanted)
    if method and getattr(type(task), method) is getattr(Task, method):
        raise ValueError(
            f"Got critic_observation={wanted!r}, but the task {task.name!r} has no method "
            f"{method}: leave critic_observation out, or give the task one."
        )
    if wanted == "state" and not 1 <= len(task.critic_numbers) <= MOST_CRITIC_NUMBERS:
        raise ValueError(
            f"The task {task.name!r} names {len(task.critic_numbers)} critic_numbers; it must "
            f"name 1 to {MOST_CRITIC_NUMBERS} of what its method critic_observation gives."
        )
    if wanted == "stock" and not (task.has_step_reward or replies):
        raise ValueError(
            f"Got critic_observation='stock', but the task {task.name!r} rewards the end of an "
            "episode alone: the return so far is 0 at every token. Leave critic_observation "
            "out; where a wrapper gives rewards before the end, let the task have "
            "has_step_reward = True."
        )
    room = MOST_CRITIC_TEXT if window is None else min(MOST_CRITIC_TEXT, window - context_tokens)
    if wanted == "text" and room < 1:
        raise ValueError(
            f"Got critic_observation='text', but episodes of up to {context_tokens} "
            f"tokens fill the model's window of {window}: the critic has no room for a text. "
            "Lower max_prompt_tokens or max_completion_tokens."
        )
    return room


class Demonstrations:
    """Worked solutions as completions."""

    def __init__(
        self,
        prompts: Prompts,
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int,
        ends_turn: Callable[[Sequence[int]], bool],
    ):
        """Measures those of a fixed set of rows.

        Args:
            prompts: Of a task with worked solutions.
            tokenizer: Of the model.
            max_tokens: Longest completion.
            ends_turn: Whether a completion has ended; others get an EOS.

        Raises:
            ValueError: If the task has none, or one does not fit.
            TaskError: If the task fails, or returns no text.
        """
        self._prompts, self._tokenizer = prompts, tokenizer
        self._max_tokens, self._ends_turn = max_tokens, ends_turn
        self._kept: dict[int, np.ndarray] = {}
        task = prompts.task
        if not task.has_solutions:
            raise ValueError(
                f"Got demonstrations=True, which methods that imitate ask for, but the task "
                f"{task.name!r} has no worked solutions. A task over data takes them from a "
                "column: task_config = {solution = 'FIELD'}; one of your own has them with "
                "has_solutions = True and the method worked_solution. Or use another method."
            )
        self._measure()

    def ids(self, row: int) -> np.ndarray:
        """The worked solution of a row, (T,) int64.

        Raises:
            ValueError: If it is too long.
            TaskError: If the task fails, or returns no text.
        """
        if row not in self._kept:
            ids = self._encoded(self._prompts.served(row)[0])
            if len(ids) > self._max_tokens:
                raise ValueError(self._too_long({row: len(ids)}))
            if len(self._kept) >= KEPT_PROMPTS:
                self._kept.clear()
            self._kept[row] = np.array(ids, dtype=np.int64)
        return self._kept[row]

    def _encoded(self, problem: Problem) -> list[int]:
        marked = mark_special(self._tokenizer, self._text(problem))
        ids = list(encode_marked(self._tokenizer, marked, special=False))
        eos = int(self._tokenizer.eos_token_id)  # type: ignore[arg-type]
        return ids if ids and self._ends_turn(ids) else [*ids, eos]

    def _text(self, problem: Problem) -> str:
        task = self._prompts.task
        text = ask(task, "worked_solution", problem)
        if not isinstance(text, str) or not text.strip():
            what = f"{described(task, 'worked_solution')} on row {problem.row}"
            raise TaskError(f"{what} returned {text!r:.80}; it must return a text.")
        return text

    def _measure(self) -> None:
        task = self._prompts.task
        if len(task) >= GENERATED_ROWS:
            return
        long = {}
        for problem in map(self._prompts.problem, range(len(task))):
            # No tokenizer makes more tokens than a text has bytes.
            size = len(self._text(problem).encode("utf-8", "replace"))
            if size >= self._max_tokens:
                length = len(self._encoded(problem))
                if length > self._max_tokens:
                    long[problem.row] = length
        if long:
            raise ValueError(self._too_long(long))

    def _too_long(self, lengths: dict[int, int]) -> str:
        where, length, count = self._prompts.longest(lengths)
        return (
            f"The worked solution of {where} has {length} tokens, EOS included, and "
            f"max_completion_tokens is {self._max_tokens}{count}. Raise it, or leave "
            "such rows out of the data."
        )
