"""Writes the tables of README.md and docs that come from results or code, between their markers.

    python tune/tables.py

`--main-job RUN RUN ...` keeps the evaluations of finished runs of README's first command as
docs/results/main-job.json before. Whole pages of comparisons are made by tune/compare_tables.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from rllib_distrl.algorithm.estimates import ACTIVATIONS, learner_memory, model_shape, size
from rllib_distrl.cli.explain import markdown
from rllib_distrl.experiments.decisions import Decisions, decide
from rllib_distrl.experiments.pages import (
    Table,
    read_about,
    renew_table,
    results_table,
    tested,
    with_baseline,
)
from rllib_distrl.experiments.results import Record, Results, arrange, read_records
from rllib_distrl.experiments.statistics import PairedTest
from rllib_distrl.experiments.sweep import at_equal_average
from rllib_distrl.model.lora import count_adapter_parameters
from rllib_distrl.runs.log import read_progress

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
LAST = 100
"""Iterations of the main job whose calibration is kept."""
MAIN_JOB, IGNORANCE = RESULTS / "main-job.json", RESULTS / "ignorance.json"

COUNTDOWN, GRAPH, GRADED = "headline-countdown", "headline-graph-path", "headline-graded"
EQUAL, AFTER = "at an equal average", "after training"
# What README asks of each comparison: folder, recipe, baseline, metric, where it is read.
SHORT = (
    ("unruly-both", "rank", "scalar", "avg@8", AFTER),
    ("unruly-both", "rank", "mean-variance", "avg@8", AFTER),
    ("unruly-both", "rank", "scalar-clipped", "avg@8", AFTER),
    ("unruly-glitches", "rank", "scalar-clipped", "avg@8", AFTER),
    ("unruly-both", "rank", "grpo-8", "avg@8", AFTER),
    ("unruly-clean", "rank", "scalar", "avg@8", AFTER),
    (COUNTDOWN, "weighted", "ppo", "pass@16", EQUAL),
    (COUNTDOWN, "distrl", "distrl-scalar", "pass@16", EQUAL),
    (COUNTDOWN, "distrl-scalar", "distrl-none", "avg@64", AFTER),
    (GRAPH, "distrl", "distrl-scalar", "avg@64", AFTER),
    (GRADED, "weighted", "weighted-scalar", "best@16", EQUAL),
)
LONG = (
    *((COUNTDOWN, "weighted", other, metric, EQUAL)
      for other in ("ppo", "grpo", "dapo", "lad", "weighted-scalar", "weighted-none")
      for metric in ("pass@16", "pass@64")),
    *((COUNTDOWN, "weighted", other, "avg@64", AFTER) for other in ("ppo", "grpo", "dapo", "lad")),
    *((COUNTDOWN, "distrl", "distrl-scalar", metric, EQUAL) for metric in ("pass@16", "pass@64")),
    *((COUNTDOWN, name, "distrl-none", "avg@64", AFTER) for name in ("distrl", "distrl-scalar")),
    *((COUNTDOWN, name, "single-scalar", "avg@64", AFTER) for name in ("single", "single-none")),
    *((GRAPH, "weighted", other, "pass@16", EQUAL)
      for other in ("ppo", "weighted-scalar", "weighted-none")),
    *((GRAPH, "distrl", other, "avg@64", AFTER) for other in ("distrl-scalar", "distrl-none")),
    *((GRADED, "weighted", other, "best@16", EQUAL)
      for other in ("ppo", "grpo", "dapo", "lad", "weighted-scalar", "weighted-none")),
    *((GRADED, "distrl", other, "best@16", EQUAL)
      for other in ("ppo", "distrl-scalar", "distrl-none")),
    *((GRADED, "best4", other, "avg@64", AFTER) for other in ("best4-scalar", "best4-none")),
    *((GRADED, "distrl-scalar", "distrl-none", "avg@64", AFTER),),
)  # fmt: skip
UNRULY = {
    "unruly-clean": "clean",
    "unruly-scales": "two scales",
    "unruly-glitches": "glitches",
    "unruly-both": "two scales, glitches",
}
INFORMATION, BATCHES = "information-32", "critic-batches"


# What docs/law.md asks of each.
# What a critic is told: folder and ending of a recipe's name by completions an iteration.
TOLD = {
    "16": (BATCHES, "-16"),
    "32": (INFORMATION, ""),
    "64": (BATCHES, "-64"),
    "256": (BATCHES, "-256"),
}
PROMPT_MEAN = tuple(
    ("prompt-baseline", "prompt-mean", "pair", metric, AFTER) for metric in ("avg@32", "pass@32")
)
WIDE = tuple(
    ("wide-law", name, "scalar", metric, AFTER)
    for name in ("quantiles", "utility-4", "utility-4-mean", "utility-16", "maxk-16",
                 "read-best-16", "read-cvar")
    for metric in ("avg@32", "best@16")
)  # fmt: skip
SAO = tuple(
    ("sao", name, "sao", metric, AFTER)
    for name in ("critic-once", "attention-learns", "quantiles", "lambda-1", "lambda-0.95", "rank",
                 "clip", "grpo")
    for metric in ("avg@32", "pass@32")
)  # fmt: skip
# By how many updates completions may be old.
STALE = tuple(
    ("sao", name, baseline, metric, AFTER)
    for name, baseline in (
        ("sao-1", "sao"), ("sao-8", "sao"), ("clip-1", "clip"), ("clip-8", "clip"),
        ("grpo-1", "grpo"), ("grpo-8", "grpo"),
        ("sao-1", "clip-1"), ("sao-8", "clip-8"), ("sao-8", "corrected-8"),
        ("sao-1", "grpo-1"), ("sao-8", "grpo-8"),
    )
    for metric in ("avg@32", "pass@32")
)  # fmt: skip
SEARCHED = (
    ("rollout", "num_generations"),
    ("training", "critic_warmup_iterations"),
    ("training", "shapers"),
)
TASKS = {
    COUNTDOWN: "Countdown",
    GRAPH: "Graph path",
    GRADED: "Countdown, partial credit",
    **{folder: f"Rewards: {cell}" for folder, cell in UNRULY.items()},
    "wide-law": "Steps' worth",
    "sao": "Countdown",
    "prompt-baseline": "Countdown",
}


@cache
def committed(folder: str) -> list[Record]:
    """The records of a comparison."""
    return read_records(RESULTS / folder / "runs")


@cache
def read(folder: str, baseline: str) -> tuple[Results, Decisions]:
    """A committed comparison against any of its recipes."""
    about = read_about(RESULTS / folder)
    results = arrange(committed(folder), with_baseline(about.names, baseline), about.seeds)
    return results, decide(results)


def paired(folder: str, name: str, baseline: str, metric: str, where: str) -> PairedTest | None:
    """A recipe's difference to another; None where the metric has none."""
    results, decisions = read(folder, baseline)
    row = next(row for row in results.rows if row.name == name)
    find = decisions.after if where == AFTER else decisions.at_equal_average
    return find(row, metric)


def comparisons(asked: tuple[tuple[str, str, str, str, str], ...]) -> str:
    """A line per comparison: difference, interval, p, and whether that is clear."""
    lines = []
    for folder, name, baseline, metric, where in asked:
        test = paired(folder, name, baseline, metric, where)
        clear = "yes" if test is not None and test.clear else "no"
        compared = f"`{name}` over `{baseline}`"
        lines.append([TASKS[folder], compared, f"{metric} {where}", tested(metric, test), clear])
    head = ["task", "compared", "read", "difference [95 %], p → corrected", "clear"]
    return Table(head, lines).to_markdown()


def unruly() -> str:
    """What the steps compute on held-out problems: mean ± sd over the seeds, in %."""
    scores: dict[tuple[str, str], list[float]] = {}
    for folder in UNRULY:
        for record in committed(folder):
            scores.setdefault((record.name, folder), []).append(100 * record.metrics["avg@8"])

    def cell(name: str, folder: str) -> str:
        found = scores[name, folder]
        return f"{statistics.mean(found):.1f} ± {statistics.stdev(found):.1f}"

    return _by_rewards(cell)


def unruly_differences() -> str:
    """`rank` less each other, in points of %, with intervals; clear ones in bold."""

    def cell(name: str, folder: str) -> str:
        return "" if name == "rank" else _difference(folder, "rank", name, "avg@8")

    return _by_rewards(cell)


def told() -> str:
    """What telling the critic something is worth, by the size of the batch and lambda."""
    lines = []
    for name, lambda_ in (
        *((name, "") for name in ("state", "text", "placebo", "shaped", "no-critic")),
        ("state", "-0.95"),
        ("shaped", "-0.95"),
    ):
        at = f", lambda {lambda_[1:]}" if lambda_ else ""
        for metric in ("avg@32", "pass@32"):
            cells = [
                _difference(folder, f"{name}{batch}{lambda_}", f"none{batch}{lambda_}", metric)
                for folder, batch in TOLD.values()
            ]
            lines.append([f"`{name}` over `none`{at}", metric, *cells])
    return Table(
        ["compared", "read", *(f"batches of {size}" for size in TOLD)], lines
    ).to_markdown()


def _difference(folder: str, name: str, baseline: str, metric: str) -> str:
    """After training, in bold where it is clear; nothing where one of them was not run."""
    if name not in read_about(RESULTS / folder).names:
        return ""
    test = paired(folder, name, baseline, metric, AFTER)
    if test is None:
        return ""
    found = tested(metric, test).partition(", p")[0]
    return f"**{found}**" if test.clear else found


def _by_rewards(cell: Callable[[str, str], str]) -> str:
    names = read_about(RESULTS / next(iter(UNRULY))).names
    lines = [[f"`{name}`", *(cell(name, folder) for folder in UNRULY)] for name in names]
    return Table(["recipe", *UNRULY.values()], [x for x in lines if any(x[1:])]).to_markdown()


def longer_completions() -> str:
    """The comparison with three seeds."""
    return results_table(read("headline-long", "")[0]).to_markdown()


def main_job() -> str:
    """What README's first command measures before and after training."""
    made = json.loads(MAIN_JOB.read_text(encoding="utf-8"))
    names = ("avg@64", "pass@8", "pass@64")
    lines = []
    for run in made["runs"]:
        pairs = [(100 * run["before"][name], 100 * run["after"][name]) for name in names]
        cells = [f"{a:.1f} → {b:.1f} ({b - a:+.1f})" for a, b in pairs]
        lines.append([str(run["seed"]), *cells, run["commit"][:7]])
    return Table(["seed", *names, "commit"], lines).to_markdown()


def ignorance() -> str:
    """Rank correlations with the error of the value: mean ± sd over the seeds."""
    runs = json.loads(IGNORANCE.read_text(encoding="utf-8"))
    raw, given = "_error_correlation", "_error_partial_correlation"
    kinds = (raw, given, f"{given}_given_position")
    first = runs[0]["variant"]  # the critic is the same beside each statistic
    rows = {
        "spread of the quantiles": ("quantile_spread", [r for r in runs if r["variant"] == first])
    }
    for variant in dict.fromkeys(run["variant"] for run in runs):
        rows[variant] = ("optimism_stat", [run for run in runs if run["variant"] == variant])
    lines = []
    for name, (of, some) in rows.items():
        found = [[run[of + kind] for run in some] for kind in kinds]
        cells = [f"{statistics.mean(v):+.2f} ± {statistics.stdev(v):.2f}" for v in found]
        lines.append([name, str(len(some)), *cells])
    head = ["statistic", "seeds", "raw", "partial given V", "given V and position"]
    commits = ", ".join(sorted({str(run["commit"])[:7] for run in runs}))
    return Table(head, lines).to_markdown() + f"\n\nMade at commit {commits}."


def search() -> str:
    """The trials of the search at equal averages, as tune/equal_average.py prints them."""
    validations = json.loads((RESULTS / "headline-search.json").read_text(encoding="utf-8"))
    by = [f"{group}.{name}" for group, name in SEARCHED]
    table = at_equal_average(validations, by, [0.24, 0.26, 0.28])
    printed = table.to_string(index=False, float_format="{:.3f}".format)
    return f"```text\n{printed}\n```"


SEVEN_BILLION = {
    "vocab_size": 152_064, "hidden_size": 3_584, "intermediate_size": 18_944,
    "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}  # fmt: skip
SEVEN_BILLION_LORA = {"r": 16, "alpha": 32}
PARTS = {
    "weights": ("policy weights", "critic weights", "reference weights"),
    "gradients and moments": ("gradients", "Adam moments"),
    "gathered or sent": ("bfloat16 weights", "gathered weights", "gradients that are sent"),
    "activations and logits": (ACTIVATIONS, "logits of a chunk"),
}


def sharded_memory() -> str:
    """What each learner of a model of seven billion parameters needs, by the estimate."""
    from transformers import Qwen2Config

    model_config = Qwen2Config(**SEVEN_BILLION)
    shape = model_shape(model_config)
    adapters = count_adapter_parameters(SEVEN_BILLION_LORA, model_config)
    columns = {
        "DDP": {"learners": 8},
        "FSDP2, 2 learners": {"learners": 2, "sharded": True},
        "FSDP2, 8": {"learners": 8, "sharded": True},
        "LoRA, DDP": {"learners": 8, "adapter_parameters": adapters},
        "LoRA, FSDP2, 8": {"learners": 8, "adapter_parameters": adapters, "sharded": True},
    }
    lines = []
    for critic in ("shared", "separate"):
        found = [
            learner_memory(
                shape,
                critic=critic,
                critic_outputs=16,
                micro_batch_tokens=16_384,
                precision="bf16",
                activation_checkpointing=True,
                reference=True,
                **settings,
            )
            for settings in columns.values()
        ]
        lines.append([f"**{critic} critic**", *(f"**{size(sum(x.values()))}**" for x in found)])
        for name, parts in PARTS.items():
            lines.append([name, *(size(sum(x.get(part, 0) for part in parts)) for x in found)])
    return Table(["of each learner", *columns], lines).to_markdown()


TABLES = {
    (ROOT / "README.md", "main job"): main_job,
    (ROOT / "README.md", "comparisons"): lambda: comparisons(SHORT),
    (ROOT / "docs" / "headline.md", "comparisons"): lambda: comparisons(LONG),
    (ROOT / "docs" / "headline.md", "search"): search,
    (ROOT / "docs" / "headline.md", "longer completions"): longer_completions,
    (ROOT / "docs" / "law.md", "unruly"): unruly,
    (ROOT / "docs" / "law.md", "law"): unruly_differences,
    (ROOT / "docs" / "law.md", "told"): told,
    (ROOT / "docs" / "law.md", "wide"): lambda: comparisons(WIDE),
    (ROOT / "docs" / "law.md", "prompt mean"): lambda: comparisons(PROMPT_MEAN),
    (ROOT / "docs" / "law.md", "sao"): lambda: comparisons(SAO),
    (ROOT / "docs" / "law.md", "stale"): lambda: comparisons(STALE),
    (ROOT / "docs" / "uncertainty.md", "ignorance"): ignorance,
    (ROOT / "docs" / "methods.md", "methods"): markdown,
    (ROOT / "docs" / "memory.md", "sharded"): sharded_memory,
}


def _calibration(iterations: list[dict[str, Any]]) -> dict[str, Any]:
    """The shares and the largest deviation of the PIT over the returns of some iterations."""

    def mean(name: str) -> float:
        return statistics.mean(
            row[f"learners/default_policy/quantile_{name}"] for row in iterations
        )

    shares = [mean(f"pit_{i}") for i in range(10)]
    off = [abs(sum(shares[: i + 1]) - (i + 1) / 10) for i in range(10)]
    return {
        "iterations": len(iterations),
        "coverage_90": round(mean("coverage_90"), 4),
        "coverage_50": round(mean("coverage_50"), 4),
        "pit": [round(share, 4) for share in shares],
        "deviation": round(max(off), 4),
    }


def keep_main_job(folders: list[Path]) -> None:
    """Writes docs/results/main-job.json from run folders."""
    runs = []
    for folder in folders:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        found = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
        critic = found.get("critic", {})
        runs.append(
            {
                "seed": meta["seed"],
                "commit": meta["commit"],
                **{key: found[key] for key in ("problems", "samples", "before", "after")},
                "critic": {k: v for k, v in critic.items() if "explained_variance" in k},
                "calibration": _calibration(read_progress(folder / "progress.jsonl")[-LAST:]),
            }
        )
    command = "distrl train configs/countdown/distrl.toml run.seed=SEED"
    kept = {"command": command, "runs": runs}
    MAIN_JOB.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Writes every table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--main-job", type=Path, nargs="+", metavar="RUN")
    options = parser.parse_args()
    if options.main_job:
        keep_main_job(options.main_job)
    for (page, name), make in TABLES.items():
        renew_table(page, make(), name)
        print(f"Wrote {name} of {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
