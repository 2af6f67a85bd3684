"""Arithmetic: add or subtract numbers of several digits, with the working shown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from distrl_envs.task import Draws, GeneratedTask, Grade, Problem, Turn

if TYPE_CHECKING:
    import numpy as np

BASE = 10
SYMBOLS = ("+", "-")
MOST_DIGITS = 12
ARROW = "->"
# One group of digits, apart or together, with nothing behind it.
ANSWER = re.compile(r"[0-9](?:[ \t]*[0-9])*")


class ArithmeticTask(GeneratedTask):
    """Column addition or subtraction of two numbers with the same number of digits.

    Digits are tokens of their own: `4 7 2 + 0 9 5 :` is 472 + 095. The working goes through the
    columns from the right, each as `digit op digit op carry = digit`, and the answer follows after
    `->`: `2 + 5 + 0 = 7 , 7 + 9 + 0 = 6 , 4 + 0 + 1 = 5 -> 5 6 7`. Only the answer is graded; the
    working is free. Subtractions have no negative result.
    """

    name = "arithmetic"
    critic_numbers = ("agrees", "working", "answering", "right", "digits")

    def __init__(self, split: str = "train", seed: int = 0, digits: int = 3):
        """Chooses the split, the seed and how many digits a number has.

        Raises:
            ValueError: If the split is unknown or `digits` is outside 1..12.
        """
        super().__init__(split, seed)
        if not 1 <= digits <= MOST_DIGITS:
            raise ValueError(f"Got digits={digits}; Arithmetic takes 1..{MOST_DIGITS} digits.")
        self.digits = digits
        self.max_prompt_tokens = 2 * digits + 2  # two numbers, the operator, ":"
        # a step and its "," per column, then "->" in the last one's place, the answer, EOS
        self.max_completion_tokens = 8 * digits + digits + 2

    @property
    def difficulty(self) -> str:
        """How many digits."""
        return str(self.digits)

    def attempt(self, draws: Draws, row: int) -> tuple[Problem, str] | None:
        """Draws an operator and two numbers."""
        symbol = SYMBOLS[draws.below(len(SYMBOLS))]
        left, right = (self._number(draws) for _ in range(2))
        if symbol == "-" and left < right:
            return None
        problem = self.posed(row, left, symbol, right)
        return problem, self._working(left, symbol, right)

    def solution(self, problem: Problem, rng: np.random.Generator) -> str:
        """The working and the answer; there is one only."""
        data = problem.data
        return self._working(data["left"], data["symbol"], data["right"])

    def instruction(self, problem: Problem) -> str:
        """The problem in English, with the form of the answer that `grade` expects."""
        data = problem.data
        return (
            f"What is {data['left']} {data['symbol']} {data['right']}? Work it out digit by digit, "
            f"then end with {ARROW} and the result, as in: {ARROW} 42"
        )

    def grade(self, problem: Problem, completion: str, *, truncated: bool = False) -> Grade:
        """1.0 if the number after the last arrow is the result, else 0.0.

        Digits may be apart; leading zeros do not matter; nothing but a full stop may follow.
        """
        _, arrow, tail = completion.replace("→", ARROW).rpartition(ARROW)
        found = ANSWER.fullmatch(tail.strip().removesuffix(".")) if arrow else None
        # As text: turning a model's thousands of digits into an integer would raise.
        answer = "".join(found[0].split()).lstrip("0") or "0" if found else None
        if answer == str(problem.data["result"]):
            return Grade(1.0, "correct", answer)
        if truncated:
            return Grade(0.0, "too_long", answer)
        return Grade(0.0, "no_answer" if answer is None else "wrong", answer)

    def critic_observation(
        self, problem: Problem, turns: Sequence[Turn], texts: Sequence[str]
    ) -> list[tuple[float, ...]]:
        """How working and answer stand.

        Whether all that is written agrees with the right working; the share of it that is written
        before the first difference; whether an arrow has come, whether the digits behind the last
        one begin the result, and how many of its digits there are, as a share.
        """
        data, found = problem.data, []
        right, result = self.critic_text(problem).split(), str(data["result"])
        for text in texts:
            words = text.replace("→", ARROW).split()
            same = next(
                (n for n, (a, b) in enumerate(zip(words, right, strict=False)) if a != b),
                min(len(words), len(right)),
            )
            _, arrow, tail = " ".join(words).rpartition(ARROW)
            digits = tail.replace(" ", "")
            begins = bool(arrow) and result.startswith(digits)
            share = len(digits) / len(result) if begins else 0.0
            agrees, working = float(same == len(words)), same / len(right)
            found.append((agrees, working, float(bool(arrow)), float(begins), share))
        return found

    def _number(self, draws: Draws) -> int:
        number = 0
        for _ in range(self.digits):
            number = BASE * number + draws.below(BASE)
        return number

    def posed(self, row: int, left: int, symbol: str, right: int) -> Problem:
        """The problem `left symbol right`, as it is shown."""
        result = left + right if symbol == "+" else left - right
        # Either order of a sum is the same problem: both belong to the same split.
        first, second = sorted((left, right)) if symbol == "+" else (left, right)
        prompt = f"{self._spaced(left)} {symbol} {self._spaced(right)} :"
        data = {"left": left, "symbol": symbol, "right": right, "result": result}
        return Problem(row, prompt, data, f"{self.digits}|{first}{symbol}{second}")

    def _spaced(self, number: int) -> str:
        return " ".join(str(number).zfill(self.digits))

    def _working(self, left: int, symbol: str, right: int) -> str:
        """Columns from the right with the carry (or borrow) into each, then the result."""
        columns: list[str] = []
        carry = 0
        result = left + right if symbol == "+" else left - right
        for _ in range(self.digits):
            (left, a), (right, b) = divmod(left, BASE), divmod(right, BASE)
            value = a + b + carry if symbol == "+" else a - b - carry
            columns.append(f"{a} {symbol} {b} {symbol} {carry} = {value % BASE}")
            carry = abs(value // BASE)
        return f"{' , '.join(columns)} {ARROW} {' '.join(str(result))}"
