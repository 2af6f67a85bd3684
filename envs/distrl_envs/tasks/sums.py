"""Sums of two small numbers, asked in plain language."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from distrl_envs.task import Draws, GeneratedTask, Grade, Problem

if TYPE_CHECKING:
    import numpy as np

LARGEST = 49
"""Two of them stay below 100, which the small tokenizer has a token for."""
NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?")


class SumsTask(GeneratedTask):
    """Add two numbers of 0..`largest`, for pretrained chat models that follow instructions badly.

    `Calculate 17 + 20. Give only the result.` The last number of a completion is its answer,
    whatever stands around it: a small model finds that often enough to learn from it.
    """

    name = "sums"
    max_prompt_tokens = 4
    max_completion_tokens = 2

    def __init__(self, split: str = "train", seed: int = 0, largest: int = LARGEST):
        """Chooses the split, the seed and the largest number.

        Raises:
            ValueError: If the split is unknown or `largest` is outside 9..49.
        """
        super().__init__(split, seed)
        if not 9 <= largest <= LARGEST:
            raise ValueError(f"Got largest={largest}; Sums takes 9..{LARGEST}.")
        self.largest = largest

    @property
    def difficulty(self) -> str:
        """The largest number."""
        return str(self.largest)

    def attempt(self, draws: Draws, row: int) -> tuple[Problem, str]:
        """Draws two numbers; either order of them belongs to the same split."""
        left, right = (draws.below(self.largest + 1) for _ in range(2))
        first, second = sorted((left, right))
        data = {"left": left, "right": right, "result": left + right}
        problem = Problem(row, f"{left} + {right} =", data, f"{first}+{second}")
        return problem, str(left + right)

    def solution(self, problem: Problem, rng: np.random.Generator) -> str:
        """The result; there is one only."""
        return str(problem.data["result"])

    def instruction(self, problem: Problem) -> str:
        """The problem in English."""
        return f"Calculate {problem.data['left']} + {problem.data['right']}. Give only the result."

    def grade(self, problem: Problem, completion: str, *, truncated: bool = False) -> Grade:
        """1.0 if the last number is the result, else 0.0; 37.0 and 037 are 37."""
        numbers = NUMBER.findall(completion)
        answer = None
        if numbers:
            whole, _, decimals = numbers[-1].partition(".")
            decimals = decimals.rstrip("0")
            answer = (whole.lstrip("0") or "0") + (f".{decimals}" if decimals else "")
        if answer == str(problem.data["result"]):
            return Grade(1.0, "correct", answer)
        if truncated:
            return Grade(0.0, "too_long", answer)
        return Grade(0.0, "no_answer" if answer is None else "wrong", answer)
