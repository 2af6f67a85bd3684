"""What the law of returns knows in Blackjack that its mean does not, by dynamic programming.

    python -m benchmarks.headroom

For the player with the highest expected score and for one who moves at random: the share of the
variance across states of each functional that the mean leaves open (`maths.headroom`).
"""

import numpy as np

from distrl_envs.tasks.blackjack import Law, mean, return_law, uniform, visits
from rllib_distrl.maths.headroom import headroom

BEST_OF = 4


def functionals(law: Law) -> dict[str, float]:
    """Standard deviation, quantiles, and the expected best of four of a law."""
    scores = sorted(law)
    below = np.cumsum([law[score] for score in scores])
    quantile = {q: scores[int(np.searchsorted(below, q - 1e-12))] for q in (0.25, 0.75)}
    best = float(np.diff(np.concatenate([[0.0], below**BEST_OF])) @ scores)
    second = sum(score**2 * share for score, share in law.items())
    std = max(0.0, second - mean(law) ** 2) ** 0.5
    return {"std": std, "q25": quantile[0.25], "q75": quantile[0.75], f"best of {BEST_OF}": best}


def blackjack_headroom() -> dict[str, dict[str, float]]:
    """The headroom of each functional, by player."""
    rows = {}
    for name, policy in (("best", None), ("uniform", uniform)):
        met = visits(policy)
        laws = [return_law(state, policy) for state in met]
        means, values = [mean(law) for law in laws], [functionals(law) for law in laws]
        rows[name] = {
            functional: headroom(means, [value[functional] for value in values], [*met.values()])
            for functional in values[0]
        }
    return rows


def main() -> None:
    """Prints a line for each player."""
    for name, row in blackjack_headroom().items():
        print(f"{name:8s}", "  ".join(f"{key} {value:.2f}" for key, value in row.items()))


if __name__ == "__main__":
    main()
