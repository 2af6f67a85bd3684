"""Our side of every comparison, and the bare loops, as cases that answer commands.

python -m benchmarks.ours MODELS_FOLDER [pairs] [updates]
"""

import sys
from pathlib import Path

from benchmarks.pairs import Pairs
from benchmarks.rollouts import Rollouts
from benchmarks.updates import Updates
from benchmarks.workload import Commands


def main() -> None:
    commands = Commands()
    models, groups = Path(sys.argv[1]), set(sys.argv[2:])
    rollouts = Rollouts(models)
    cases = {
        "generation": lambda: rollouts.generate("fixed"),
        "generation_natural": lambda: rollouts.generate("natural"),
        "runner": rollouts.run_runner,
        "bare_loop": rollouts.run_loop,
        "token_rewards": rollouts.token_rewards,
    }
    if "pairs" in groups:
        pairs = Pairs(models)
        cases |= {"two_runners": pairs.run_runners, "two_bare_loops": pairs.run_loops}
    if "updates" in groups:
        updates = Updates(models, rollouts)
        for name in Updates.SETTINGS:
            cases[f"update_{name}"] = lambda name=name: updates.learn(name)
            cases[f"end_to_end_{name}"] = lambda name=name: updates.train(name)
        cases["bare_update"] = updates.learn_bare
    commands.serve(cases)


if __name__ == "__main__":
    main()
