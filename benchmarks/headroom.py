"""What the law of returns knows that its mean does not: the headroom of a critic of the law.

    python -m benchmarks.headroom
    python -m benchmarks.headroom EVALUATION

Without a folder in Blackjack, by dynamic programming, for the player with the highest expected
score and for one who moves at random. With one of `distrl eval`, at the prompts of a task, from the
samples that it holds. Each is the share of a functional's variance across states that the mean
leaves open (`maths.headroom`).
"""

import sys

import numpy as np

from distrl_envs.tasks.blackjack import Law, mean, return_law, uniform, visits
from rllib_distrl.evaluation.result import load_samples
from rllib_distrl.maths.headroom import headroom, sampled_headroom
from rllib_distrl.maths.pass_k import best_at_k

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


def prompts_headroom(folder: str) -> dict[str, dict[str, float]]:
    """The headroom of each functional at the prompts of an evaluation's problems."""
    frame = load_samples(folder, ("problem", "sample", "score"))
    scores = frame.pivot_table(index="problem", columns="sample", values="score").to_numpy()
    rows = {"std": sampled_headroom(scores, lambda x: x.std(axis=1))}
    rows["worst quarter"] = sampled_headroom(
        scores, lambda x: np.sort(x, axis=1)[:, : x.shape[1] // 4].mean(axis=1)
    )
    for k in (4, 16):
        rows[f"best of {k}"] = sampled_headroom(scores, lambda x, k=k: best_at_k(x, k))
    return {"prompts": rows}


def main() -> None:
    """Prints a line for each player, or one for the prompts."""
    rows = prompts_headroom(sys.argv[1]) if len(sys.argv) > 1 else blackjack_headroom()
    for name, row in rows.items():
        print(f"{name:8s}", "  ".join(f"{key} {value:.2f}" for key, value in row.items()))


if __name__ == "__main__":
    main()
