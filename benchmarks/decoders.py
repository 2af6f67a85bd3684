"""Every decoder beside Transformers' `generate`: tokens per second of one thread.

    python -m benchmarks.decoders [--model smollm2 | countdown | FOLDER] [--dtype bfloat16]
                                  [--rows 1 8 32 64] [--group 8] [--repeats 3] [--out FILE.json]

Prompts of 96 tokens (16 for the built-in model), one per `--group` rows (Transformers computes
each row's), exactly 48 tokens each. Contestants take turns in one process; seconds are CPU seconds,
a ratio is that of two neighbouring runs, and what is reported is the median. `smollm2` is
SmolLM2-135M's shape with random weights; speed does not depend on them.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from rllib_distrl.engine import Request, SamplingParams, TorchEngine
from rllib_distrl.model.loading import load_model

PROMPT, TOKENS = 96, 48
SMALL_PROMPT = 16  # of the built-in model, whose window is 128
THEIRS = "transformers"
SMOLLM2 = {
    "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    "max_position_embeddings": 8192, "rope_theta": 100_000.0,
}  # fmt: skip


def load(name: str) -> Any:
    """A causal LM in float32."""
    if name == "smollm2":
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(LlamaConfig(**SMOLLM2))
    return load_model("builtin:countdown" if name == "countdown" else name)


def ours(
    model: Any, decoder: Any, dtype: torch.dtype, prompts: list[list[int]], group: int
) -> Callable[[], None]:
    """Samples with an engine; no token ends a completion."""
    engine = make_engine(model, decoder, dtype)
    return lambda: sample(engine, prompts, group, TOKENS)


def make_engine(model: Any, decoder: Any, dtype: torch.dtype) -> TorchEngine:
    """An engine with the model's weights, for which no token ends a completion."""
    engine = TorchEngine(model.config, (), dtype=dtype, decoder=decoder)
    engine.load_weights(model.state_dict(), 0)
    return engine


def sample(engine: TorchEngine, prompts: list[list[int]], group: int, tokens: int) -> None:
    """Samples so many tokens for each row's prompt, which `group` rows share."""
    requests = [Request(ids, (0, row // group, row % group, 0)) for row, ids in enumerate(prompts)]
    engine.generate(requests, SamplingParams(tokens))


def void(_: Any) -> None:
    """Takes what nobody reads."""


def theirs(model: Any, dtype: torch.dtype, prompts: list[list[int]]) -> Callable[[], None]:
    """Samples with Transformers, from the whole distribution."""
    own = AutoModelForCausalLM.from_config(model.config, dtype=dtype).eval()
    own.load_state_dict(model.state_dict())
    ids = torch.tensor(prompts)
    settings = {
        "do_sample": True, "top_k": 0, "max_new_tokens": TOKENS, "eos_token_id": None,
        "pad_token_id": 0, "attention_mask": torch.ones_like(ids),
    }  # fmt: skip
    return lambda: void(own.generate(ids, **settings))


def measure(contestants: dict[str, Callable[[], None]], rows: int, repeats: int) -> dict[str, Any]:
    """Tokens per second of each, and its ratio to Transformers, medians over the repeats."""
    for run in contestants.values():
        run()
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, run in contestants.items():
            started = time.process_time()
            run()
            rates[name].append(rows * TOKENS / (time.process_time() - started))
    return {
        name: {
            "tokens_per_cpu_s": statistics.median(own),
            "ratio": statistics.median(a / b for a, b in zip(own, rates[THEIRS], strict=True)),
        }
        for name, own in rates.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--decoders", nargs="+", default=["auto", "generic"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, found = load(options.model), {}
    torch.manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    length = SMALL_PROMPT if options.model == "countdown" else PROMPT
    for name in options.dtype:
        dtype = getattr(torch, name)
        for rows in options.rows:
            distinct = torch.randint(vocabulary, (-(-rows // options.group), length)).tolist()
            prompts = [distinct[row // options.group] for row in range(rows)]
            contestants = {
                decoder: ours(model, decoder, dtype, prompts, options.group)
                for decoder in options.decoders
            }
            contestants[THEIRS] = theirs(model, dtype, prompts)
            with torch.inference_mode():
                result = measure(contestants, rows, options.repeats)
            found[f"{name}/{rows}"] = result
            rates = (
                f"{who} {rate['tokens_per_cpu_s']:,.0f} tok/s ({rate['ratio']:.2f} x)"
                for who, rate in result.items()
            )
            print(name, rows, "rows:", "; ".join(rates), flush=True)
    if options.out:
        results = {"options": vars(options), "results": found}
        options.out.write_text(json.dumps(results, default=str, indent=1) + "\n")


if __name__ == "__main__":
    main()
