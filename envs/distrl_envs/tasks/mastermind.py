"""Mastermind in numbers: find a hidden code by guessing; every guess tells something about it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from math import log
from typing import TYPE_CHECKING

from distrl_envs.task import Draws, GeneratedTask, Grade, Problem, Reply, Turn, played

if TYPE_CHECKING:
    import numpy as np

FEWEST_PLACES, MOST_PLACES = 2, 5
FEWEST_NUMBERS, MOST_NUMBERS = 2, 10
MOST_CODES = 10_000
MOST_GUESSES = 20
RANDOM_SHARE = 0.2
"""Share of guesses in a demonstration that do not heed what is known (our choice)."""
DEALS = 1_000
OPENINGS = 2
"""A number of the opening is that of the code in one of so many cases, else drawn (our choice)."""
TAGGED = re.compile(r"<guess>(.*?)(?:</guess>|$)", re.DOTALL)
GUESS = re.compile(r"[0-9]{1,2}(?:[\s,]+[0-9]{1,2})*")
UNREADABLE = "-"
"""The reply to a turn without a guess."""

Code = tuple[int, ...]


class MastermindTask(GeneratedTask):
    """Find a code of `places` numbers from 1..`numbers`, each of which may occur again.

    The prompt `1 4 -> 1 , 0 :` is a first guess, the opening, and what it tells: how many numbers
    are right where they stand, and how many more are in the code at another place. A turn is one
    guess, `1 2` for instance, and the reply what that tells, `0 , 1`. A turn that is no guess is
    spent: its reply is `-`, its status `malformed`.

    Half of the opening's numbers are the code's, the others drawn; it is never the code. Codes that
    the replies allow are equally likely all the same. A problem is a deal of code and opening: all
    splits have all codes, for one that is never met in training would be one not to guess.

    The score of a code found with guess g of G is 1 - (g - 1) / G, so that 1/G goes to the last
    one; a code that is not found scores 0.
    """

    name = "mastermind"
    names_answers = False
    critic_numbers = ("turn", "codes", "written", "right", "possible")
    max_reply_tokens = 4

    def __init__(
        self, split: str = "train", seed: int = 0, places: int = 2, numbers: int = 6,
        guesses: int = 5,
    ):  # fmt: skip
        """Chooses the split, the seed, and how hard it is.

        Raises:
            ValueError: If the split is unknown, `places` is outside 2..5, `numbers` outside 2..10
                or `guesses` outside 2..20, or there would be more than 10,000 codes.
        """
        super().__init__(split, seed)
        for name, value, least, most in (
            ("places", places, FEWEST_PLACES, MOST_PLACES),
            ("numbers", numbers, FEWEST_NUMBERS, MOST_NUMBERS),
            ("guesses", guesses, 2, MOST_GUESSES),
        ):
            if not least <= value <= most:
                raise ValueError(f"Got {name}={value}; Mastermind takes {least}..{most}.")
        if numbers**places > MOST_CODES:
            raise ValueError(
                f"Got places={places} and numbers={numbers}, which make {numbers**places:,} codes; "
                f"Mastermind takes {MOST_CODES:,} at most."
            )
        self.places, self.numbers, self.guesses = places, numbers, guesses
        self.max_turns = guesses
        self.max_prompt_tokens = places + 5  # the opening, "->", what it tells, ":"
        self.max_completion_tokens = guesses * (places + 1)  # with EOS

    @property
    def difficulty(self) -> str:
        """How many places and numbers."""
        return f"{self.places},{self.numbers}"

    def attempt(self, draws: Draws, row: int) -> tuple[Problem, str] | None:
        """Draws a code and an opening; the solution names the code at once."""
        code = tuple(1 + draws.below(self.numbers) for _ in range(self.places))
        opening = tuple(
            number if draws.below(OPENINGS) == 0 else 1 + draws.below(self.numbers)
            for number in code
        )
        if opening == code:
            return None
        shown, guess = " ".join(map(str, code)), " ".join(map(str, opening))
        exact, misplaced = feedback(opening, code)
        data = {"code": code, "opening": opening}
        key = f"{self.numbers}|{shown}|{guess}|{draws.below(DEALS)}"
        return Problem(row, f"{guess} -> {exact} , {misplaced} :", data, key), shown

    def solution(self, problem: Problem, rng: np.random.Generator) -> str:
        """The code, as a guess that could not be known to be right."""
        return " ".join(map(str, problem.data["code"]))

    def demonstration(
        self, problem: Problem, rng: np.random.Generator, solution: str | None = None
    ) -> list[Turn]:
        """Guesses at random among the codes that the replies allow; one in five among all."""
        codes = all_codes(self.places, self.numbers)

        def move(problem: Problem, turns: Sequence[Turn]) -> str:
            pool = codes if rng.random() < RANDOM_SHARE else self.allowed(problem, turns)
            return " ".join(map(str, pool[int(rng.integers(len(pool)))]))

        return played(self, problem, move, rng)

    def allowed(self, problem: Problem, turns: Sequence[Turn]) -> Sequence[Code]:
        """The codes that would have been answered like that, in order.

        Args:
            problem: Its opening counts.
            turns: Those that are no guess tell nothing.
        """
        codes = all_codes(self.places, self.numbers)
        left: Sequence[int] = range(len(codes))
        guesses = [problem.data["opening"], *(self._guess(turn.completion) for turn in turns)]
        for guess in guesses:
            if guess is not None:
                told = feedback(guess, problem.data["code"])
                would_be = feedback_of_all(guess, self.numbers)
                left = [index for index in left if would_be[index] == told]
        return [codes[index] for index in left]

    def instruction(self, problem: Problem) -> str:
        """The rules in English."""
        opening = " ".join(map(str, problem.data["opening"]))
        exact, misplaced = feedback(problem.data["opening"], problem.data["code"])
        return (
            f"Find my code: {self.places} numbers, each of 1 to {self.numbers}, which may occur "
            f"again. You have {self.guesses} guesses; fewer are better. End each turn with one "
            f"guess, as in <guess>{opening}</guess>. I answer with two numbers: to that guess "
            f"{exact} , {misplaced} because {exact} of its numbers are right where they stand and "
            f"{misplaced} more are in the code at another place. To what is no guess I answer - "
            "and it counts as one."
        )

    def critic_observation(
        self, problem: Problem, turns: Sequence[Turn], texts: Sequence[str]
    ) -> list[tuple[float, ...]]:
        """How the game stands, the code being known.

        The guesses that are spent, as a share; log(codes that the replies still allow) / log(all
        codes); how many numbers of this turn's guess are written and how many of these are right
        where they stand, as shares; the share of the allowed codes that begin so.
        """
        code, allowed = problem.data["code"], self.allowed(problem, turns)
        left = log(len(allowed)) / log(self.numbers**self.places)
        found = []
        for text in texts:
            guess = tuple(map(int, re.findall(r"[0-9]{1,2}", text.rpartition("<guess>")[2])))
            guess = guess[: self.places]
            right = sum(a == b for a, b in zip(guess, code, strict=False))
            possible = sum(one[: len(guess)] == guess for one in allowed) / len(allowed)
            found.append(
                (
                    len(turns) / self.guesses,
                    left,
                    len(guess) / self.places,
                    right / self.places,
                    possible,
                )
            )
        return found

    def respond(self, problem: Problem, turns: Sequence[Turn], draws: Draws) -> Reply:
        """What the last guess tells; the game ends with the code or the last guess."""
        guess = self._guess(turns[-1].completion)
        status, text = "malformed", UNREADABLE
        if guess is not None:
            exact, misplaced = feedback(guess, problem.data["code"])
            status, text = "ok", f"{exact} , {misplaced}"
        over = guess == problem.data["code"] or len(turns) >= self.guesses
        return Reply(text, over=over, status=status)

    def grade(self, problem: Problem, completion: str, *, truncated: bool = False) -> Grade:
        """Grades a game of one guess."""
        return self.grade_turns(problem, [Turn(completion)], truncated=truncated)

    def grade_turns(self, problem: Problem, turns: Sequence[Turn], *, truncated: bool) -> Grade:
        """The score as the class says; a game that a limit cut short scores 0, `too_long`.

        A guess that the limit cut is one all the same, if it is whole.
        """
        if self._guess(turns[-1].completion) == problem.data["code"]:
            return Grade(max(0.0, 1.0 - (len(turns) - 1) / self.guesses), "correct")
        return Grade(0.0, "too_long" if truncated else "wrong")

    def _guess(self, completion: str) -> Code | None:
        """The guess of a turn, between tags or alone; None where there is none."""
        tagged = TAGGED.findall(completion)
        text = (tagged[-1] if tagged else completion).strip()
        if not GUESS.fullmatch(text):
            return None
        code = tuple(map(int, re.split(r"[\s,]+", text)))
        fits = len(code) == self.places and all(1 <= number <= self.numbers for number in code)
        return code if fits else None


@lru_cache(maxsize=1 << 16)
def feedback(guess: Code, code: Code) -> tuple[int, int]:
    """How many numbers of a guess are right where they stand, and how many more elsewhere."""
    exact = sum(a == b for a, b in zip(guess, code, strict=True))
    return exact, (Counter(guess) & Counter(code)).total() - exact


@lru_cache(maxsize=256)
def feedback_of_all(guess: Code, numbers: int) -> list[tuple[int, int]]:
    """`feedback` on a guess for each of `all_codes`; kept, for demonstrations ask often."""
    return [feedback(guess, code) for code in all_codes(len(guess), numbers)]


@lru_cache(maxsize=8)
def all_codes(places: int, numbers: int) -> tuple[Code, ...]:
    """Every code, in order."""
    return tuple(product(range(1, numbers + 1), repeat=places))
