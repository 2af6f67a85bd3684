"""Countdown with a checking tool: what a step makes can be asked, for a small price."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from distrl_envs.task import Draws, Grade, Problem, Reply, Turn, played
from distrl_envs.tasks.countdown import (
    LARGEST_VALUE,
    OPERATORS,
    SPELLINGS,
    STEP,
    SYMBOLS,
    CountdownTask,
)

if TYPE_CHECKING:
    import numpy as np

QUESTION = re.compile(r"([0-9]{1,4})\s*([-+*])\s*([0-9]{1,4})\s*=")
NO_VALUE = "-"
"""The reply to a question that has no value."""
MOST_CHECKS = 20
ASKED_SHARE, STRAY_SHARE = 0.5, 0.25
"""Of a demonstration's steps: how many are asked, and how often one that leads nowhere is."""


class CountdownCheckTask(CountdownTask):
    """Countdown whose steps may be tried before the answer.

    A turn that ends with `=` is a question, `3 * 4 =` for instance. The reply is its value, `12`,
    or `-` where that is outside 0..99 (status `out_of_range`) or the turn is no step (status
    `malformed`); each question costs `check_cost`. Any other turn is the answer, graded as in
    Countdown; an episode whose last turn is a question has none.
    """

    name = "countdown_check"
    reply_roles = ("tool",)
    max_reply_tokens = 3

    def __init__(
        self,
        split: str = "train",
        seed: int = 0,
        numbers: int = 4,
        partial_credit: bool = False,
        checks: int = 4,
        check_cost: float = 0.02,
    ):
        """Chooses what Countdown does, how many questions may be asked, and what each costs.

        Raises:
            ValueError: As Countdown does, and if `checks` is outside 1..20 or `check_cost` outside
                0..1.
        """
        super().__init__(split, seed, numbers, partial_credit)
        if not 1 <= checks <= MOST_CHECKS:
            raise ValueError(f"Got checks={checks}; it must be in 1..{MOST_CHECKS}.")
        if not 0.0 <= check_cost <= 1.0:
            raise ValueError(f"Got check_cost={check_cost}; it must be in 0..1.")
        self.checks, self.check_cost = checks, float(check_cost)
        self.max_turns = checks + 1
        self.max_completion_tokens += 5 * checks  # "a op b =" and EOS

    def demonstration(
        self, problem: Problem, rng: np.random.Generator, solution: str | None = None
    ) -> list[Turn]:
        """A solution, half of whose steps are asked before, with a stray question now and then."""
        answer = self.solution(problem, rng) if solution is None else solution
        questions: list[str] = []
        for step in STEP.finditer(answer):
            if rng.random() < STRAY_SHARE:
                left, right = rng.choice(problem.data["numbers"], 2, replace=False)
                questions.append(f"{left} {SYMBOLS[int(rng.integers(len(SYMBOLS)))]} {right} =")
            if rng.random() < ASKED_SHARE:
                questions.append(f"{step[1]} {step[2]} {step[3]} =")
        turns = [*questions[: self.checks], answer]
        return played(self, problem, lambda _, before: turns[len(before)], rng)

    def instruction(self, problem: Problem) -> str:
        """Countdown's, and how to ask."""
        return (
            f"{super().instruction(problem)}. Before your answer you may ask what a step makes, up "
            f"to {self.checks} times, each for {self.check_cost:g} of your score: end a turn with "
            "the step up to its equals sign, as in: 3 * 4 = I reply with the value, or with - "
            f"where it is not between 0 and {LARGEST_VALUE} or I cannot read the step."
        )

    def respond(self, problem: Problem, turns: Sequence[Turn], draws: Draws) -> Reply | None:
        """The value of the step that is asked for; None where the turn is the answer."""
        text = turns[-1].completion.translate(SPELLINGS).rstrip()
        if not text.endswith("="):
            return None
        reply, status = NO_VALUE, "malformed"
        if asked := QUESTION.fullmatch(_last_step(text)):
            value = OPERATORS[asked[2]](int(asked[1]), int(asked[3]))
            inside = 0 <= value <= LARGEST_VALUE
            reply, status = (f"{value}", "ok") if inside else (NO_VALUE, "out_of_range")
        over = len(turns) > self.checks
        return Reply(reply, role="tool", reward=-self.check_cost, over=over, status=status)

    def grade_turns(self, problem: Problem, turns: Sequence[Turn], *, truncated: bool) -> Grade:
        """Grades the last turn, as Countdown does; 0.0 where that is a question."""
        if turns[-1].completion.translate(SPELLINGS).rstrip().endswith("="):
            return Grade(0.0, "too_long" if truncated else "no_answer")
        return self.grade(problem, turns[-1].completion, truncated=truncated)


def _last_step(text: str) -> str:
    """The last line of a turn, or what follows a colon or comma in it."""
    return re.split(r"[:,\n]", text)[-1].strip()
