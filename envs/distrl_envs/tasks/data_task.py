"""What tasks over a data set share: rows, the prompt, a held-out part, a length penalty."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from distrl_envs.data import Column, Data, load_data, same_problem_key
from distrl_envs.task import PLACE, SPLITS, Problem, Task


class DataTask(Task):
    """Problems from a data set; a subclass grades them.

    The system prompt, the instruction and the form of the answer belong to the task, so that what
    is asked for and what is graded cannot part ways.

    Attributes:
        system_prompt: System message, or None.
        data: The rows that passed, and what was left out.
    """

    def __init__(
        self,
        data: str | Path,
        columns: Mapping[str, Column],
        *,
        instruction: str,
        gold: str | None = None,
        gold_key: Callable[[Any], Any] = lambda answer: answer,
        check: Callable[[dict[str, Any]], None] | None = None,
        system_prompt: str | None = None,
        fields: Mapping[str, str] | None = None,
        on_bad_row: str = "error",
        split: str = "train",
        seed: int = 0,
        holdout: float = 0.0,
        length_penalty: float = 0.0,
    ):
        """Loads the data.

        Args:
            data: A file or `hf:name/split`; see `load_data`.
            columns: What the rows must hold; "problem" is the text that is asked.
            instruction: Prompt in which `{problem}` stands for the row's problem.
            gold: Column of the right answer, if any.
            gold_key: Makes answers comparable.
            check: Looks at a row as a whole.
            system_prompt: System message that goes with it.
            fields: The data's names for the columns.
            on_bad_row: "error" or "skip".
            split: Which part is served. Without a holdout the data is its own split, and any name
                serves all of it.
            seed: Taken because every task takes one; the rows are those of the data.
            holdout: Share of the problems, chosen by their hash, that only "validation" and "test"
                serve.
            length_penalty: Taken off the reward for every token of the completion.

        Raises:
            ValueError: If the data has faults or an argument is out of bounds.
        """
        if split not in SPLITS:
            raise ValueError(f"Got split {split!r}; it must be one of {', '.join(SPLITS)}.")
        if not 0.0 <= holdout < 1.0:
            raise ValueError(f"Got holdout={holdout}; it must be in [0, 1).")
        if length_penalty < 0.0:
            raise ValueError(f"Got length_penalty={length_penalty}; it must not be negative.")
        if "{problem}" not in instruction:
            raise ValueError(
                f"Got the instruction {instruction!r}; it must contain {{problem}} where the text "
                "of the problem goes."
            )
        self.split = split
        self.system_prompt = system_prompt
        self.length_penalty = length_penalty
        self.has_step_reward = length_penalty > 0.0
        self.data = load_data(
            data,
            columns,
            fields=fields,
            on_bad_row=on_bad_row,
            gold=gold,
            gold_key=gold_key,
            check=check,
        )
        self._instruction = instruction
        self._rows = _part(self.data, split, holdout)
        if not self._rows:
            raise ValueError(f"The split {split!r} of {data} is empty: change holdout={holdout}.")

    def __len__(self) -> int:
        """Number of problems in the split."""
        return len(self._rows)

    def problem(self, row: int) -> Problem:
        """The problem of a row, in the order of the data."""
        self.check_row(row)
        index = self._rows[row]
        found = self.data.rows[index]
        data: dict[str, Any] = {**found, PLACE: self.data.places[index]}
        return Problem(int(row), found["problem"], data, same_problem_key(found["problem"]))

    def instruction(self, problem: Problem) -> str:
        """The prompt: the problem within the task's instruction."""
        return self._instruction.replace("{problem}", problem.prompt)

    def same_answer(self, one: str, other: str) -> bool:
        """Whether two answers, as they stand in grades, are the same one in a vote."""
        return one == other

    def step_reward(self, problem: Problem, completion_ids: Sequence[int]) -> float:
        """Minus the length penalty, for each token."""
        return -self.length_penalty


def _part(data: Data, split: str, holdout: float) -> list[int]:
    """Indices of the rows that a split serves; equal problems are on the same side."""
    if not holdout:
        return list(range(len(data.rows)))
    held = [_share(same_problem_key(row["problem"])) < holdout for row in data.rows]
    return [index for index, out in enumerate(held) if out == (split != "train")]


def _share(key: str) -> float:
    digest = blake2b(key.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2.0**64
