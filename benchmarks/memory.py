"""Memory: what `distrl explain` estimates against what is measured, and the chunked LM head.

    python -m benchmarks.memory

Writes benchmarks/results/memory.json and renews the tables of docs/memory.md. The first
tables are of one learner's update in three configurations of a random Qwen2 on the CPU; peaks are
those of PyTorch's allocator. The last compares one forward and backward pass of the chunked head
with the plain log-softmax at a vocabulary of 151,936.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.run import ROOT, git, machine
from distrl_envs.tokenizers import small_tokenizer
from rllib_distrl.algorithm.estimates import learner_memory, model_shape, size
from rllib_distrl.experiments.pages import renew_table
from rllib_distrl.maths.lm_head import token_logps
from rllib_distrl.model.lora import count_adapter_parameters
from tests.helpers import distrl_config, with_model_config
from tests.learner.rig import make_learner, sample

RESULTS, PAGE = ROOT / "benchmarks/results/memory.json", ROOT / "docs/memory.md"
VOCABULARY, HEAD_WIDTH = 151_936, 64
HEAD_TOKENS = (1024, 4096)
LORA = {"r": 8, "alpha": 16}
MICRO_BATCH_TOKENS = 2048
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "fp32, separate critic": {},
    "bf16, shared critic, activation checkpointing, KL to a reference": {
        "precision": "bf16",
        "critic": "shared",
        "activation_checkpointing": True,
        "regularisers": [{"name": "kl"}],
    },
    "fp32, LoRA, separate critic, KL to a reference": {
        "lora": LORA,
        "regularisers": [{"name": "kl"}],
    },
}


def save_model(path: Path) -> None:
    """A random model of some million parameters with a small vocabulary."""
    tokenizer = small_tokenizer()
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=704, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)


def peak_growth(function: Any) -> int:
    """Bytes by which the CPU allocator's level rises above its start while a function runs."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        function()
    assert profile.profiler is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


def unique_bytes(tensors: Any) -> int:
    """Bytes of the storages behind some tensors, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def measure(model: str, settings: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Estimated and measured bytes by part."""
    training = {name: value for name, value in settings.items() if name != "lora"}
    config = distrl_config(
        model, prompts=8, generations=16, micro_batch_tokens=MICRO_BATCH_TOKENS, **training
    )
    config.rollout(max_completion_tokens=64)
    if "lora" in settings:
        with_model_config(config, lora=settings["lora"])
    config.validate()
    learner = make_learner(config)
    episodes = sample(config, prompts=8, generations=16)
    learner.update(episodes=episodes, timesteps={"training_iteration": 1})
    module = learner.policy_module
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    optimizers = [optimizer for _, optimizer in learner.get_optimizers_for_module()]
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    moments = [s[name] for s in states for name in ("exp_avg", "exp_avg_sq")]
    policy = list(module.policy.parameters())
    base = {id(p) for p in policy}
    measured = {
        "policy weights": unique_bytes(policy),
        "critic weights": unique_bytes(p for p in module.parameters() if id(p) not in base),
        "gradients": unique_bytes(gradients),
        "Adam moments": unique_bytes(moments),
    }
    reference = learner.reference
    if reference is not None and reference.policy is not module.policy:
        measured["reference weights"] = unique_bytes(reference.policy.parameters())
    for parameter in module.parameters():
        parameter.grad = None
    growth = peak_growth(
        lambda: learner.update(episodes=episodes, timesteps={"training_iteration": 2})
    )
    measured["the rest at the peak"] = growth - measured["gradients"]
    model_config = transformers.AutoConfig.from_pretrained(model)
    lora = settings.get("lora")
    estimated = learner_memory(
        model_shape(model_config),
        critic=config.critic,
        critic_outputs=config.n_quantiles,
        micro_batch_tokens=MICRO_BATCH_TOKENS,
        precision=config.precision,
        activation_checkpointing=config.activation_checkpointing,
        adapter_parameters=count_adapter_parameters(lora, model_config) if lora else None,
        reference=reference is not None,
    )
    rest = ("activations of a micro-batch", "logits of a chunk", "bfloat16 weights")
    estimated["the rest at the peak"] = sum(estimated.pop(name, 0) for name in rest)
    return {"estimated": estimated, "measured": measured}


def head(tokens: int, *, chunked: bool) -> int:
    """Peak bytes of one forward and backward pass of the head beyond its inputs."""
    hidden = torch.randn(tokens, HEAD_WIDTH, requires_grad=True)
    weight = torch.randn(VOCABULARY, HEAD_WIDTH, requires_grad=True)
    targets = torch.randint(VOCABULARY, (tokens,))

    def run() -> None:
        if chunked:
            token_logps(hidden, weight, targets)[0].sum().backward()
        else:
            logps = (hidden @ weight.t()).log_softmax(-1)
            logps.gather(-1, targets[:, None]).sum().backward()

    return peak_growth(run)


def tables(results: dict[str, Any]) -> str:
    """The Markdown tables of docs/memory.md."""
    lines = []
    for name, found in results["configurations"].items():
        lines += [f"**{name}**", "", "| part | estimated | measured | ratio |", "|---|---|---|---|"]
        rows = {part: [found[kind].get(part, 0) for kind in found] for part in found["measured"]}
        rows["total"] = [sum(parts.values()) for parts in found.values()]
        for part, (guess, real) in rows.items():
            lines.append(f"| {part} | {size(guess)} | {size(real)} | {guess / max(real, 1):.2f} |")
        lines.append("")
    lines += [
        f"**LM head**, forward and backward at a vocabulary of {VOCABULARY:,} (width {HEAD_WIDTH}, "
        "float32), beyond its inputs:",
        "",
        "| tokens | chunked | plain log-softmax |",
        "|---|---|---|",
    ]
    for row in results["head"]:
        lines.append(f"| {row['tokens']:,} | {size(row['chunked'])} | {size(row['plain'])} |")
    return "\n".join(lines)


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {
        "machine": machine(),
        "commit": git("rev-parse", "--short", "HEAD") + ("+" if git("status", "-s") else ""),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "configurations": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder))
        for name, settings in CONFIGURATIONS.items():
            results["configurations"][name] = measure(folder, settings)
    results["head"] = [
        {"tokens": n, "chunked": head(n, chunked=True), "plain": head(n, chunked=False)}
        for n in HEAD_TOKENS
    ]
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    renew_table(PAGE, tables(results))


if __name__ == "__main__":
    main()
