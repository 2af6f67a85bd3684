"""Does an uncertainty know where the critic is wrong? On a policy that does not move.

    python tune/ignorance.py OUT.json --seeds 0 1 2

For each seed and each learned statistic of the bonus, the critic and the statistic learn from
rollouts of the unchanged initial policy (every iteration is a warm-up iteration). Then held-out
prefixes are continued many times, and the error of the value is correlated with the spread of
the quantiles and with the statistic: by rank, raw, and partial given the value. Each finished run
is written at once; the same command continues after the last one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import ray

from rllib_distrl import DistRLConfig
from rllib_distrl.algorithm.critic_probe import probe_critic
from rllib_distrl.experiments.training import RunLength, Training
from rllib_distrl.files import write_atomic
from rllib_distrl.runs.log import commit

VARIANTS: dict[str, dict[str, Any]] = {
    "ensemble, prior 0.3": {"bonus_stat": "ensemble", "ensemble": {"prior_scale": 0.3}},
    "ensemble, prior 1": {"bonus_stat": "ensemble", "ensemble": {"prior_scale": 1.0}},
    "ensemble, no prior": {"bonus_stat": "ensemble", "ensemble": {"prior_scale": 0.0}},
    "distance": {"bonus_stat": "distance", "distance": {"decay": 1.0}},
}


def run(
    seed: int, settings: dict[str, Any], iterations: int, prefixes: int, n: int
) -> dict[str, float]:
    """One critic and one statistic, learned on the unchanged policy, and what they know."""
    config = (
        DistRLConfig()
        .environment("distrl_envs:distrl/Countdown-v0")
        .rl_module(model_config={"model": "builtin:countdown"})
        .rollout(prompts_per_iteration=128, num_generations=2, max_completion_tokens=24)
        .training(
            minibatch_size=128,
            critic_lr=3e-3,
            critic_warmup_iterations=iterations,
            bonus_coeff=0.0,
            **settings,
        )
        .debugging(seed=seed)
    )
    algo = config.build_algo()
    try:
        Training(algo, RunLength(iterations)).run()
        return probe_critic(algo, prefixes=prefixes, continuations=n, split="validation")
    finally:
        algo.stop()


def main() -> None:
    """Runs what is missing in the file and prints a line per run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=40, help="of 256 rollouts each")
    parser.add_argument("--prefixes", type=int, default=900)
    parser.add_argument("--continuations", type=int, default=48)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    options = parser.parse_args()
    results = json.loads(options.out.read_text()) if options.out.is_file() else []
    finished = {(record["seed"], record["variant"], record["iterations"]) for record in results}
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    for seed in options.seeds:
        for variant in options.variants:
            if (seed, variant, options.iterations) in finished:
                continue
            found = run(
                seed,
                VARIANTS[variant],
                options.iterations,
                options.prefixes,
                options.continuations,
            )
            record = {
                "variant": variant,
                "seed": seed,
                "iterations": options.iterations,
                "commit": commit(),
                **found,
            }
            results.append(record)
            write_atomic(options.out, json.dumps(results, indent=1) + "\n")
            shown = {name: round(x, 3) for name, x in found.items() if "correlation" in name}
            print(seed, variant, shown, flush=True)


if __name__ == "__main__":
    main()
