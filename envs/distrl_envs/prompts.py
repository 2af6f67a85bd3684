"""A task's problems as prompts in tokens, and the limit that each of them keeps."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from distrl_envs.task import GENERATED_ROWS, Problem, Task, TaskError, described
from distrl_envs.tokenizers import (
    check_chat_template_kwargs,
    is_small,
    mark_special,
    render_prompt,
)
from distrl_envs.user_code import named

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ON_LONG_PROMPT = ("error", "skip")

# More than a batch has: a runner asks for each prompt to generate, to grade and to replay.
KEPT_PROMPTS = 1024


class Prompts:
    """Problems and prompts by row.

    Attributes:
        task: The task, without the rows that are left out.
        max_tokens: Longest prompt allowed.
        system_prompt: See `system_prompt_of`.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int,
        *,
        completion_tokens: int,
        window: int | None = None,
        system_prompt: str | None = None,
        template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        on_long: str = "error",
    ):
        """Measures all prompts of a task with a fixed set of rows.

        Args:
            task: With at least one problem.
            tokenizer: With the task's own small one a prompt is the problem itself, with any other
                the task's instruction in plain language.
            max_tokens: Longest prompt allowed.
            completion_tokens: Longest completion.
            window: What a model takes at most of both; lowers `max_tokens` where it must.
            system_prompt: See `system_prompt_of`.
            template: Text around `{prompt}`; see `render_prompt`.
            chat_template_kwargs: Further variables of the chat template.
            on_long: What is done where prompts are too long: "error", or "skip" to leave their rows
                out and print how many.

        Raises:
            ValueError: On a prompt that is too long, a window without room for one, and arguments
                that the tokenizer does not know.
        """
        check_chat_template_kwargs(tokenizer, chat_template_kwargs)
        if on_long not in ON_LONG_PROMPT:
            raise ValueError(f"Got on_long_prompt={on_long!r}; it must be 'error' or 'skip'.")
        self.task = task
        self.max_tokens = max_tokens
        self._tokenizer = tokenizer
        self._compact = is_small(tokenizer)
        self.system_prompt = system_prompt_of(task, system_prompt)
        self._template = template
        self._variables = chat_template_kwargs
        self._window: int | None = None  # where it is what bounds the prompts
        self._kept: dict[int, tuple[Problem, list[int]]] = {}
        if window is not None:
            self._fit_window(window, completion_tokens)
        self._measure(on_long)

    def served(self, row: int) -> tuple[Problem, list[int]]:
        """Problem and prompt of a row; those of the rows served last are kept.

        Raises:
            ValueError: If there is no such row, or its prompt is too long.
            TaskError: As `problem`.
        """
        if row not in self._kept:
            problem = self.problem(row)
            if len(self._kept) >= KEPT_PROMPTS:
                self._kept.clear()
            self._kept[row] = (problem, self.ids(problem))
        return self._kept[row]

    def problem(self, row: int) -> Problem:
        """The problem of a row.

        Raises:
            ValueError: If there is no such row.
            TaskError: If the task fails, or returns no problem.
        """
        self.task.check_row(row)
        try:
            problem = self.task.problem(row)
        except (Exception, SystemExit) as error:
            what = f"{described(self.task, 'problem')} of row {row}"
            raise TaskError(f"{what} failed: {named(error)}") from error
        if not isinstance(problem, Problem) or not isinstance(problem.prompt, str):
            what = f"{described(self.task, 'problem')} of row {row}"
            raise TaskError(f"{what} returned {problem!r:.80}; it must return a Problem.")
        return problem

    def ids(self, problem: Problem) -> list[int]:
        """The prompt of a problem as tokens.

        Raises:
            ValueError: If it has more than `max_tokens`.
        """
        ids = self._encoded(problem)
        if len(ids) > self.max_tokens:
            raise ValueError(self._too_long({problem.row: len(ids)}))
        return ids

    def longest(self, lengths: Mapping[int, int]) -> tuple[str, int, str]:
        """Where the longest row stands, its length, and how many there are, for a message.

        Args:
            lengths: Of the rows that are too long.
        """
        row, length = max(lengths.items(), key=lambda item: item[1])
        place = self.task.problem(row).data.get("place")
        where = f"row {row} ({place})" if place else f"row {row}"
        count = f"; {len(lengths)} of {len(self.task)} are too long" if len(lengths) > 1 else ""
        return where, length, count

    def _fit_window(self, window: int, completion_tokens: int) -> None:
        left = window - completion_tokens
        if left < 1:
            raise ValueError(
                f"Got max_completion_tokens={completion_tokens}, which leaves no room for "
                f"a prompt in the model's window of {window} tokens: lower it."
            )
        if left < self.max_tokens:
            self.max_tokens, self._window = left, window

    def _measure(self, on_long: str) -> None:
        total = len(self.task)
        if total >= GENERATED_ROWS:
            return
        lengths = {row: self._tokens_above_limit(row) for row in range(total)}
        long = {row: length for row, length in lengths.items() if length}
        if not long:
            return
        if on_long == "error" or len(long) == total:
            raise ValueError(self._too_long(long))
        self.task = self.task.without(long)
        print(
            f"{self.task.name}: left out {len(long)} of {total} problems of the split "
            f"{self.task.split!r}, whose prompts have more than {self.max_tokens} tokens.",
            file=sys.stderr,
        )

    def _tokens_above_limit(self, row: int) -> int:
        """Tokens of a row's prompt if they are too many, else 0; most are short beyond doubt."""
        problem = self.problem(row)
        plain = not self.task.context(problem)
        text = problem.prompt if self._compact else self.task.instruction(problem)
        # No tokenizer makes more tokens than a text has bytes.
        if plain and self._frame_tokens + len(text.encode("utf-8", "replace")) <= self.max_tokens:
            return 0
        length = len(self._encoded(problem))
        return length if length > self.max_tokens else 0

    @cached_property
    def _frame_tokens(self) -> int:
        """Tokens around the text of a prompt."""
        return len(self._rendered("0", self.system_prompt))

    def _encoded(self, problem: Problem) -> list[int]:
        if self._compact:
            text = problem.prompt
        else:
            marked = mark_special(self._tokenizer, problem.prompt)
            text = self.task.instruction(replace(problem, prompt=marked))
        context = self.task.context(problem)
        system_prompt = self.system_prompt
        if any(message["role"] == "system" for message in context):
            system_prompt = None  # The row's own says what it asks for.
        try:
            return self._rendered(text, system_prompt, context)
        except ValueError as error:
            raise ValueError(f"Row {problem.row}: {error}") from error

    def _rendered(
        self, text: str, system_prompt: str | None, context: Sequence[Mapping[str, str]] = ()
    ) -> list[int]:
        return render_prompt(
            self._tokenizer, text, system_prompt, self._template, context, self._variables
        )

    def _too_long(self, lengths: Mapping[int, int]) -> str:
        where, length, count = self.longest(lengths)
        window = f", the model's window being {self._window}" if self._window else ""
        return (
            f"The prompt of {where} has {length} tokens; max_prompt_tokens is "
            f"{self.max_tokens}{window}{count}. Raise it where the window allows, or leave "
            "such rows out: on_long_prompt = 'skip' in env_config."
        )


def system_prompt_of(task: Task, given: str | None) -> str | None:
    """The task's, which may say what form of answer is graded, or else what is given.

    Args:
        task: Any.
        given: System message of the chat template, or text before the prompt.

    Raises:
        ValueError: Where both say one.
    """
    if given is not None and task.system_prompt is not None:
        raise ValueError(
            f"Got system_prompt={given!r:.80}, but the task {task.name!r} brings its own, which "
            "belongs to what it grades: set system_prompt in task_config instead."
        )
    return task.system_prompt if given is None else given
