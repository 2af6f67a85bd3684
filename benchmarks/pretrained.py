"""What an iteration of a real language model costs: SmolLM2-135M on sums, one thread.

    python -m benchmarks.pretrained [--rounds 5] [--dry]

One batch of 64 completions of `configs/smollm2/sums.toml`, as both recipes learn from it: sampled,
given to the learner again and again (`update`: one optimiser step, the pass before it included,
which a critic's values or a reference's logps need), in float32 and in bfloat16. Beside it the
products of the same update alone: each matrix of the model with its tokens, once for that pass,
forward, and for both gradients, through PyTorch in the same type. Contestants
take turns; seconds are CPU seconds, medians over the rounds. Peak memory is that of a process of
its own that trains two iterations of the whole recipe. Writes benchmarks/results/pretrained.json
and renews the table of docs/pretrained.md.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch

from benchmarks.run import RESULTS, ROOT, about, keep
from benchmarks.workload import Stopwatch
from rllib_distrl.experiments.pages import Table
from rllib_distrl.method.prompt_samplers import PromptRequest
from rllib_distrl.model.sequences import from_columns
from rllib_distrl.recipe import load_recipe
from tests.helpers import local_learner

OUT, PAGE = RESULTS.with_name("pretrained.json"), ROOT / "docs" / "pretrained.md"
RECIPES = {name: ROOT / "configs" / "smollm2" / f"{name}.toml" for name in ("sums", "sums_grpo")}
PROMPTS, GENERATIONS = 16, 4
TYPES = {"float32": "fp32", "bfloat16": "bf16"}
QUIET = ["eval.before=false", "eval.interval=0", "eval.problems=2", "eval.n=1", "eval.k=[1]"]


def build(recipe: Path, dtype: str, changed: Sequence[str] = ()) -> Any:
    """The algorithm of a recipe, whose batch is one optimiser step."""
    changed = [
        f"rollout.prompts_per_iteration={PROMPTS}", f"rollout.num_generations={GENERATIONS}",
        f"rollout.dtype={dtype}", f"training.precision={TYPES[dtype]}", "training.lr=1e-9",
        *changed,
    ]  # fmt: skip
    return load_recipe(recipe, changed).build_config().build_algo()


def sizes(learner: Any, episodes: Sequence[Any]) -> dict[str, int]:
    """Sampled tokens of a batch, and the places that its learner computes."""
    packing = from_columns(learner.columns(episodes)).packing
    return {"tokens": sum(map(len, episodes)), "places": len(packing.input_ids)}


def products(learner: Any, episodes: Sequence[Any], dtype: torch.dtype) -> Callable[[], None]:
    """Every matrix of the policy with its tokens, in all passes, and for both gradients."""
    tokens, places = sizes(learner, episodes).values()
    module, refers = learner.policy_module, learner.reference is not None
    trunk = [
        (places, m.in_features, m.out_features)
        for name, m in module.policy.named_modules()
        if isinstance(m, torch.nn.Linear) and "lm_head" not in name
    ]
    head = module.policy.get_output_embeddings()
    shapes = [*trunk, (tokens, head.in_features, head.out_features)]
    factors = {
        (n, a, b): [torch.randn(*size, dtype=dtype) for size in ((n, a), (a, b), (b, n))]
        for n, a, b in set(shapes)
    }

    def multiply() -> None:
        for number, shape in enumerate(shapes):
            x, weight, gradient = factors[shape]
            if refers or (module.has_critic and number < len(trunk)):
                torch.mm(x, weight)
            torch.mm(x, weight)
            torch.mm(gradient.t(), weight.t())
            torch.mm(x.t(), gradient.t())

    return multiply


def contestants(algo: Any, dtype: str) -> tuple[dict[str, Callable[[], Any]], dict[str, int]]:
    """What takes turns in one type, and the sizes of the batch."""
    learner, runner = local_learner(algo), algo.env_runner
    prompts = [PromptRequest(row, 0) for row in range(PROMPTS)]
    report = runner.sample_prompts(prompts, GENERATIONS)
    assert report.error is None, report.error.text
    episodes = report.episodes
    return {
        "sampling": lambda: runner.sample_prompts(prompts, GENERATIONS),
        "weights into the engine": lambda: algo.weight_sync.send(),
        "update": lambda: learner.update(episodes=episodes, timesteps={}, num_epochs=1),
        "products alone": products(learner, episodes, getattr(torch, dtype)),
    }, sizes(learner, episodes)


def measure(recipe: Path, dtype: str, rounds: int) -> dict[str, Any]:
    """The sizes of the batch, and the CPU seconds of all rounds by part."""
    algo = build(recipe, dtype)
    try:
        works, sizes = contestants(algo, dtype)
        found: dict[str, list[float]] = {part: [] for part in works}
        for round_ in range(rounds + 1):
            for part, work in works.items():
                watch = Stopwatch()
                with watch.running():
                    work()
                if round_:  # The first one compiles, loads and fills caches.
                    found[part].append(watch.cpu)
    finally:
        algo.stop()
    return {**sizes, "seconds": found}


def peak_gib(recipe: Path) -> float:
    """Peak memory of a process that trains two iterations."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "rllib_distrl.cli", "train", str(recipe), *QUIET,
            "run.iterations=2", "run.checkpoint_interval=0", "--out", f"{folder}/run",
        ]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20


def table(results: dict[str, Any]) -> str:
    """As it stands in docs/pretrained.md."""
    columns = list(results["cases"])

    def median(case: str, part: str) -> float:
        return float(np.median(results["cases"][case]["seconds"][part]))

    lines = [
        [f"{part}, s", *(f"{median(case, part):.1f}" for case in columns)]
        for part in results["cases"][columns[0]]["seconds"]
    ]
    shares = [median(case, "products alone") / median(case, "update") for case in columns]
    lines.append(["products' share", *(f"{share:.2f}" for share in shares)])
    for what, of in (("sampled tokens", "tokens"), ("computed places", "places")):
        lines.append([what, *(f"{results['cases'][case][of]:,}" for case in columns)])
    return Table(["", *(f"`{name}`" for name in columns)], lines).to_markdown()


def main() -> None:
    """Measures, writes the record and renews the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dry", action="store_true", help="print the table, write nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    peak = peak_gib(RECIPES["sums"])
    cases = {
        f"{name}, {dtype}": measure(recipe, dtype, arguments.rounds)
        for name, recipe in RECIPES.items()
        for dtype in TYPES
    }
    results = {**about(), "smollm2_peak_memory_gib": peak, "cases": cases}
    print(table(results), f"\npeak memory {peak:.1f} GiB")
    if not arguments.dry:
        keep(results, table(results), OUT, PAGE, "cost")


if __name__ == "__main__":
    main()
