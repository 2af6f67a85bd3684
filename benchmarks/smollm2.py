"""SmolLM2-135M: our side as the recipe of its sums has it, and Transformers' `generate`.

python -m benchmarks.smollm2 MODEL_FOLDER detached | separate | transformers
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.decoders import theirs
from benchmarks.pretrained import RECIPES, build, products
from benchmarks.rollouts import fresh_prompts, generate
from benchmarks.updates import learn, train
from benchmarks.workload import LR, PROMPTS, SMOLLM2, Commands, Stopwatch
from rllib_distrl.model.loading import load_model, load_tokenizer
from tests.helpers import local_learner

DTYPE = getattr(torch, SMOLLM2.dtype)
TASK = f'{{task="benchmarks.task:WordTask", task_config={{workload="{SMOLLM2.name}"}}}}'


def make_algorithm(folder: Path, critic: str) -> Any:
    """That of the recipe, on the workload's prompts, with a batch of one optimiser step."""
    rows = PROMPTS * SMOLLM2.generations
    changed = [
        f"run.model={folder}", "eval.interval=0",
        "environment.env=distrl_envs:distrl/Custom-v0", f"environment.env_config={TASK}",
        f"rollout.prompts_per_iteration={PROMPTS}",
        f"rollout.num_generations={SMOLLM2.generations}",
        f"rollout.max_completion_tokens={SMOLLM2.max_tokens}",
        f"training.minibatch_size={rows}", f"training.critic={critic}", f"training.lr={LR}",
    ]  # fmt: skip
    return build(RECIPES["sums"], SMOLLM2.dtype, changed)


def timed(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds of what treats the workload's tokens."""
    watch = Stopwatch()
    with watch.running():
        work()
    return watch.measured(PROMPTS * SMOLLM2.generations * SMOLLM2.max_tokens)


def our_cases(folder: Path, critic: str) -> dict[str, Callable[[], dict]]:
    """Sampling, learning and both, and the matrix products of learning alone."""
    algo = make_algorithm(folder, critic)
    learner, runner = local_learner(algo), algo.env_runner
    episodes = runner.sample_prompts(fresh_prompts(), SMOLLM2.generations).episodes
    multiply = products(learner, episodes, DTYPE)
    return {
        "generation": lambda: generate(runner.engine, prompts(folder), SMOLLM2),
        "update": lambda: learn(learner, episodes),
        "products": lambda: timed(multiply),
        "end_to_end": lambda: train(algo),
    }


def their_cases(folder: Path) -> dict[str, Callable[[], dict]]:
    """Transformers' `generate`, one row a completion."""
    rows = [ids for ids in prompts(folder) for _ in range(SMOLLM2.generations)]
    sample = torch.inference_mode()(theirs(load_model(str(folder)), DTYPE, rows))
    return {"generation": lambda: timed(sample)}


def prompts(folder: Path) -> list[list[int]]:
    """The tokens of the workload's prompts."""
    tokenizer = load_tokenizer(str(folder))
    ids = [tokenizer(SMOLLM2.prompt(row))["input_ids"] for row in range(PROMPTS)]
    assert {len(one) for one in ids} == {SMOLLM2.prompt_tokens}
    return ids


def main() -> None:
    commands, folder, who = Commands(), Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    commands.serve(their_cases(folder) if who == "transformers" else our_cases(folder, who))


if __name__ == "__main__":
    main()
