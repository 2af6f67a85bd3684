"""What sampling ahead saves: seconds of an iteration by staleness, with quick and slow verdicts.

    python -m benchmarks.sampling_ahead [--rounds 3] [--iterations 16] [--dry]

The main job's model and SAO, 128 completions an iteration, two runners beside the learner. What a
runner has sampled is graded at once, or in a fourth of the cases a second later. How fast runners
are changes nothing in what is learned, so curves by tokens (docs/law.md) times these seconds are
curves by time. Rounds are interleaved; a ratio is that of two runs of the same round, by the wall
clock. Writes benchmarks/results/sampling_ahead.json and renews the table of docs/learner.md.
"""

import argparse
import time
from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np
import ray

from benchmarks.run import RESULTS, ROOT, about, keep
from distrl_envs.task import Grade, Problem
from distrl_envs.tasks.countdown import CountdownTask
from rllib_distrl.algorithm.presets import SAOConfig
from rllib_distrl.experiments.pages import Table

STALENESS = 0, 1, 4
SLOW_ONE_IN, SLOW_S = 4, 1.0
OUT, PAGE = RESULTS.with_name("sampling_ahead.json"), ROOT / "docs" / "learner.md"


class Verdicts(CountdownTask):
    """Countdown, whose verifier may now and then be slow, by the problems that it is asked."""

    def __init__(self, split: str = "train", seed: int = 0, slow: bool = False):
        super().__init__(split, seed)
        self.slow = slow

    def grade_many(
        self, problems: Sequence[Problem], completions: Sequence[str], truncated: Sequence[bool]
    ) -> list[Grade]:
        if self.slow and Random(problems[0].key).randrange(SLOW_ONE_IN) == 0:
            time.sleep(SLOW_S)
        return super().grade_many(problems, completions, truncated)


def seconds(staleness: int, slow: bool, iterations: int) -> float:
    """Of one iteration, the mean of so many, once runners are as far ahead as they may be."""
    config = SAOConfig()
    config.environment(
        "distrl_envs:distrl/Countdown-v0",
        env_config={
            "task": "benchmarks.sampling_ahead:Verdicts",
            "task_config": {"slow": slow},
        },
    )
    config.rl_module(model_config={"model": "builtin:countdown"})
    config.rollout(prompts_per_iteration=128, max_completion_tokens=24, max_staleness=staleness)
    config.env_runners(num_env_runners=2)
    config.training(lr=2e-4, minibatch_size=64, critic_lr=3e-3, critic_warmup_iterations=0)
    config.debugging(seed=0, log_level="ERROR")
    algo = config.build_algo()
    try:
        for _ in range(staleness + 2):
            algo.train()
        started = time.perf_counter()
        for _ in range(iterations):
            algo.train()
        return (time.perf_counter() - started) / iterations
    finally:
        algo.stop()


def measure(rounds: int, iterations: int) -> dict[str, Any]:
    """Seconds of all rounds, by speed of the verdicts and staleness."""
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
    try:
        found = [
            {
                speed: {str(k): seconds(k, speed == "slow", iterations) for k in STALENESS}
                for speed in ("quick", "slow")
            }
            for _ in range(rounds)
        ]
    finally:
        ray.shutdown()
    return {**about(), "iterations": iterations, "seconds": found}


def table(results: dict[str, Any]) -> str:
    """As it stands in docs/learner.md."""
    lines = []
    for speed in ("quick", "slow"):
        for k in map(str, STALENESS):
            took = [one[speed][k] for one in results["seconds"]]
            share = [one[speed][k] / one[speed]["0"] for one in results["seconds"]]
            spread = f"{min(share):.2f} to {max(share):.2f}" if k != "0" else ""
            lines.append([speed, k, f"{np.median(took):.2f}", f"{np.median(share):.2f}", spread])
    head = ["verdicts", "`max_staleness`", "seconds of an iteration", "of those without", "spread"]
    return Table(head, lines).to_markdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=16)
    parser.add_argument("--dry", action="store_true", help="do not write the results")
    chosen = parser.parse_args()
    results = measure(chosen.rounds, chosen.iterations)
    print(table(results))
    if not chosen.dry:
        keep(results, table(results), OUT, PAGE, "ahead")


if __name__ == "__main__":
    main()
