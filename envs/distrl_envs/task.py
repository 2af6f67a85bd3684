"""What a task is: problems by row number, a grader, and splits that never overlap."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from distrl_envs.user_code import named, source_of

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

SPLITS = ("train", "validation", "test")
TRAIN_SHARE = 0.70
VALIDATION_SHARE = 0.15
GENERATED_ROWS = 2**31 - 1
"""Length of a task that makes its problems up: as many rows as fit a 32-bit index."""

UNNUMBERED = -1
"""The row of a problem that was drawn freely instead of by its row number."""

PLACE = "place"
"""Key under which a problem's data holds its file and line, where it has them."""

LARGEST_SCORE = 3.4e38
"""Rewards are 32-bit floats."""

MOST_CRITIC_NUMBERS = 16
"""Most numbers per token that a task may tell a critic."""

CRITIC_OBSERVATIONS = ("none", "state", "text", "stock")
"""What a critic sees beside the tokens: nothing, `Task.critic_observation`, `Task.critic_text`, or
the return so far."""

STATUSES = (
    "correct", "wrong", "no_answer", "too_long", "timeout", "worker_died", "unchecked",
    "verifier_error",
)  # fmt: skip


class TaskError(RuntimeError):
    """A task's own code failed, or returned what it must not. That is never a score of 0.

    What the code raised is its `__cause__`.
    """


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        row: Index into its task, or `UNNUMBERED`.
        prompt: What the model is shown (compact form, for the task's own tokenizer).
        data: What the grader needs; never shown to the model.
        key: Identifies the problem whatever its row; equal keys are the same problem.
    """

    row: int
    prompt: str
    data: Mapping[str, Any] = field(hash=False)
    key: str


@dataclass(frozen=True)
class Grade:
    """A verdict.

    Attributes:
        score: The reward of the completion, usually 0.0 or 1.0; any finite number, also of
            NumPy or torch.
        status: One of `STATUSES`, or a name of one's own.
        answer: The answer in a normal form (equal text, equal answer), None where there is none.

    Raises:
        ValueError: For a score that is no finite number, and an empty status or none.
    """

    score: float
    status: str
    answer: str | None = None

    def __post_init__(self) -> None:
        """Refuses what would only be found out much later."""
        object.__setattr__(self, "score", checked_number(self.score, "score"))
        if not isinstance(self.status, str) or not self.status:
            raise ValueError(
                f"Got status {self.status!r}; it must be a word such as {', '.join(STATUSES)}."
            )
        if not isinstance(self.answer, str | None):
            raise ValueError(f"Got answer {self.answer!r}; it must be a string or None.")


@dataclass(frozen=True)
class Reply:
    """What the environment says when the model has ended a turn.

    Attributes:
        text: What the model reads next; empty only where the episode is over.
        role: Who says it, as the chat template names it: "user", "tool", …
        reward: Of the turn that is answered, on top of the final score; any finite number.
        over: Whether the episode ends with the model's turn. The text is then not shown to it.
        status: A word for metrics, such as "ok", "timeout", "unknown_tool".

    Raises:
        ValueError: For a reward that is no finite number, an empty status or role, a text that is
            none, and an empty text where the episode goes on.
    """

    text: str = ""
    role: str = "user"
    reward: float = 0.0
    over: bool = False
    status: str = "ok"

    def __post_init__(self) -> None:
        """Refuses what would only be found out much later."""
        object.__setattr__(self, "reward", checked_number(self.reward, "a turn's reward"))
        for name in ("role", "status"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise ValueError(f"Got {name} {value!r} of a reply; it must be a word.")
        if not isinstance(self.text, str) or not (self.text or self.over):
            raise ValueError(
                f"Got text {self.text!r} of a reply; it must be a string, and not an empty one "
                "unless the episode is over (over=True)."
            )


@dataclass(frozen=True)
class Turn:
    """One turn of the model, and what was replied.

    Attributes:
        completion: What the model wrote, decoded, without its EOS.
        reply: What the environment answered; None where it has not (yet).
    """

    completion: str
    reply: Reply | None = None


def checked_number(value: Any, what: str) -> float:
    """A reward as a float.

    Raises:
        ValueError: For what is no number (strings, None, tuples), NaN, and numbers that a 32-bit
            float cannot hold.
    """
    if type(value) is not float:
        try:
            value = float(value) if hasattr(type(value), "__float__") else _no_number(value, what)
        except (TypeError, RuntimeError):  # An array or tensor with several elements.
            _no_number(value, what)
    if not abs(value) <= LARGEST_SCORE:
        _no_number(value, what)
    return value


def _no_number(value: Any, what: str) -> NoReturn:
    raise ValueError(
        f"Got {what} {value!r:.80} ({type(value).__name__}); it must be a finite number."
    )


class Task(ABC):
    """Problems numbered by row, and their grader.

    A subclass must be picklable, and `problem(row)` must depend on the row alone, so that runners
    on different machines agree on it.

    Attributes:
        name: Short name, also in metrics.
        split: One of `SPLITS`.
        system_prompt: What goes before the prompt unless the environment is given its own.
        names_answers: Whether grades name the answer, for votes of a majority.
        has_step_reward: True where `step_reward` is to be asked at every step.
        max_turns: Default limit of the model's turns. Tasks that reply have more than one.
        reply_roles: The roles of its replies: that the chat template takes them is found out before
            anything is sampled.
        replies_slowly: Whether `respond` may take longer than a few milliseconds, as tools do. Many
            are then under way at a time, in threads, while the model goes on in other episodes.
        stop: Texts that end a turn, beside EOS and those that the environment is given.
        max_prompt_tokens: Default limit, in tokens of the task's own tokenizer.
        max_completion_tokens: Default limit including EOS, in tokens of its own tokenizer; of all
            turns together.
        max_reply_tokens: Default limit of each reply, in tokens of its own tokenizer.
        critic_numbers: Names of what `critic_observation` tells a critic, in order; none where it
            tells nothing.
        has_solutions: Whether `worked_solution` can be asked.
    """

    name: str = "task"
    split: str = "train"
    names_answers: bool = True
    has_step_reward: bool = False
    max_turns: int = 1
    reply_roles: Sequence[str] = ("user",)
    replies_slowly: bool = False
    stop: Sequence[str] = ()
    system_prompt: str | None = None
    max_prompt_tokens: int = 512
    max_completion_tokens: int = 512
    max_reply_tokens: int = 256
    critic_numbers: Sequence[str] = ()
    has_solutions: bool = False

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows."""

    @abstractmethod
    def problem(self, row: int) -> Problem:
        """The problem of a row, the same whenever and wherever it is asked for.

        Raises:
            ValueError: If the row is outside `range(len(self))`.
        """

    @abstractmethod
    def grade(self, problem: Problem, completion: str, *, truncated: bool = False) -> Grade:
        """Grades a completion; any text is gradable, malformed text scores 0.

        Args:
            problem: What was asked.
            completion: The decoded completion without its EOS.
            truncated: Whether the completion ended at its length limit instead of at EOS.
        """

    def grade_many(
        self, problems: Sequence[Problem], completions: Sequence[str], truncated: Sequence[bool]
    ) -> list[Grade]:
        """Grades a batch, in order; tasks with worker processes override it.

        Callers use `grades_of`, which says what went wrong where.
        """
        return [
            ask(self, "grade", problem, completion, truncated=cut)
            for problem, completion, cut in zip(problems, completions, truncated, strict=True)
        ]

    def respond(self, problem: Problem, turns: Sequence[Turn], draws: Draws) -> Reply | None:
        """What the environment says when the model has ended a turn.

        Asked after each turn that the model itself ended, the last that `max_turns` allows
        included. The answer must depend on the arguments alone: a task keeps nothing between
        calls, so that episodes may wait, move to another process and be played again.

        Args:
            problem: What was asked.
            turns: All turns so far; the last has no reply yet.
            draws: Random numbers of this turn, for replies that are a matter of chance.

        Returns:
            The reply; None ends the episode, as in a task with single turns.
        """
        return None

    def grade_turns(self, problem: Problem, turns: Sequence[Turn], *, truncated: bool) -> Grade:
        """Grades an episode of several turns: by default as its last turn alone is graded.

        Args:
            problem: What was asked.
            turns: All turns.
            truncated: Whether a limit ended the episode instead of the model or a reply.
        """
        return self.grade(problem, turns[-1].completion, truncated=truncated)

    def step_reward(self, problem: Problem, completion_ids: Sequence[int]) -> float:
        """Reward for the last token of `completion_ids`, on top of the final score.

        Asked only where `has_step_reward` is set. The sequence is the environment's own: read it,
        do not keep or change it.
        """
        return 0.0

    def critic_observation(
        self, problem: Problem, turns: Sequence[Turn], texts: Sequence[str]
    ) -> Sequence[Sequence[float]]:
        """What the verifier knows of the states of a turn, for the critic; no policy sees it.

        It must be a function of its arguments, that is of what is there before the token is
        chosen: a critic that sees it then leaves the policy's gradient unbiased (Baisero & Amato
        2022). Asked only with `critic_observation = "state"`.

        Args:
            problem: What was asked.
            turns: The turns before this one, each with its reply.
            texts: What the turn holds before each of its tokens, decoded; the first is "".

        Returns:
            For each of `texts` the numbers that `critic_numbers` names, each of about unit size.
        """
        raise NotImplementedError

    def critic_text(self, problem: Problem) -> str:
        """What is put before the tokens that the critic reads, such as a reference answer.

        No policy sees it. Asked only with `critic_observation = "text"`; "" where there is none.
        """
        return ""

    def worked_solution(self, problem: Problem) -> str:
        """A right completion, always the same of a problem, for learners that imitate one.

        Written as the model is to write it, without its EOS. Asked only with
        `demonstrations = True`, and where `has_solutions` is set.
        """
        raise NotImplementedError

    def instruction(self, problem: Problem) -> str:
        """The prompt for a tokenizer that is not the task's own, in plain language."""
        return problem.prompt

    def context(self, problem: Problem) -> Sequence[Mapping[str, str]]:
        """Messages that stand before the prompt, `{"role": ..., "content": ...}` each."""
        return ()

    def without(self, rows: Collection[int]) -> Task:
        """The same task without some of its rows, the others numbered anew.

        Raises:
            ValueError: If the task cannot leave rows out.
        """
        raise ValueError(f"The task {self.name!r} cannot leave rows out: raise max_prompt_tokens.")

    def describe_splits(self) -> str:
        """One line on how large the splits are and how they are cut; "" where nothing is known."""
        return ""

    def grading_key(self, problem: Problem) -> str:
        """What identifies the grading of a problem: what the grader is told, and its version.

        A stored grade holds as long as this stays. The version is a hash of the source of the task
        and of the graders, and the version of math-verify.
        """
        told = repr(sorted(problem.data.items(), key=lambda item: item[0]))
        return blake2b(
            f"{_version(type(self))}|{told}".encode("utf-8", "replace"), digest_size=8
        ).hexdigest()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The task's own small tokenizer.

        Raises:
            ValueError: If the task has none.
        """
        raise ValueError(
            f"The task {self.name!r} has no tokenizer of its own: got tokenizer=None; "
            "pass a tokenizer, or the path or id of one."
        )

    def check_row(self, row: int) -> None:
        """Raises ValueError unless the row exists."""
        if not 0 <= row < len(self):
            raise ValueError(
                f"Got row {row} for the task {self.name!r}; it must be in 0..{len(self) - 1}."
            )


def ask(task: Task, method: str, problem: Problem, *args: Any, **kwargs: Any) -> Any:
    """Calls a method of a task about a problem.

    Raises:
        TaskError: For whatever the method raises, `SystemExit` included, with the problem's row.
    """
    try:
        return getattr(task, method)(problem, *args, **kwargs)
    except TaskError:
        raise
    except (Exception, SystemExit) as error:
        raise TaskError(f"{_call(task, method, [problem])} failed: {named(error)}") from error


def grades_of(
    task: Task, problems: Sequence[Problem], completions: Sequence[str], truncated: Sequence[bool]
) -> list[Grade]:
    """The grades of a batch, each of them a `Grade`.

    Args:
        task: What grades.
        problems: The problem of each completion.
        completions: Decoded completions.
        truncated: Whether each ended at its length limit.

    Raises:
        TaskError: If the task fails, gives another number of grades, or what is none.
    """
    try:
        grades = list(task.grade_many(problems, completions, truncated))
    except TaskError:
        raise
    except (Exception, SystemExit) as error:
        where = _call(task, "grade_many", problems)
        raise TaskError(f"{where} failed: {named(error)}") from error
    if len(grades) != len(problems):
        where = _call(task, "grade_many", problems)
        raise TaskError(f"{where} returned {len(grades)} grades for {len(problems)} completions.")
    for problem, grade in zip(problems, grades, strict=True):
        check_grade(task, "grade", problem, grade)
    return grades


def check_grade(task: Task, method: str, problem: Problem, grade: Any) -> None:
    """Raises TaskError for what is no `Grade`, with the method that returned it and the row."""
    if not isinstance(grade, Grade):
        raise TaskError(
            f"{_call(task, method, [problem])} returned {grade!r:.80} "
            f"({type(grade).__name__}); it must return a Grade, such as "
            'Grade(1.0, "correct").'
        )


def _call(task: Task, method: str, problems: Sequence[Problem]) -> str:
    rows = [f"row {problem.row}{_place(problem)}" for problem in problems[:1]]
    if len({problem.row for problem in problems}) > 1:
        rows.append(f"row {problems[-1].row}{_place(problems[-1])}")
    return f"{described(task, method)} on {' to '.join(rows)}"


def described(task: Task, method: str) -> str:
    """A method of a task, and where it is written."""
    function = getattr(type(task), method)
    return f"{type(task).__qualname__}.{method}(){source_of(function)}"


def _place(problem: Problem) -> str:
    place = problem.data.get(PLACE) if isinstance(problem.data, Mapping) else None
    return f" ({place})" if place else ""


class GeneratedTask(Task):
    """A task that makes its problems up, deterministically in (seed, split, row).

    A subclass draws a problem together with a solution; draws are rejected until the problem's
    key belongs to the split. The split of a key depends on nothing else, so splits are disjoint
    across seeds too.
    """

    has_solutions = True

    def __init__(self, split: str = "train", seed: int = 0):
        """Chooses split and seed.

        Raises:
            ValueError: If the split is unknown.
        """
        if split not in SPLITS:
            raise ValueError(f"Got split {split!r}; it must be one of {', '.join(SPLITS)}.")
        self.split = split
        self.seed = int(seed)

    def __len__(self) -> int:
        """A fixed large number of rows; distant rows may hold the same problem."""
        return GENERATED_ROWS

    def describe_splits(self) -> str:
        """The shares of a hash of the problem; problems are made up as they are needed."""
        shares = (TRAIN_SHARE, VALIDATION_SHARE, 1.0 - TRAIN_SHARE - VALIDATION_SHARE)
        parts = [f"{name} {share:.0%}" for name, share in zip(SPLITS, shares, strict=True)]
        return f"Problems are made up; a hash of each decides its split: {', '.join(parts)}"

    @property
    def difficulty(self) -> str:
        """Everything but seed, split and row that the problems depend on."""
        return ""

    @abstractmethod
    def attempt(self, draws: Draws, row: int) -> tuple[Problem, str] | None:
        """Draws a problem and a solution of it, or None where the draw is not a fair problem."""

    @abstractmethod
    def solution(self, problem: Problem, rng: np.random.Generator) -> str:
        """A random valid solution, in the compact form."""

    def problem(self, row: int) -> Problem:
        """The problem of a row: counter-based, so any row costs the same."""
        self.check_row(row)
        address = f"{self.name}|{self.difficulty}|{self.seed}|{self.split}|{row}"
        return self._first_in_split(Draws(address.encode()), int(row))[0]

    def sample_solved(self, rng: np.random.Generator) -> tuple[Problem, str]:
        """A random problem of the split with a random solution, for supervised warm starts.

        Problems have the same law as `problem(row)` of a random row; their row is `UNNUMBERED`.
        """
        return self._first_in_split(Draws(rng.bytes(16)), UNNUMBERED)

    def demonstration(
        self, problem: Problem, rng: np.random.Generator, solution: str | None = None
    ) -> list[Turn]:
        """A whole episode for a warm start to imitate, with its replies; tasks that reply have one.

        It keeps to the rules but need not be good: what is imitated is the form.

        Args:
            problem: What is asked.
            rng: Decides which of many episodes.
            solution: A solution of the problem where one is known, to spare the search.
        """
        return [Turn(self.solution(problem, rng) if solution is None else solution)]

    def sample_demonstration(self, rng: np.random.Generator) -> tuple[Problem, list[Turn]]:
        """A random problem of the split with a demonstration, as `sample_solved` has a solution."""
        problem, solution = self.sample_solved(rng)
        return problem, self.demonstration(problem, rng, solution)

    def critic_text(self, problem: Problem) -> str:
        """A solution, always the same of a problem."""
        return self.worked_solution(problem)

    def worked_solution(self, problem: Problem) -> str:
        """One of the problem's solutions."""
        import numpy as np

        seed = int.from_bytes(blake2b(problem.key.encode(), digest_size=8).digest(), "big")
        return self.solution(problem, np.random.default_rng(seed))

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The number-level tokenizer that all generated tasks share."""
        from distrl_envs.tokenizers import small_tokenizer

        return small_tokenizer()

    def _first_in_split(self, draws: Draws, row: int) -> tuple[Problem, str]:
        while True:
            drawn = self.attempt(draws, row)
            if drawn is not None and split_of(drawn[0].key) == self.split:
                return drawn


class Draws:
    """A stream of small random integers that depends on its address alone.

    BLAKE2b in counter mode instead of a NumPy generator: cheap to start at any address, and the
    same on every platform and version.
    """

    LARGEST = 4096
    # 32 draws of at most 12 bits leave 128 of a block's 512 bits: the bias stays below 2**-116.
    PER_BLOCK = 32

    __slots__ = ("_address", "_block", "_left", "_value")

    def __init__(self, address: bytes):
        """Starts the stream of an address."""
        self._address = address
        self._block = 0
        self._left = 0
        self._value = 0

    def below(self, bound: int) -> int:
        """A uniform integer in 0..bound-1, for a bound of at most `LARGEST`."""
        assert 0 < bound <= self.LARGEST
        if not self._left:
            block = self._block.to_bytes(8, "little") + self._address
            self._value = int.from_bytes(blake2b(block).digest(), "little")
            self._block += 1
            self._left = self.PER_BLOCK
        self._left -= 1
        self._value, draw = divmod(self._value, bound)
        return draw

    def sample(self, population: int, count: int) -> list[int]:
        """`count` distinct integers of 0..population-1, in random order."""
        pool = list(range(population))
        for i in range(count):
            j = i + self.below(population - i)
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:count]


def played(
    task: Task,
    problem: Problem,
    move: Callable[[Problem, Sequence[Turn]], str],
    rng: np.random.Generator,
) -> list[Turn]:
    """Plays an episode to its end: all turns, each with its reply.

    Args:
        task: What replies.
        problem: What is asked.
        move: The next completion, from the problem and the turns so far.
        rng: Chooses the random numbers of the replies.

    Raises:
        TaskError: If the episode is longer than the task's own `max_turns`.
    """
    turns: list[Turn] = []
    while len(turns) < task.max_turns:
        turns.append(Turn(move(problem, turns)))
        reply = ask(task, "respond", problem, turns, Draws(rng.bytes(16)))
        turns[-1] = Turn(turns[-1].completion, reply)
        if reply is None or reply.over:
            return turns
    raise TaskError(
        f"{described(task, 'respond')} did not end an episode of row {problem.row} with turn "
        f"{task.max_turns}, the last of max_turns: it must then reply with over=True, or None."
    )


_DECIDES = (".py", ".toml")  # the graders, and the table of units


@lru_cache(maxsize=32)
def _version(kind: type) -> str:
    """A hash of the sources that a task's grades depend on."""
    files = {Path(__file__)}
    for parent in kind.__mro__:
        module = sys.modules.get(parent.__module__)
        if issubclass(parent, Task) and getattr(module, "__file__", None):
            files.add(Path(module.__file__))  # type: ignore[union-attr, arg-type]
    files |= {f for f in (Path(__file__).parent / "grading").iterdir() if f.suffix in _DECIDES}
    digest = blake2b(version("math-verify").encode(), digest_size=8)
    for content in sorted(file.read_bytes() for file in files):  # wherever the files lie
        digest.update(content)
    return digest.hexdigest()


def split_of(key: str) -> str:
    """The split that a problem belongs to: a hash of its key, 70 / 15 / 15 %."""
    share = int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big") / 2.0**64
    if share < TRAIN_SHARE:
        return "train"
    return "validation" if share < TRAIN_SHARE + VALIDATION_SHARE else "test"


def distinct_rows(task: Task, n: int, *, patience: int = 20_000) -> list[int]:
    """The first n rows whose problems differ from one another; all of them where a task has fewer.

    Args:
        task: Where the rows come from.
        n: How many rows.
        patience: Rows without a new problem after which the search in a task that makes its
            problems up ends.

    Raises:
        ValueError: If a task that makes its problems up does not make n different ones.
    """
    first: dict[str, int] = {}
    endless = len(task) >= GENERATED_ROWS
    last_new = row = 0
    while len(first) < n and row < len(task):
        if endless and row - last_new > patience:
            raise ValueError(
                f"Asked for {n} different problems of the task {task.name!r}, split "
                f"{task.split!r}; it holds about {len(first)}. Ask for fewer or make it harder."
            )
        key = task.problem(row).key
        if key not in first:
            first[key] = last_new = row
        row += 1
    return list(first.values())
