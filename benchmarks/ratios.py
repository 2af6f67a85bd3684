"""Which ratios are measured, and what becomes of the measurements."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles

from rllib_distrl.experiments.pages import Table


@dataclass(frozen=True)
class Ratio:
    """One comparison.

    Attributes:
        name: Key in the results.
        group: Command that measures it.
        ours: (contestant, case, part): what we run; a part of its answer, "" for all of it.
        theirs: The same for the yardstick; None for a plain number.
        target: What is aimed at; an upper bound for a plain number, else a lower one.
        clock: "cpu" seconds of the process (one thread each), or "wall" where there are several.
        what: A line for readers.
    """

    name: str
    group: str
    ours: tuple[str, str, str]
    theirs: tuple[str, str, str] | None
    target: float
    what: str
    clock: str = "cpu"


GRPO, GRPO_NATURAL, PPO = "trl_grpo_fixed", "trl_grpo_natural", "trl_ppo_fixed"
STEP, SMOLLM2 = "step", "smollm2_detached"
RATIOS = (
    Ratio(
        "generation_vs_trl",
        "rollout",
        ("ours", "generation", ""),
        (GRPO, STEP, "generation"),
        2.0,
        "engine against `generate` inside TRL's GRPO, 64 tokens each",
    ),
    Ratio(
        "generation_natural_vs_trl",
        "rollout",
        ("ours", "generation_natural", ""),
        (GRPO_NATURAL, STEP, "generation"),
        4.0,
        "the same, completions that end by themselves (mean 55, at most 128)",
    ),
    Ratio(
        "runner_vs_bare_loop",
        "engine",
        ("ours", "runner", ""),
        ("ours", "bare_loop", ""),
        0.93,
        "engine, environment, grading and episodes against the decoder in a bare loop",
    ),
    Ratio(
        "two_runners_vs_two_bare_loops",
        "engine",
        ("ours_pairs", "two_runners", ""),
        ("ours_pairs", "two_bare_loops", ""),
        0.9,
        "two runner actors against two bare loops, side by side, episodes delivered",
        clock="wall",
    ),
    Ratio(
        "token_reward_us",
        "engine",
        ("ours", "token_rewards", ""),
        None,
        5.0,
        "microseconds per token for `env.step` with a reward at every token",
    ),
    Ratio(
        "update_vs_bare_pytorch",
        "update",
        ("ours_updates", "update_quantile", ""),
        ("ours_updates", "bare_update", ""),
        0.9,
        "learner, from episodes, against plain PyTorch of the same maths, from tensors",
    ),
    Ratio(
        "update_shared_vs_trl",
        "update",
        ("ours_updates", "update_shared", ""),
        (GRPO, STEP, "update"),
        1.0,
        "learner with a critic on the policy's states against TRL's GRPO, which has none",
    ),
    Ratio(
        "update_separate_vs_trl",
        "update",
        ("ours_updates", "update_separate", ""),
        (GRPO, STEP, "update"),
        0.55,
        "learner with a critic as large as the policy against TRL's GRPO, which has none",
    ),
    Ratio(
        "quantile_vs_scalar_update",
        "update",
        ("ours_updates", "update_quantile", ""),
        ("ours_updates", "update_scalar", ""),
        0.97,
        "16 quantiles against one value",
    ),
    Ratio(
        "end_to_end_vs_trl_grpo",
        "end_to_end",
        ("ours_updates", "end_to_end_shared", ""),
        (GRPO, STEP, "end_to_end"),
        1.2,
        "a whole iteration, critic on the policy's states, against a step of TRL's GRPO",
    ),
    Ratio(
        "end_to_end_vs_trl_ppo",
        "end_to_end",
        ("ours_updates", "end_to_end_separate", ""),
        (PPO, STEP, "end_to_end"),
        2.5,
        "a whole iteration, separate critic, against a step of TRL's PPO, "
        "which also runs a reference and a reward model",
    ),
    Ratio(
        "smollm2_generation_vs_hf",
        "smollm2",
        (SMOLLM2, "generation", ""),
        ("smollm2_transformers", "generation", ""),
        2.5,
        "engine against Transformers' `generate`",
    ),
    Ratio(
        "smollm2_generation_vs_vllm",
        "smollm2",
        (SMOLLM2, "generation", ""),
        ("smollm2_vllm", "generation", ""),
        1.2,
        "engine against vLLM on CPU, both with logps",
    ),
    Ratio(
        "smollm2_update_vs_products",
        "smollm2",
        (SMOLLM2, "update", ""),
        (SMOLLM2, "products", ""),
        0.5,
        "share of the update's time that its matrix products alone need",
    ),
    Ratio(
        "smollm2_end_to_end_vs_trl_grpo",
        "smollm2",
        (SMOLLM2, "end_to_end", ""),
        ("trl_grpo_smollm2", STEP, "end_to_end"),
        2.0,
        "a whole iteration, critic on the policy's states, against a step of TRL's GRPO",
    ),
    Ratio(
        "smollm2_end_to_end_separate_vs_trl_grpo",
        "smollm2",
        ("smollm2_separate", "end_to_end", ""),
        ("trl_grpo_smollm2", STEP, "end_to_end"),
        1.0,
        "a whole iteration, critic as large as the policy, against a step of TRL's GRPO",
    ),
)
GROUPS = tuple(dict.fromkeys(ratio.group for ratio in RATIOS))


def summary(ratio: Ratio, pairs: list[tuple[dict, dict | None]]) -> dict:
    """What is kept of a ratio's repeats.

    Args:
        ratio: The comparison.
        pairs: Ours and theirs of each repeat: ``tokens``, ``cpu_s`` and ``wall_s``.

    Returns:
        ``median`` and the quartiles ``low`` and ``high`` of the ratios of neighbouring runs (of
        microseconds per token where there is no yardstick), by the ratio's clock; the median by
        the other clock; tokens per second of both sides.
    """
    clocks = [f"{ratio.clock}_s", "wall_s" if ratio.clock == "cpu" else "cpu_s"]
    values, other = (
        sorted(_value(ours, theirs, clock) for ours, theirs in pairs) for clock in clocks
    )
    low, _, high = quantiles(values, n=4, method="inclusive")
    found = {
        "median": median(values),
        "low": low,
        "high": high,
        "repeats": len(values),
        "clock": ratio.clock,
        f"median_{clocks[1].removesuffix('_s')}": median(other),
        "target": ratio.target,
        "what": ratio.what,
        "ours_tokens_per_s": median(_rate(ours, clocks[0]) for ours, _ in pairs),
    }
    if ratio.theirs is not None:
        rates = [_rate(theirs, clocks[0]) for _, theirs in pairs if theirs is not None]
        found["theirs_tokens_per_s"] = median(rates)
    return {name: round(x, 4) if isinstance(x, float) else x for name, x in found.items()}


def _rate(run: dict, clock: str) -> float:
    return run["tokens"] / run[clock]


def _value(ours: dict, theirs: dict | None, clock: str) -> float:
    return 1e6 / _rate(ours, clock) if theirs is None else _rate(ours, clock) / _rate(theirs, clock)


def reached(name: str, found: dict) -> bool:
    """Whether the median reaches the target."""
    plain = next(ratio for ratio in RATIOS if ratio.name == name).theirs is None
    return found["median"] <= found["target"] if plain else found["median"] >= found["target"]


def short_table(results: dict) -> str:
    """The Markdown table of README.md."""
    ratios = results["ratios"]
    lines = [
        [f"`{name}`", f"{found['median']:.2f}", _aim(name, found)] for name, found in ratios.items()
    ]
    return _with_commits(["ratio", "median", "aim"], lines, ratios)


def table(results: dict, groups: Sequence[str]) -> str:
    """A Markdown table of docs/performance.md."""
    names = [ratio.name for ratio in RATIOS if ratio.group in groups]
    ratios = {name: found for name, found in results["ratios"].items() if name in names}
    lines = []
    for name, found in ratios.items():
        spread = f"{found['low']:.2f} to {found['high']:.2f}"
        median = f"{found['median']:.2f}"
        lines.append([f"`{name}`", median, spread, _aim(name, found), found["what"]])
    return _with_commits(["ratio", "median", "quartiles", "aim", "what"], lines, ratios)


def _aim(name: str, found: dict) -> str:
    sign = "≤" if name == "token_reward_us" else "≥"
    return f"{sign} {found['target']:g}" + ("" if reached(name, found) else " (missed)")


def _with_commits(head: list[str], lines: list[list[str]], ratios: dict[str, dict]) -> str:
    commits = dict.fromkeys(found["commit"] for found in ratios.values())
    measured = f"Measured at {', '.join(commits) or 'no commit yet'}."
    return f"{Table(head, lines).to_markdown()}\n\n{measured}"
