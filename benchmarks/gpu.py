"""Update and generation on a GPU: tokens per second, share of peak FLOP/s, memory.

    python -m benchmarks.gpu [--size 0.5b | 1.5b | tiny] [--peak-tflops N] [--out FILE.json]

A Qwen2 with random weights, bf16 autocast over float32 weights, activation checkpointing, a
shared critic of 16 quantiles. Where there is no GPU it says so and ends; `--cpu` goes the same
way on the CPU, for which only `--size tiny` is meant.

FLOPs are counted as 6 per parameter and token of an update, 8 with checkpointing, and 2 of a
generated token; attention's own are left out, so the share is a lower bound.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from distrl_envs.tokenizers import small_tokenizer
from rllib_distrl.engine.protocol import Request, SamplingParams
from rllib_distrl.engine.torch_engine import TorchEngine
from tests.helpers import distrl_config
from tests.learner.rig import make_learner, sample

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000},
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
             "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151_936},
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
             "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151_936},
}  # fmt: skip
# Dense bfloat16 peaks in FLOP/s, from the vendor's data sheets.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}


def peak_flops(name: str, given: float | None) -> float | None:
    """The device's peak in FLOP/s; None where it is not known."""
    if given is not None:
        return given * 1e12
    return next((peak for key, peak in PEAKS.items() if key in name), None)


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def generate(config: Any, device: str, rows: int, tokens: int) -> dict[str, float]:
    """Samples completions of exactly ``tokens`` tokens; the second call is timed."""
    model = transformers.AutoModelForCausalLM.from_config(config)
    engine = TorchEngine(config, (), max_batch_size=rows, device=device, dtype=torch.bfloat16)
    engine.load_weights(model.state_dict(), 0)
    parameters = sum(p.numel() for p in model.parameters())
    requests = [Request(list(range(1, 33)), (0, row // 8, row % 8, 0)) for row in range(rows)]
    seconds = 0.0
    for _ in range(2):
        synchronise(device)
        started = time.perf_counter()
        engine.generate(requests, SamplingParams(max_tokens=tokens))
        synchronise(device)
        seconds = time.perf_counter() - started
    return {
        "tokens_per_s": rows * tokens / seconds,
        "flops": 2 * parameters * rows * tokens / seconds,
    }


def update(config: Any, device: str, rows: int, tokens: int) -> dict[str, float]:
    """One optimiser step on completions of ``tokens`` random tokens; the second is timed."""
    with tempfile.TemporaryDirectory() as folder:
        model = transformers.AutoModelForCausalLM.from_config(config)
        parameters = sum(p.numel() for p in model.parameters())
        model.save_pretrained(folder)
        del model
        small_tokenizer().save_pretrained(folder)
        settings = distrl_config(
            folder, prompts=rows // 4, generations=4, precision="bf16", critic="shared",
            activation_checkpointing=True, micro_batch_tokens=16_384,
        )  # fmt: skip
        settings.learners(num_gpus_per_learner=1 if device == "cuda" else 0)
        settings.rollout(max_completion_tokens=tokens)
        settings.validate()
        learner = make_learner(settings)
    # Only the prompts are used: a small model samples them at once.
    small = distrl_config(prompts=rows // 4, generations=4)
    small.validate()
    episodes = sample(small, prompts=rows // 4, generations=4)
    columns = lengthen(learner._columns(episodes), tokens)
    learner._columns = lambda episodes: columns
    seconds = 0.0
    for iteration in (1, 2):
        synchronise(device)
        started = time.perf_counter()
        learner.update(episodes=episodes, timesteps={"training_iteration": iteration})
        synchronise(device)
        seconds = time.perf_counter() - started
    count = int(columns["loss_mask"].sum() + columns["prompt_lens"].sum())
    return {"tokens_per_s": count / seconds, "flops": 8 * parameters * count / seconds}


def lengthen(columns: dict[str, torch.Tensor], tokens: int) -> dict[str, torch.Tensor]:
    """The same prompts with completions of ``tokens`` random tokens."""
    rows, device = len(columns["prompt_lens"]), columns["prompt_lens"].device
    drawn = np.random.default_rng(0)
    actions = torch.from_numpy(drawn.integers(1, 60, (rows, tokens))).to(device)
    width = int(columns["prompt_lens"].max()) + tokens
    ids = torch.zeros(rows, width, dtype=torch.int64, device=device)
    for row, prompt in enumerate(columns["prompt_lens"].tolist()):
        ids[row, :prompt] = columns["input_ids"][row, :prompt]
        ids[row, prompt : prompt + tokens] = actions[row]
    rewards = torch.zeros(rows, tokens, device=device)
    rewards[:, -1] = torch.from_numpy(drawn.random(rows, dtype=np.float32)).to(device)
    return {
        **columns,
        "input_ids": ids,
        "actions": actions,
        "rewards": rewards,
        "action_logp": torch.full((rows, tokens), -4.0, device=device),
        "loss_mask": torch.ones(rows, tokens, dtype=torch.bool, device=device),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="0.5b")
    parser.add_argument("--cpu", action="store_true", help="go through the motions on the CPU")
    parser.add_argument("--peak-tflops", type=float, help="of the device, dense bfloat16")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512, help="of each completion")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.cpu:
        print("No GPU here: nothing was measured. On a machine with one, run the same command.")
        return
    device = "cpu" if arguments.cpu else "cuda"
    name = "CPU" if arguments.cpu else torch.cuda.get_device_name()
    peak = peak_flops(name, arguments.peak_tflops)
    vocabulary = len(small_tokenizer())
    shape = {**SIZES[arguments.size]}
    shape["vocab_size"] = max(shape["vocab_size"], vocabulary)
    config = transformers.Qwen2Config(**shape, max_position_embeddings=4096)
    results: dict[str, Any] = {"device": name, "size": arguments.size}
    for part, measure in (("generation", generate), ("update", update)):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        found = measure(config, device, arguments.rows, arguments.tokens)
        if peak is not None:
            found["share_of_peak"] = found["flops"] / peak
        if device == "cuda":
            found["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        results[part] = found
        print(part, " ".join(f"{key}={value:,.4g}" for key, value in found.items()))
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
