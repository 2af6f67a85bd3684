"""What tasks over a data set share: rows, the prompt, three splits, a length penalty."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

from distrl_envs.data import CONTEXT, Column, Data, Numbered, load_data, problem_key, read_rows
from distrl_envs.formats import AS_IT_IS, find_format, read_chat
from distrl_envs.task import PLACE, SPLITS, Problem, Task

PROBLEM = Column((str, list))
"""The column of every task over data: a text, or a chat that ends with the user's question."""
SOLUTION = "worked_solution"
"""The column of `DataTask`'s `solution`."""
HOLDOUT = 0.2
"""Share of the problems that training never sees, half of it for validation, half for test."""


class DataTask(Task):
    """Problems from a data set; a subclass grades them.

    The system prompt, the instruction and the form of the answer belong to the task, so that what
    is asked for and what is graded cannot part ways.

    Attributes:
        system_prompt: System message, or None.
        data: The rows that passed, and what was left out, of the file that the split is in.
        asks_as_published: Whether rows of a published form that say how to answer are asked as
            they are; not where the user gave an instruction.
    """

    asks_as_published: bool = True

    def __init__(
        self,
        data: str | Path | Mapping[str, str],
        columns: Mapping[str, Column],
        *,
        instruction: str,
        gold: str | None = None,
        gold_key: Callable[[Any], Any] = lambda answer: answer,
        check: Callable[[dict[str, Any]], None] | None = None,
        system_prompt: str | None = None,
        fields: Mapping[str, str] | None = None,
        format: str | None = None,
        on_bad_row: str = "error",
        split: str = "train",
        seed: int = 0,
        holdout: float = HOLDOUT,
        length_penalty: float = 0.0,
        solution: str | None = None,
        read: Callable[[str], Numbered] = read_rows,
    ):
        """Loads the data.

        Args:
            data: A file or `hf:name/split`; see `load_data`. Or one for each split,
                `{"train": ..., "test": ...}`: these are whole, a split without a file of its own
                is cut out of the training file, and problems of "train" that stand in another
                file too are left out of training.
            columns: What the rows must hold; "problem" is the text that is asked.
            instruction: Prompt in which `{problem}` stands for the row's problem.
            gold: Column of the right answer, if any.
            gold_key: Makes answers comparable.
            check: Looks at a row as a whole.
            system_prompt: System message that goes with it.
            fields: The data's names for the columns, or paths into a row.
            format: A published form such as "gsm8k"; see `distrl_envs.formats`.
            on_bad_row: "error" or "skip".
            split: Which part is served.
            seed: Taken because every task takes one; the rows are those of the data.
            holdout: Share of the problems of one file, chosen by a hash of the problem, that
                training does not see: the first half is "validation", the second "test". With 0
                there is only "train".
            length_penalty: Taken off the reward for every token of the completion.
            solution: Field, or path into a row, that holds a right completion as the model is to
                write it; see `Task.worked_solution`.
            read: Yields the rows of a source, for those that are no files.

        Raises:
            ValueError: If the data has faults, the split is empty, or an argument is out of bounds.
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
        self.holdout = holdout
        self.has_solutions = solution is not None
        if solution is not None:
            columns = {**columns, SOLUTION: Column(field=solution)}
        self._sources = _sources(data)
        self._instruction = instruction
        self._read: Callable[[str], Data] | None = partial(
            load_data,
            columns=columns,
            fields=fields,
            form=find_format(format, self.name) if format is not None else None,
            on_bad_row=on_bad_row,
            gold=gold,
            gold_key=gold_key,
            read=read,
            check=partial(_complete, check=check, system_prompt=system_prompt),
        )
        self._loaded: dict[str, Data] = {}
        self.data, self._rows, self._overlap = self._served(split)
        if not self._rows:
            raise ValueError(_empty(split, self._sources, len(self.data.rows), holdout))

    def __getstate__(self) -> dict[str, Any]:
        """Travels with the rows that it serves, without the means to load others."""
        return {**self.__dict__, "_read": None, "_loaded": {}}

    def __len__(self) -> int:
        """Number of rows in the split."""
        return len(self._rows)

    def problem(self, row: int) -> Problem:
        """The problem of a row, in the order of the data."""
        self.check_row(row)
        index = self._rows[row]
        found = self.data.rows[index]
        data: dict[str, Any] = {**found, PLACE: self.data.places[index]}
        return Problem(int(row), found["problem"], data, self._key(found))

    def instruction(self, problem: Problem) -> str:
        """The prompt: the problem within the task's instruction.

        A row of a published form that says by itself how to answer is asked as it is.
        """
        if self.asks_as_published and problem.data.get(AS_IT_IS):
            return problem.prompt
        return self._instruction.replace("{problem}", problem.prompt)

    def context(self, problem: Problem) -> Sequence[Mapping[str, str]]:
        """The messages before the last one, where the row is a chat."""
        return problem.data.get(CONTEXT) or ()

    def grading_key(self, problem: Problem) -> str:
        """As for any task; where a row stands does not matter, nor a solution that is shown."""
        told = {name: x for name, x in problem.data.items() if name not in (PLACE, SOLUTION)}
        return super().grading_key(replace(problem, data=told))

    def without(self, rows: Collection[int]) -> DataTask:
        """The same task without some of its rows, the others numbered anew."""
        left_out = set(rows)
        kept = [index for row, index in enumerate(self._rows) if row not in left_out]
        other = object.__new__(type(self))  # `copy.copy` would make one that has travelled
        vars(other).update({**vars(self), "_rows": kept})
        return other

    def same_answer(self, one: str, other: str) -> bool:
        """Whether two answers, as they stand in grades, are the same one in a vote."""
        return one == other

    def worked_solution(self, problem: Problem) -> str:
        """That of the data."""
        return problem.data[SOLUTION]

    def step_reward(self, problem: Problem, completion_ids: Sequence[int]) -> float:
        """Minus the length penalty, for each token."""
        return -self.length_penalty

    def describe_splits(self) -> str:
        """How many different problems each split has, where from, and what stands in two files."""
        parts, notes = [], []
        for split in SPLITS:
            if split not in self._sources and "train" not in self._sources:
                continue
            data, rows, overlap = self._served(split)
            keys = {self._key(data.rows[index]) for index in rows}
            repeats = len(rows) - len(keys)
            again = f" ({repeats:,} of {len(rows):,} rows repeat one)" if repeats else ""
            parts.append(f"{split} {len(keys):,}{again}")
            if overlap:
                notes.append(
                    f"{overlap:,} problems of the file for {split} stand in a file for "
                    f"validation or test too and are left out of {split}"
                )
        cut = "train" in self._sources and set(self._sources) != set(SPLITS) and self.holdout > 0
        how = f", cut by a hash of the problem (holdout = {self.holdout:g})" if cut else ""
        files = ", ".join(dict.fromkeys(self._sources.values()))
        return "; ".join([f"Problems of {files}: {', '.join(parts)}{how}", *notes])

    def _served(self, split: str) -> tuple[Data, list[int], int]:
        """The file that a split is in, the rows that it serves, and how many are in two files."""
        own = [other for other in SPLITS[1:] if other in self._sources]
        if split in own:
            data = self._load(split)
            return data, list(range(len(data.rows))), 0
        if "train" not in self._sources:
            raise ValueError(
                f"There are no problems for the split {split!r}: data names files for "
                f"{', '.join(self._sources)} only. Name one for {split!r} or for 'train'."
            )
        data = self._load("train")
        keys = [self._key(row) for row in data.rows]
        rows = [i for i, key in enumerate(keys) if self._part(key, own) == split]
        elsewhere = {self._key(row) for other in own for row in self._load(other).rows}
        twice = {i for i in rows if keys[i] in elsewhere}
        return data, [i for i in rows if i not in twice], len({keys[i] for i in twice})

    def _key(self, row: dict[str, Any]) -> str:
        """What identifies the problem of a row."""
        return problem_key(row)

    def _part(self, key: str, own: Collection[str]) -> str:
        """The split of a problem of the training file; one with a file of its own gets none."""
        digest = blake2b(key.encode("utf-8", "replace"), digest_size=8).digest()
        share = int.from_bytes(digest, "big") / 2.0**64
        if share >= self.holdout:
            return "train"
        part = "validation" if share < self.holdout / 2 else "test"
        return "train" if part in own else part

    def _load(self, split: str) -> Data:
        source = self._sources[split]
        if source not in self._loaded:
            assert self._read is not None, "a task that has travelled serves its own split only"
            self._loaded[source] = self._read(source)
        return self._loaded[source]


def _complete(
    row: dict[str, Any],
    check: Callable[[dict[str, Any]], None] | None,
    system_prompt: str | None,
) -> None:
    """Takes a chat apart, then does what the subclass checks."""
    row["problem"], context = read_chat(row["problem"])
    if context:
        row[CONTEXT] = context
        if system_prompt and any(message["role"] == "system" for message in context):
            raise ValueError(
                "field 'problem' brings a system message, and so does system_prompt: remove one, "
                "or map only the question (problem = 'prompt[-1].content')"
            )
    if check is not None:
        check(row)


def _sources(data: str | Path | Mapping[str, str]) -> dict[str, str]:
    """The source of each split that has one; a single one is that of training."""
    if not isinstance(data, Mapping):
        return {"train": str(data)}
    if not data or not set(data) <= set(SPLITS):
        raise ValueError(
            f"Got data for {sorted(map(str, data))}; it must be a file, or one for some of "
            f"{', '.join(SPLITS)}."
        )
    return {split: str(data[split]) for split in SPLITS if split in data}


def _empty(split: str, sources: Mapping[str, str], rows: int, holdout: float) -> str:
    remedy = (
        f"Give it a file of its own, data = {{ train = ..., {split} = ... }}"
        if split != "train"
        else "Lower holdout"
    )
    if split != "train":
        remedy += f", or set holdout, a share of the problems such as {HOLDOUT:g}"
    why = "nothing is held out" if not holdout else f"holdout = {holdout:g}"
    return (
        f"The split {split!r} of {sources.get(split, sources.get('train'))} is empty: {why} and "
        f"the file has {rows} rows. {remedy}. Where the training problems themselves are to be "
        "asked, say so: split = 'train'."
    )
