"""Countdown: combine the given numbers with + - * to reach a target."""

from __future__ import annotations

import re
from collections.abc import Sequence
from operator import add, mul, sub
from typing import TYPE_CHECKING

from distrl_envs.task import Draws, GeneratedTask, Grade, Problem

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
TAGGED = "<answer>", "</answer>"

Step = tuple[int, str, int, int]


class CountdownTask(GeneratedTask):
    """Use every number exactly once; each step replaces two numbers by their result.

    Numbers are 1..9, the target 10..99, every intermediate result 0..99. With n numbers an answer
    has n-1 steps, `3 * 4 = 12 , 7 + 9 = 16 , 12 + 12 = 24` for instance; any valid one counts.
    With `partial_credit` scores lie between 0 and 1: see `grade`.
    """

    name = "countdown"

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


def _parse(text: str) -> list[Step] | None:
    """The steps of an answer, or None where anything in it is not a step."""
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    lines = [line.removesuffix(",") for line in lines[:-1]] + lines[-1:]
    steps: list[Step] = []
    for piece in ",".join(lines).split(","):
        match = STEP.fullmatch(piece.strip())
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
