"""Countdown: combine the given numbers with + - * to reach a target."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from math import exp, log
from operator import add, mul, sub
from typing import TYPE_CHECKING

from distrl_envs.task import Draws, GeneratedTask, Grade, Problem, Turn

if TYPE_CHECKING:
    import numpy as np

OPERATORS = {"+": add, "-": sub, "*": mul}
SYMBOLS = tuple(OPERATORS)
SPELLINGS = str.maketrans({"×": "*", "−": "-", "–": "-"})
LARGEST_NUMBER = 9
SMALLEST_TARGET = 10
LARGEST_VALUE = 99
FEWEST_NUMBERS, MOST_NUMBERS = 2, 6
# Most that an answer which misses the target can get: for its valid steps and for coming close.
STEPS_CREDIT, CLOSENESS_CREDIT = 0.3, 0.4
CLOSE = 20  # further from the target is not close at all
STEP = re.compile(r"([0-9]{1,4})\s*([-+*])\s*([0-9]{1,4})\s*=\s*([0-9]{1,4})")
BEGUN = re.compile(
    r"(?:([0-9]{1,4})(?:\s*([-+*])(?:\s*([0-9]{1,4})(?:\s*(=)(?:\s*([0-9]{1,4}))?)?)?)?)?"
)
"""A step as far as it is written; its parts are the groups."""
PARTS = 5
TAGGED = "<answer>", "</answer>"
LEAST_LOG, LOG_SCALE = -20.0, 10.0
"""Where a critic's log success is cut, and what divides it."""

Step = tuple[int, str, int, int]
Pool = tuple[int, ...]


class CountdownTask(GeneratedTask):
    """Use every number exactly once; each step replaces two numbers by their result.

    Numbers are 1..9, the target 10..99, every intermediate result 0..99. With n numbers an answer
    has n-1 steps, `3 * 4 = 12 , 7 + 9 = 16 , 12 + 12 = 24` for instance; any valid one counts.
    With `partial_credit` scores lie between 0 and 1: see `grade`.
    """

    name = "countdown"
    critic_numbers = ("valid", "reachable", "success", "log_success", "steps", "place")

    def __init__(
        self,
        split: str = "train",
        seed: int = 0,
        numbers: int = 4,
        partial_credit: bool = False,
    ):
        """Chooses the split, the seed, how many numbers a problem has, and how it is graded.

        Raises:
            ValueError: If the split is unknown or `numbers` is outside 2..6.
        """
        super().__init__(split, seed)
        if not FEWEST_NUMBERS <= numbers <= MOST_NUMBERS:
            raise ValueError(
                f"Got numbers={numbers}; Countdown takes {FEWEST_NUMBERS}..{MOST_NUMBERS} numbers."
            )
        self.numbers = numbers
        self.partial_credit = bool(partial_credit)
        self.max_prompt_tokens = numbers + 3  # the numbers, "->", the target, ":"
        self.max_completion_tokens = 6 * (numbers - 1)  # "a op b = c" and "," or EOS

    @property
    def difficulty(self) -> str:
        """How many numbers."""
        return str(self.numbers)

    def attempt(self, draws: Draws, row: int) -> tuple[Problem, str] | None:
        """Plays random steps on random numbers; what they reach is the target.

        Whole games are rejected, never single steps, so that given its problem each valid
        sequence of steps is equally likely.
        """
        numbers = sorted(1 + draws.below(LARGEST_NUMBER) for _ in range(self.numbers))
        pool = list(numbers)
        steps: list[Step] = []
        while len(pool) > 1:
            left = pool.pop(draws.below(len(pool)))
            right = pool.pop(draws.below(len(pool)))
            symbol = SYMBOLS[draws.below(len(SYMBOLS))]
            value = OPERATORS[symbol](left, right)
            if not 0 <= value <= LARGEST_VALUE:
                return None
            pool.append(value)
            steps.append((left, symbol, right, value))
        if pool[0] < SMALLEST_TARGET:
            return None
        return _problem(row, numbers, pool[0]), _text(steps)

    def solution(self, problem: Problem, rng: np.random.Generator) -> str:
        """A random valid solution, by depth-first search in random order.

        Every valid solution can come out, not all equally often.

        Raises:
            ValueError: If the problem has no solution.
        """
        steps = _search(list(problem.data["numbers"]), problem.data["target"], rng)
        if steps is None:
            raise ValueError(f"Countdown has no solution for {problem.prompt!r}.")
        return _text(steps)

    def instruction(self, problem: Problem) -> str:
        """The problem in English, with the form of the answer that `grade` expects."""
        numbers = ", ".join(map(str, problem.data["numbers"]))
        return (
            f"Use the numbers {numbers}, each exactly once, with +, - and * to reach "
            f"{problem.data['target']}. Each step combines two numbers into a new one, which later "
            f"steps use in their place; every result is between 0 and {LARGEST_VALUE}. "
            f"Write the {len(problem.data['numbers']) - 1} steps between {TAGGED[0]} and "
            f"{TAGGED[1]}, one per line, as in: a + b = c"
        )

    def grade(self, problem: Problem, completion: str, *, truncated: bool = False) -> Grade:
        """1.0 for a valid solution, else 0.0 or, with `partial_credit`, up to 0.7.

        Partial credit (our choice) goes to text that consists of steps: 0.3 times the share of
        steps that are right before the first wrong one, plus, where all n-1 are right, 0.4 times
        max(0, 1 - |result - target| / 20).

        The answer is the last text between answer tags that holds a step, the whole completion
        without tags. Steps are separated by commas or line ends; nothing but a full stop at the
        end may stand beside them.
        """
        text = _answer_text(completion.translate(SPELLINGS)).rstrip().removesuffix(".")
        steps = _parse(text)
        answer = _text(steps) if steps is not None else None
        right, pool = _play(steps or (), problem.data["numbers"])
        target = problem.data["target"]
        if steps is not None and right == len(steps) and pool == [target]:
            return Grade(1.0, "correct", answer)
        score = self._partial(right, pool, target) if self.partial_credit else 0.0
        if truncated:
            return Grade(score, "too_long", answer)
        return Grade(score, "wrong" if STEP.search(text) else "no_answer", answer)

    def critic_observation(
        self, problem: Problem, turns: Sequence[Turn], texts: Sequence[str]
    ) -> list[tuple[float, ...]]:
        """How the answer stands.

        Whether a right answer may begin so, whatever the target; whether the target can still be
        reached; the probability p that uniform play reaches it (each legal step that goes on from
        here as likely as the others), and max(log p, -20) / 10; the share of steps that are
        written; and the share of the step's five parts that are.

        Within answer tags what stands in them counts. A number of several digits counts as it is
        written so far.
        """
        numbers, target = tuple(problem.data["numbers"]), problem.data["target"]
        found = []
        for text in texts:
            steps, part, due = _begun(_answer_text(text.translate(SPELLINGS)))
            right, pool = _play(steps or (), numbers)
            chances: list[float] = []
            if steps is not None and right == len(steps):
                chances = _chances(tuple(sorted(pool)), target, part, due)
            chance = sum(chances) / len(chances) if chances else 0.0
            done = len(steps or ())
            written = len(part) if due else PARTS
            found.append(
                (
                    float(bool(chances)),
                    float(chance > 0),
                    chance,
                    log(max(chance, exp(LEAST_LOG))) / LOG_SCALE,
                    done / (self.numbers - 1),
                    written / PARTS,
                )
            )
        return found

    def _partial(self, right: int, pool: Sequence[int], target: int) -> float:
        """The credit for `right` steps that leave `pool`, without the target."""
        score = STEPS_CREDIT * right / (self.numbers - 1)
        if len(pool) == 1:
            score += CLOSENESS_CREDIT * max(0.0, 1.0 - abs(pool[0] - target) / CLOSE)
        return score


def _problem(row: int, numbers: list[int], target: int) -> Problem:
    shown = " ".join(map(str, numbers))
    data = {"numbers": tuple(numbers), "target": target}
    return Problem(row, f"{shown} -> {target} :", data, f"{shown}|{target}")


def _text(steps: Sequence[Step]) -> str:
    return " , ".join(f"{a} {symbol} {b} = {c}" for a, symbol, b, c in steps)


def _answer_text(completion: str) -> str:
    """What stands in the last answer tags with a step in them, or everything without tags."""
    opening, closing = TAGGED
    _, *tagged = completion.split(opening)
    if not tagged:
        return completion
    answers = [text.partition(closing)[0] for text in tagged]
    return next((text for text in reversed(answers) if STEP.search(text)), answers[-1])


def _pieces(text: str) -> list[str]:
    """What stands between commas or line ends."""
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    lines = [line.removesuffix(",") for line in lines[:-1]] + lines[-1:]
    return [piece.strip() for piece in ",".join(lines).split(",")]


def _parse(text: str) -> list[Step] | None:
    """The steps of an answer, or None where anything in it is not a step."""
    return _steps(_pieces(text))


def _begun(text: str) -> tuple[list[Step] | None, tuple[str, ...], bool]:
    """The steps of an answer that may go on, the parts of one that is begun, and if one is due.

    The steps are None where anything is neither a step nor the beginning of one.
    """
    *whole, last = _pieces(text)
    begun = BEGUN.fullmatch(last)
    parts = tuple(part for part in begun.groups() if part is not None) if begun else ()
    if len(parts) == PARTS:
        return _steps([*whole, last]), (), False
    return (_steps(whole) if begun else None), parts, True


def _steps(pieces: Sequence[str]) -> list[Step] | None:
    steps: list[Step] = []
    for piece in pieces:
        match = STEP.fullmatch(piece)
        if match is None:
            return None
        left, symbol, right, value = match.groups()
        steps.append((int(left), symbol, int(right), int(value)))
    return steps


def _play(steps: Sequence[Step], numbers: Sequence[int]) -> tuple[int, list[int]]:
    """How many steps are right before the first wrong one, and the numbers that they leave."""
    pool = list(numbers)
    for done, (left, symbol, right, value) in enumerate(steps):
        rest = list(pool)
        for operand in (left, right):
            if operand not in rest:
                return done, pool
            rest.remove(operand)
        if value != OPERATORS[symbol](left, right) or not 0 <= value <= LARGEST_VALUE:
            return done, pool
        pool = [*rest, value]
    return len(steps), pool


@lru_cache(maxsize=1 << 16)
def _moves(pool: Pool) -> tuple[tuple[tuple[str, str, str], Pool], ...]:
    """The legal steps of ordered numbers, and the ordered numbers that each leaves."""
    found = []
    for i, left in enumerate(pool):
        for j, right in enumerate(pool):
            for symbol, operate in OPERATORS.items() if i != j else ():
                if 0 <= (value := operate(left, right)) <= LARGEST_VALUE:
                    rest = [pool[k] for k in range(len(pool)) if k not in (i, j)]
                    step = str(left), symbol, str(right)
                    found.append((step, tuple(sorted([*rest, value]))))
    return tuple(found)


@lru_cache(maxsize=1 << 16)
def _success(pool: Pool, target: int) -> float:
    """The probability that uniform legal steps lead to the target."""
    if len(pool) == 1:
        return float(pool[0] == target)
    ends = [_success(rest, target) for _, rest in _moves(pool)]
    return sum(ends) / len(ends) if ends else 0.0


def _chances(pool: Pool, target: int, part: Sequence[str], due: bool) -> list[float]:
    """The probabilities of success after each legal step that begins so; none: there is no such."""
    if not due:
        return [_success(pool, target)]
    given = tuple(str(int(word)) if word.isdigit() else word for word in part)[:3]
    return [_success(rest, target) for step, rest in _moves(pool) if step[: len(given)] == given]


def _search(pool: list[int], target: int, rng: np.random.Generator) -> list[Step] | None:
    if len(pool) == 1:
        return [] if pool[0] == target else None
    n = len(pool)
    moves = [(i, j, s) for i in range(n) for j in range(n) if i != j for s in SYMBOLS]
    for move in rng.permutation(len(moves)):
        i, j, symbol = moves[move]
        value = OPERATORS[symbol](pool[i], pool[j])
        if not 0 <= value <= LARGEST_VALUE:
            continue
        rest = [pool[k] for k in range(n) if k not in (i, j)]
        steps = _search([*rest, value], target, rng)
        if steps is not None:
            return [(pool[i], symbol, pool[j], value), *steps]
    return None
