"""What players reach on the held-out problems of `configs/games`, exactly.

    python -m benchmarks.games

Blackjack by dynamic programming over hands, Mastermind over sets of codes that are left. Every
Countdown problem has a solution, and who knows it need not ask: the best score is 1.
"""

from collections import defaultdict
from collections.abc import Sequence
from functools import cache

import numpy as np

from distrl_envs.task import distinct_rows
from distrl_envs.tasks.blackjack import STAND, BlackjackTask, mean, return_law, uniform
from distrl_envs.tasks.mastermind import Code, MastermindTask, all_codes, feedback

BLACKJACK_DEALS, MASTERMIND_GAMES = 60, 150


def blackjack() -> dict[str, float]:
    """The mean score of players who move at random, always stand, and play at best."""
    task = BlackjackTask("test")
    states = [task.state(task.problem(row), ()) for row in distinct_rows(task, BLACKJACK_DEALS)]
    players = {"random": uniform, "stands": lambda _: {STAND: 1.0}, "best": None}
    return {
        name: float(np.mean([mean(return_law(state, policy)) for state in states]))
        for name, policy in players.items()
    }


def mastermind() -> dict[str, float]:
    """The same of guesses at random among all codes, among those that are left, and at best."""
    task = MastermindTask("test")
    codes, guesses = all_codes(task.places, task.numbers), task.guesses

    @cache
    def value(player: str, left: tuple[Code, ...], spent: int) -> float:
        if spent == guesses:
            return 0.0
        pool: Sequence[Code] = left if player == "heeds replies" or len(left) == 1 else codes
        values = [worth(player, left, spent, guess) for guess in pool]
        return max(values) if player == "best" else float(np.mean(values))

    def worth(player: str, left: tuple[Code, ...], spent: int, guess: Code) -> float:
        told = defaultdict(list)
        for code in left:
            told[feedback(guess, code)].append(code)
        found = len(told.pop((task.places, 0), ())) * (1.0 - spent / guesses)
        later = (len(rest) * value(player, tuple(rest), spent + 1) for rest in told.values())
        return (found + sum(later)) / len(left)

    asked = [task.problem(row) for row in distinct_rows(task, MASTERMIND_GAMES)]
    start = [tuple(task.allowed(problem, ())) for problem in asked]
    blind = sum((1 - spent / guesses) * (1 - 1 / len(codes)) ** spent for spent in range(guesses))
    return {
        "random": blind / len(codes),
        **{
            name: float(np.mean([value(name, left, 0) for left in start]))
            for name in ("heeds replies", "best")
        },
    }


def main() -> None:
    """Prints a line for each game."""
    for name, scores in (("Blackjack", blackjack()), ("Mastermind", mastermind())):
        print(f"{name:10s}", "  ".join(f"{player} {score:.3f}" for player, score in scores.items()))


if __name__ == "__main__":
    main()
