"""Which files of ours one prompt passes through on its way to a gradient step.

    python -m benchmarks.rooms [RECIPE]

Runs the recipe (README's, made small) in this process and notes every function of ours that is
called in its second iteration: rollout, grading, update and weight sync. Imports and start-up do
not count.
"""

import sys
from collections import Counter
from pathlib import Path
from types import CodeType

from rllib_distrl.recipe import load_recipe

ROOT = Path(__file__).parents[1]
PACKAGES = (ROOT / "rllib_distrl", ROOT / "envs" / "distrl_envs")
SMALL = [
    "run.model=builtin:countdown-tiny",
    "rollout.prompts_per_iteration=4",
    "training.minibatch_size=4",
    "training.critic_warmup_iterations=0",
]


def files_of_one_iteration(recipe: Path) -> list[Path]:
    """The files whose functions ran during the second `algo.train()`, by name."""
    config = load_recipe(recipe, SMALL).build_config()
    algo = config.env_runners(num_env_runners=0).build_algo()
    algo.train()  # What is imported or made at first use is start-up.
    seen: set[CodeType] = set()
    sys.setprofile(lambda frame, event, _: seen.add(frame.f_code) if event == "call" else None)
    try:
        algo.train()
    finally:
        sys.setprofile(None)
        algo.stop()
    files = {Path(code.co_filename) for code in seen}
    return sorted(f for f in files if any(package in f.parents for package in PACKAGES))


def main() -> None:
    """Prints the files, with their lines, room by room."""
    recipe = Path(sys.argv[1]) if sys.argv[1:] else ROOT / "configs" / "countdown" / "distrl.toml"
    files = files_of_one_iteration(recipe)
    lines = {f: len(f.read_text(encoding="utf-8").splitlines()) for f in files}
    for file in files:
        print(f"{lines[file]:5d}  {file.relative_to(ROOT)}")
    rooms = Counter(file.parent.name for file in files)
    print(f"{len(files)} files, {sum(lines.values()):,} lines: {dict(rooms)}")


if __name__ == "__main__":
    main()
