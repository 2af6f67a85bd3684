"""Sampling by the model's size, the rows of a batch and the length of completions, one thread.

    python -m benchmarks.sizes [--repeats 3] [--longest 60] [--dry]

Llama shapes with random weights, prompts of 16 tokens that eight rows share, no token ends a
completion. By rows: 64 tokens each. By length: 8 rows; what a token costs between two lengths is
the difference of their times. Cases take turns; seconds are CPU seconds, and what is reported is
the median. A case that would take more than `--longest` seconds is left out. Writes
benchmarks/results/sizes.json, and table and figure of docs/performance.md.
"""

import argparse
import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np
import torch
from matplotlib.ticker import FuncFormatter, NullLocator
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.decoders import SMOLLM2, make_engine, sample
from benchmarks.run import RESULTS, ROOT, about, keep
from rllib_distrl.experiments.pages import Table
from rllib_distrl.figures import chart, legend, line_style

OUT, PAGE = RESULTS.with_name("sizes.json"), ROOT / "docs" / "performance.md"
FIGURE = ROOT / "docs" / "sizes.png"
PROMPT, GROUP = 16, 8
ROWS, TOKENS = (1, 8, 32, 64, 256), 64
LENGTHS, AT_LENGTHS = (64, 128, 256, 512, 1024, 2048), 8


def shape(vocabulary: int, width: int, layers: int, heads: int) -> dict[str, Any]:
    """A Llama whose inner layers are four times as wide."""
    return {
        "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": 4 * width,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads,
        "tie_word_embeddings": True, "max_position_embeddings": 4096,
    }  # fmt: skip


MODELS = {
    "0.2M": (shape(128, 64, 3, 4), "float32"),
    "1M": (shape(128, 128, 4, 4), "float32"),
    "10M": (shape(4096, 320, 6, 5), "float32"),
    "135M": (SMOLLM2, "float32"),
    "135M, bfloat16": (SMOLLM2, "bfloat16"),
}
Case = tuple[int, int]
"""Rows and tokens of each."""
CASES: tuple[Case, ...] = (
    *((rows, TOKENS) for rows in ROWS),
    *((AT_LENGTHS, length) for length in LENGTHS[1:]),
)


def sampler(settings: dict[str, Any], dtype: str) -> Callable[[Case], None]:
    """Samples a case with an engine of its own weights."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**settings))
    engine = make_engine(model, "auto", getattr(torch, dtype))
    prompts = torch.randint(settings["vocab_size"], (-(-max(ROWS) // GROUP), PROMPT)).tolist()

    def sample_case(case: Case) -> None:
        rows, tokens = case
        sample(engine, [prompts[row // GROUP] for row in range(rows)], GROUP, tokens)

    return sample_case


def measure(repeats: int, longest: float) -> dict[str, dict[str, list[float]]]:
    """CPU seconds of every repeat, by model and by `rows x tokens`."""
    samplers = {name: sampler(*model) for name, model in MODELS.items()}
    found: dict[str, dict[str, list[float]]] = {name: {} for name in MODELS}
    for work in samplers.values():
        work((AT_LENGTHS, 8))  # Compiles, loads and fills caches.
    for _ in range(repeats):
        for case in CASES:
            for name, work in samplers.items():
                seconds = found[name]
                if _expected(seconds, case) > longest:
                    continue
                started = time.process_time()
                work(case)
                seconds.setdefault(_key(case), []).append(time.process_time() - started)
                print(name, _key(case), f"{seconds[_key(case)][-1]:.2f} s", flush=True)
    return found


def _key(case: Case) -> str:
    return f"{case[0]} x {case[1]}"


def _expected(seconds: dict[str, list[float]], case: Case) -> float:
    """What a case may take: at the rate of the largest one that is known, 0 where none is."""
    if _key(case) in seconds:
        return 0.0
    known = {rows * tokens: seconds[_key((rows, tokens))]
             for rows, tokens in CASES if _key((rows, tokens)) in seconds}  # fmt: skip
    size = max(known, default=0)
    return median(known[size]) * case[0] * case[1] / size if known else 0.0


def by_rows(seconds: dict[str, list[float]]) -> dict[int, float]:
    """Tokens per CPU second by rows."""
    return {
        rows: rows * TOKENS / median(seconds[_key((rows, TOKENS))])
        for rows in ROWS
        if _key((rows, TOKENS)) in seconds
    }


def by_place(seconds: dict[str, list[float]]) -> dict[float, float]:
    """Milliseconds of a token by its place in the completion, the middle between two lengths."""
    taken = [
        (n, median(seconds[key])) for n in LENGTHS if (key := _key((AT_LENGTHS, n))) in seconds
    ]
    return {
        (n + m) / 2: 1000 * (later - sooner) / (AT_LENGTHS * (m - n))
        for (n, sooner), (m, later) in pairwise(taken)
    }


def slope(places: dict[float, float]) -> float:
    """By how much of what the first token costs a token costs more, per 1,000 tokens before it.

    Of the straight line through all places, by least squares of the relative errors.
    """
    at, cost = np.asarray(list(places)), np.asarray(list(places.values()))
    rise, start = np.polyfit(at, cost, 1, w=1 / cost)
    return float(1000 * rise / start)


def table(results: dict[str, Any]) -> str:
    """As it stands in docs/performance.md."""
    lines = []
    for name, seconds in results["seconds"].items():
        rates, places = by_rows(seconds), by_place(seconds)
        far = max(places)
        lines.append([
            name, *(f"{rates[rows]:,.0f}" if rows in rates else "" for rows in ROWS),
            f"{places[min(places)]:.3g}", f"{places[far]:.3g} ({far:,.0f})",
            f"{100 * slope(places):+.0f} %",
        ])  # fmt: skip
    first = (LENGTHS[0] + LENGTHS[1]) // 2
    rows = [f"{rows} row{'s' if rows > 1 else ''}" for rows in ROWS]
    head = ["parameters", *rows, f"ms a token at {first}", "far on (at)", "per 1,000 tokens"]
    return Table(head, lines).to_markdown()


def draw(results: dict[str, Any]) -> None:
    """Writes the figure."""
    figure, axes = chart(
        [f"Tokens a second, {TOKENS} each", f"Milliseconds a token, {AT_LENGTHS} rows"], height=1.2
    )
    for number, (name, seconds) in enumerate(results["seconds"].items()):
        style = {**line_style(number), "label": name, "markersize": 4, "linewidth": 1.5}
        for panel, values in zip(axes, (by_rows(seconds), by_place(seconds)), strict=True):
            panel.plot(list(values), list(values.values()), **style)
    between = [(n + m) // 2 for n, m in pairwise(LENGTHS)]
    for panel, label, ticks in (
        (axes[0], "rows", ROWS),
        (axes[1], "tokens of the completion before it", between),
    ):
        panel.set(xscale="log", yscale="log", xlabel=label)
        panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    legend(figure, axes)
    figure.save(FIGURE)


def main() -> None:
    """Measures, writes the record and renews the page and its figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--longest", type=float, default=60.0, help="seconds of a case at most")
    parser.add_argument("--dry", action="store_true", help="print the table, write nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        results = {**about(), "seconds": measure(options.repeats, options.longest)}
    print(table(results))
    if not options.dry:
        draw(results)
        keep(results, table(results), OUT, PAGE, "sizes")


if __name__ == "__main__":
    main()
