"""One GPU, one command, one table: sampling, update, weights on their way, memory, and numerics.

    python -m benchmarks.gpu [--sizes 135m 1.5b] [--parts ...] [--out FILE.json]

Models have random weights in the shapes of SmolLM2-135M and Qwen2.5-1.5B. Where there is no GPU
the command says so and ends; `--cpu --sizes tiny` goes the same way on the CPU, for tests.

`share of peak` is model FLOPs over the device's dense bfloat16 peak: 2 per parameter and generated
token; for an update 2 (the pass before it) and 6 (forward, backward) per parameter and token that
is not padding. Attention's own and recomputed activations are not counted, so that it is a lower
bound. Every time is the best of the repetitions after one that warms up.
"""

import argparse
import gc
import json
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from distrl_envs.tokenizers import small_tokenizer
from rllib_distrl.engine.protocol import Request, SamplingParams
from rllib_distrl.engine.torch_engine import TorchEngine
from rllib_distrl.engine.weights import content_hash
from rllib_distrl.model import causal_lm_module
from tests.helpers import distrl_config
from tests.learner.rig import make_learner, sample

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000},
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
             "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49_152,
             "tie_word_embeddings": True},
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
             "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151_936,
             "tie_word_embeddings": True},
}  # fmt: skip
# Dense bfloat16 peaks in FLOP/s, from the vendor's data sheets.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
PROMPT = 64
UNRECORDED = "operator by operator"
"""The fast decoder without CUDA graphs."""
TOKENS = 512
"""Of a completion in an update."""


class Bench:
    """The device, what was measured, and how."""

    def __init__(self, device: str, peak: float | None, small: bool) -> None:
        self.device, self.peak, self.small = torch.device(device), peak, small
        self.rows: list[dict[str, Any]] = []
        self.folder = Path(tempfile.mkdtemp())

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def seconds(self, call: Callable[[], Any], repeats: int = 2) -> float:
        """The best of the repetitions after one that warms up; and resets the peak of memory."""
        times = []
        for _ in range(repeats + 1):
            self.synchronise()
            started = time.perf_counter()
            call()
            self.synchronise()
            times.append(time.perf_counter() - started)
        return min(times[1:])

    def synchronise(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def fresh(self) -> None:
        """Gives back what the last part has left on the device."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def add(self, part: str, case: str, **found: Any) -> None:
        if self.cuda:
            found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if self.peak and "flops" in found:
            found["share_of_peak"] = found["flops"] / self.peak
        self.rows.append({"part": part, "case": case, **found})
        print(line(self.rows[-1]), flush=True)

    def attempt(self, part: Callable[..., None], *arguments: Any) -> None:
        """One part; its failure is written down and the others go on."""
        started = time.perf_counter()
        try:
            self.fresh()
            part(self, *arguments)
        except Exception as error:
            traceback.print_exc()
            short = [x for x in arguments if not isinstance(x, list)]
            case = f"{short}: {type(error).__name__}: {str(error)[:200]}"
            self.rows.append({"part": part.__name__, "case": case, "failed": 1})
        self.fresh()
        print(f"  ({part.__name__} took {time.perf_counter() - started:.1f} s)", flush=True)


def line(row: dict[str, Any]) -> str:
    values = " ".join(
        f"{name}={value:,.4g}" if isinstance(value, float | int) else f"{name}={value}"
        for name, value in row.items()
        if name not in ("part", "case")
    )
    return f"{row['part']:<11} {row['case']:<46} {values}"


def model_config(size: str) -> Any:
    return transformers.Qwen2Config(
        **SIZES[size], max_position_embeddings=4096, architectures=["Qwen2ForCausalLM"],
        bos_token_id=None, eos_token_id=1, pad_token_id=0, initializer_range=0.05,
    )  # fmt: skip


def make_model(config: Any, device: torch.device, *, drawn_on: str | None = None) -> Any:
    """Random weights; drawn on the device unless another one has to draw the same."""
    torch.manual_seed(0)
    with torch.device(drawn_on or device):
        return transformers.AutoModelForCausalLM.from_config(config).eval().to(device)


def ceilings(bench: Bench) -> None:
    """What this very device copies and multiplies."""
    n = 512 if bench.small else 8192
    a, b = (torch.randn(n, n, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    seconds = bench.seconds(lambda: torch.mm(a, b, out=out), 5)
    bench.add("ceilings", f"matrix product {n}, bf16", flops=2 * n**3 / seconds)
    big = torch.empty(n * n * 8, device=bench.device)
    to = torch.empty_like(big)
    seconds = bench.seconds(lambda: to.copy_(big), 5)
    bench.add("ceilings", "copy", gb_per_s=8 * big.numel() / seconds / 1e9)


def requests(rows: int, tokens: int, vocabulary: int) -> list[Request]:
    """Groups of eight rows; prompts of slightly different length."""
    drawn = np.random.default_rng(0)
    prompts = [
        drawn.integers(2, vocabulary, PROMPT - row % 4).tolist() for row in range(-(-rows // 8))
    ]
    return [Request(prompts[row // 8], (0, row // 8, row % 8, 0)) for row in range(rows)]


def sampling(bench: Bench, size: str) -> None:
    """Completions of exactly so many tokens from the torch engine, by decoder and rows."""
    config = model_config(size)
    model = make_model(config, bench.device)
    parameters = sum(p.numel() for p in model.parameters())
    tokens = 16 if bench.small else 256
    cases = [("fast", 64), ("fast", 256), ("fast", 1024)]
    if size == "135m":
        cases.append((UNRECORDED, 256))
    for decoder, rows in [("fast", 8), (UNRECORDED, 8)] if bench.small else cases:
        bench.fresh()
        seconds = sampling_seconds(bench, model, decoder, rows, tokens)
        bench.add(
            "sampling", f"{size} {decoder}, {rows} rows of {tokens}", seconds=seconds,
            tokens_per_s=rows * tokens / seconds, ms_per_step=1e3 * seconds / tokens,
            flops=2 * parameters * rows * tokens / seconds,
        )  # fmt: skip


def engine_of(bench: Bench, model: Any, decoder: Any, rows: int, dtype: torch.dtype) -> TorchEngine:
    name = "fast" if decoder == UNRECORDED else decoder
    engine: Any = TorchEngine(
        model.config, (), max_batch_size=rows, device=bench.device, dtype=dtype, decoder=name
    )
    if decoder == UNRECORDED:
        engine.decoder.records = False
    engine.load_weights(model.state_dict(), 0)
    return engine


def sampling_seconds(bench: Bench, model: Any, decoder: str, rows: int, tokens: int) -> float:
    engine = engine_of(bench, model, decoder, rows, torch.bfloat16)
    asked = requests(rows, tokens, model.config.vocab_size)
    params = SamplingParams(max_tokens=tokens)
    return bench.seconds(lambda: engine.generate(asked, params), 1)


def sync(bench: Bench, size: str) -> None:
    """New weights from learner to engine: out of the learner, hashed, in, hashed again."""
    config = model_config(size)
    model = make_model(config, bench.device)
    engine = TorchEngine(config, (), device=bench.device, dtype=torch.bfloat16)
    state = model.state_dict()
    out: dict[str, torch.Tensor] = {}

    def leave() -> None:
        out.update({name: torch.from_numpy(x.detach().cpu().numpy()) for name, x in state.items()})

    parts = {
        "out_s": bench.seconds(leave, 1),
        "hash_cpu_s": bench.seconds(lambda: content_hash(out, dtype=torch.bfloat16), 1),
        "in_s": bench.seconds(lambda: engine.load_weights(out, 0), 1),
        "hash_device_s": bench.seconds(engine.weights_hash, 1),
        "in_from_device_s": bench.seconds(lambda: engine.load_weights(state, 0), 1),
    }
    bench.add("sync", f"{size}, float32 to bfloat16 by way of the host", **parts)


def learner_of(
    bench: Bench, config: Any, device: str, drawn_on: str | None = None, **training: Any
) -> Any:
    """A learner of a model with random weights, without actors.

    The weights never pass a disk: to write gigabytes would take longer than to measure.
    """
    folder = bench.folder / "model"
    config.save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    settings = distrl_config(str(folder), prompts=8, generations=4, **training)
    settings.learners(num_gpus_per_learner=1 if device == "cuda" else 0)
    settings.rollout(max_completion_tokens=TOKENS, torch_threads=torch.get_num_threads())
    original = causal_lm_module.load_model
    causal_lm_module.load_model = lambda name: make_model(
        config, torch.device(device), drawn_on=drawn_on
    )
    try:
        settings.validate()
        return make_learner(settings)
    finally:
        causal_lm_module.load_model = original


def episodes_of(bench: Bench, rows: int) -> list[Any]:
    """Episodes of a tiny model; of them the prompts alone are used."""
    folder = bench.folder / "tiny"
    config = model_config("tiny")
    make_model(config, torch.device("cpu")).save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    settings = distrl_config(str(folder), prompts=rows // 4, generations=4)
    settings.validate()
    return sample(settings, prompts=rows // 4, generations=4)


def update(bench: Bench, size: str) -> None:
    """One optimiser step on completions of random tokens: tokens per second, share of peak."""
    rows, tokens = (8, 24) if bench.small else (256 if size == "135m" else 96, TOKENS)
    episodes = episodes_of(bench, rows)
    cases = [(False, 16_384), (True, 16_384), (True, 65_536)]
    if size == "135m":
        cases.append((False, 65_536))
    for checkpointing, budget in cases[: 1 if bench.small else None]:
        bench.attempt(one_update, size, episodes, tokens, checkpointing, budget)


def one_update(
    bench: Bench, size: str, episodes: list[Any], tokens: int, checkpointing: bool, budget: int
) -> None:
    learner = learner_of(
        bench, model_config(size), bench.device.type, precision="bf16", critic="shared",
        activation_checkpointing=checkpointing, micro_batch_tokens=budget,
    )  # fmt: skip
    parameters = sum(p.numel() for p in learner.policy_module.policy.parameters())
    columns, step = a_step(learner, episodes, tokens)
    seconds = bench.seconds(step, 1)
    count = int(columns["loss_mask"].sum() + columns["prompt_lens"].sum())
    word = "recomputed" if checkpointing else "kept"
    bench.add(
        "update", f"{size}, activations {word}, {budget // 1024}k at a time",
        seconds=seconds, tokens_per_s=count / seconds, flops=8 * parameters * count / seconds,
    )  # fmt: skip


def a_step(learner: Any, episodes: list[Any], tokens: int) -> tuple[dict[str, Any], Any]:
    """Columns of long completions, and a call that learns from them."""
    columns = lengthen(learner.columns(episodes), tokens)
    learner.columns = lambda episodes: columns
    numbers = iter(range(1, 99))
    return columns, lambda: learner.update(
        episodes=episodes, timesteps={"training_iteration": next(numbers)}
    )


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


def engine_numerics(bench: Bench, size: str) -> None:
    """What the engine reports against the model's own forward pass in float32 on the CPU."""
    config = model_config(size)
    model = make_model(config, torch.device("cpu"))
    asked = requests(16, 24, config.vocab_size)
    for decoder, dtype in [(d, t) for d in ("fast", UNRECORDED, "generic") for t in ("32", "16")]:
        kind = {"32": torch.float32, "16": torch.bfloat16}[dtype]
        engine = engine_of(bench, model, decoder, 16, kind)
        completions = engine.generate(asked, SamplingParams(max_tokens=24, temperature=0.9))
        errors = []
        for request, completion in zip(asked[::4], completions[::4], strict=True):
            ids = torch.tensor([[*request.prompt_ids, *completion.tokens.tolist()]])
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, len(request.prompt_ids) - 1 : -1] / 0.9
            own = logits.log_softmax(-1).gather(-1, torch.tensor(completion.tokens)[:, None])[:, 0]
            errors.append(np.abs(own.numpy() - completion.logps))
        error = np.concatenate(errors)
        bench.add(
            "numerics", f"{size} engine {decoder}, {kind} against CPU, logp",
            mean=float(error.mean()), worst=float(error.max()),
        )  # fmt: skip


def learner_numerics(bench: Bench, size: str) -> None:
    """The learner's packed path on the device against the CPU: logps and gradients."""
    config = model_config(size)
    episodes = episodes_of(bench, 16)
    found: dict[str, Any] = {}
    for name, device, precision in (
        ("cpu", "cpu", "fp32"), ("fp32", bench.device.type, "fp32"),
        ("bf16", bench.device.type, "bf16"),
    ):  # fmt: skip
        learner = learner_of(
            bench, config, device, "cpu", precision=precision, critic="shared", grad_clip=None,
            entropy_coeff=0.01, micro_batch_tokens=2048,
        )  # fmt: skip
        columns, step = a_step(learner, episodes, 48)
        logps = learner.policy_module.compute_logps(columns)
        columns["action_logp"] = logps.clone()
        kept: list[dict[Any, torch.Tensor]] = []
        learner.apply_gradients = kept.append
        step()
        gradients = [g.double().cpu().flatten() for g in kept[0].values()]
        found[name] = logps.cpu(), torch.cat(gradients)
    logps, gradients = found.pop("cpu")
    for name, (other, other_gradients) in found.items():
        error = (other - logps).abs()
        bench.add(
            "numerics", f"{size} learner {name} against CPU fp32", logp_mean=float(error.mean()),
            logp_worst=float(error.max()),
            gradient=float((other_gradients - gradients).norm() / gradients.norm()),
        )  # fmt: skip


def profile(bench: Bench, size: str) -> None:
    """Where an update's and a sampling call's time goes, by kernel."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    config = model_config(size)
    model = make_model(config, bench.device)
    rows = 8 if bench.small else 256
    engine = engine_of(bench, model, "fast", rows, torch.bfloat16)
    asked, params = requests(rows, 64, config.vocab_size), SamplingParams(max_tokens=64)
    episodes = episodes_of(bench, 8 if bench.small else 128)
    learner = learner_of(
        bench, config, bench.device.type, precision="bf16", critic="shared",
        micro_batch_tokens=65_536,
    )  # fmt: skip
    _, step = a_step(learner, episodes, 24 if bench.small else TOKENS)
    calls = {"sampling": lambda: engine.generate(asked, params), "update": step}
    kinds = [ProfilerActivity.CUDA] if bench.cuda else [ProfilerActivity.CPU]
    for name, call in calls.items():
        call()
        bench.synchronise()
        started = time.perf_counter()
        with profiler(activities=kinds) as seen:
            call()
            bench.synchronise()
        wall = time.perf_counter() - started
        table = seen.key_averages()
        field = "self_device_time_total" if bench.cuda else "self_cpu_time_total"
        total = sum(getattr(row, field) for row in table) / 1e6
        bench.add("profile", f"{size} {name}", wall_s=wall, kernels_s=total)
        for row in sorted(table, key=lambda row: -getattr(row, field))[:10]:
            seconds = getattr(row, field) / 1e6
            print(f"    {seconds / total:6.1%} {row.count:6d} x {row.key[:110]}", flush=True)


PARTS: dict[str, Callable[..., None]] = {
    "engine_numerics": engine_numerics,
    "learner_numerics": learner_numerics,
    "sampling": sampling,
    "update": update,
    "sync": sync,
    "profile": profile,
}


def commit() -> str:
    try:
        return subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["135m", "1.5b"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--cpu", action="store_true", help="go through the motions on the CPU")
    parser.add_argument("--peak-tflops", type=float, help="of the device, dense bfloat16")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.cpu:
        print("No GPU here: nothing was measured. On a machine with one, run the same command.")
        return
    name = "CPU" if arguments.cpu else torch.cuda.get_device_name()
    peak = next((peak for key, peak in PEAKS.items() if key in name), None)
    if arguments.peak_tflops is not None:
        peak = arguments.peak_tflops * 1e12
    bench = Bench("cpu" if arguments.cpu else "cuda", peak, small=arguments.cpu)
    started = time.perf_counter()
    bench.attempt(ceilings)
    for size in arguments.sizes:
        for part in arguments.parts:
            if part.endswith("numerics") and size != arguments.sizes[0]:
                continue
            # Of gradients the CPU's own take minutes at any other size.
            bench.attempt(PARTS[part], "tiny" if part == "learner_numerics" else size)
            if arguments.out:
                about = {"device": name, "torch": torch.__version__, "commit": commit()}
                text = json.dumps({**about, "rows": bench.rows}, indent=1)
                arguments.out.write_text(text + "\n", encoding="utf-8")
    print(f"\n{name}, torch {torch.__version__}, {time.perf_counter() - started:.0f} s")
    print("\n".join(line(row) for row in bench.rows))


if __name__ == "__main__":
    main()
