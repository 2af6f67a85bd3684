"""Models that need no download: small Qwen2s, warm-started once on generated solutions.

`builtin:countdown` knows how an answer looks and mostly how to calculate, and solves a good tenth
of the problems: something for reinforcement learning to start from.
"""

from __future__ import annotations

import inspect
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch.nn.functional import cross_entropy

from distrl_envs import task as task_module
from distrl_envs.task import GeneratedTask, Problem, Turn
from distrl_envs.tasks import make_task
from distrl_envs.tokenizers import EOS, PAD, VOCABULARY, small_tokenizer
from rllib_distrl.files import CachedFolder, content_key, say
from rllib_distrl.model.causal_lm import no_progress_bars

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, Qwen2Config

PREFIX = "builtin:"

BETAS = (0.9, 0.98)
GRAD_CLIP = 1.0
LAST_LR_SHARE = 0.02
"""The cosine ends at this share of the peak learning rate."""

RECORDED_STEPS = 100
"""The recorded training loss is the mean of this many last steps."""

VALIDATION_EXAMPLES = 1_024

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class BuiltinSpec:
    """Everything that determines a built-in model, apart from the code.

    Attributes:
        name: What follows "builtin:".
        task: Name of a generated task.
        task_config: Its arguments, apart from the split.
        hidden_size: Width; divided by `num_heads` it gives the head size, at least 32 for vLLM.
        num_layers: Transformer blocks.
        num_heads: Attention heads, as many for keys and values.
        intermediate_size: Width of the feed-forward part.
        window: Most tokens of prompt and completion together.
        initializer_range: Standard deviation of the initial weights.
        steps: Optimiser steps of the warm start.
        batch_size: Examples per step, each used once.
        lr: Peak learning rate of AdamW; linear warm-up, then a cosine.
        warmup_steps: Steps of the warm-up.
        seed: Of the initial weights and the examples.
        start: Name of the built-in model of the same shape whose weights it starts from, instead
            of random ones.
    """

    name: str
    task: str = "countdown"
    task_config: dict[str, Any] = field(default_factory=dict)
    hidden_size: int = 64
    num_layers: int = 3
    num_heads: int = 2
    intermediate_size: int = 192
    window: int = 128
    initializer_range: float = 0.08
    steps: int = 2_200
    batch_size: int = 64
    lr: float = 1e-2
    warmup_steps: int = 50
    seed: int = 0
    start: str | None = None

    def make_task(self, split: str = "train") -> GeneratedTask:
        """The task whose solutions the model is trained on."""
        made = make_task(self.task, split=split, **self.task_config)
        assert isinstance(made, GeneratedTask)
        return made

    def model_config(self) -> Qwen2Config:
        """The Hugging Face configuration, without building anything."""
        from transformers import Qwen2Config

        return Qwen2Config(
            vocab_size=len(VOCABULARY),
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_heads,
            intermediate_size=self.intermediate_size,
            max_position_embeddings=self.window,
            initializer_range=self.initializer_range,
            tie_word_embeddings=True,
            eos_token_id=VOCABULARY[EOS],
            pad_token_id=VOCABULARY[PAD],
            architectures=["Qwen2ForCausalLM"],
        )

    def generation_config(self) -> GenerationConfig:
        """What `warm_start` saves beside the model, without building anything."""
        from transformers import GenerationConfig

        return GenerationConfig(
            do_sample=True, eos_token_id=VOCABULARY[EOS], pad_token_id=VOCABULARY[PAD]
        )

    def key(self) -> dict[str, Any]:
        """What a cached build must agree with to be used."""
        task = self.make_task()
        return {
            "spec": asdict(self),
            "start": SPECS[self.start].key() if self.start else None,
            "vocabulary": VOCABULARY,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "sources": [
                inspect.getsource(inspect.getmodule(type(task)) or task_module),
                inspect.getsource(task_module),
                *map(
                    inspect.getsource,
                    (warm_start, example_batches, _example, learning_rate, _train, _loss),
                ),
            ],
        }


SPECS = {
    spec.name: spec
    for spec in (
        BuiltinSpec("countdown"),
        BuiltinSpec("graph-path", task="graph_path"),
        # Six numbers instead of four: completions of 30 tokens instead of 18.
        BuiltinSpec("countdown-6", task_config={"numbers": 6}, steps=1_600),
        # Games of several turns, played at random or with mistakes: their form is known.
        BuiltinSpec(
            "blackjack",
            task="blackjack",
            window=192,
            hidden_size=32,
            num_heads=1,
            intermediate_size=96,
            steps=300,
        ),
        BuiltinSpec("mastermind", task="mastermind", steps=500, lr=7e-3),
        BuiltinSpec(
            "countdown-check",
            task="countdown_check",
            window=160,
            start="countdown",
            steps=300,
            lr=3e-3,
        ),
        # For tests and quick looks: knows the form of an answer, seldom the answer.
        BuiltinSpec(
            "countdown-tiny",
            hidden_size=32,
            num_layers=2,
            num_heads=1,
            intermediate_size=96,
            steps=500,
            batch_size=32,
            lr=2e-2,
        ),
    )
}
"""The built-in models by name."""


def find_spec(name: str) -> BuiltinSpec:
    """The specification of `builtin:NAME`.

    Raises:
        ValueError: If there is no such model.
    """
    try:
        return SPECS[name.removeprefix(PREFIX)]
    except KeyError:
        allowed = ", ".join(PREFIX + known for known in SPECS)
        raise ValueError(
            f"Got model {name!r}; the built-in models are {allowed}. Choose one of them, a folder, "
            "or the id of a model on the Hugging Face hub."
        ) from None


def builtin_folder(spec: BuiltinSpec, root: Path | None = None) -> Path:
    """The Hugging Face folder of a built-in model, built on first use.

    The build is deterministic (up to the processor's arithmetic), uses one thread, and leaves the
    caller's random state and thread count as they were. The folder also holds `meta.json`: what
    determined it, its loss, and a checksum of each file. Of several processes one builds, the
    others wait.

    Args:
        spec: The model.
        root: Cache directory; by default `files.cache_root()`.

    Raises:
        ValueError: If the cache directory cannot be written to.
    """
    key = spec.key()
    folder = CachedFolder(f"{spec.name}-{content_key(key)}", f"{PREFIX}{spec.name}", root)
    del key["sources"], key["start"]  # already in the hash; too long to record
    return folder.get(lambda target: {"key": key, **warm_start(spec, target, root)})


def warm_start(spec: BuiltinSpec, folder: Path, root: Path | None = None) -> dict[str, Any]:
    """Trains the model of a specification and writes its Hugging Face folder.

    Args:
        spec: The model and its recipe.
        folder: Gets configuration, weights, tokenizer and generation configuration.
        root: Cache directory of the model that it starts from.

    Returns:
        For the record: parameters, losses (nats per completion token), CPU seconds.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    started = time.process_time()
    with _undisturbed(spec.seed):
        model = AutoModelForCausalLM.from_config(spec.model_config(), dtype=torch.float32)
        if spec.start is not None:
            with no_progress_bars():
                other = AutoModelForCausalLM.from_pretrained(
                    builtin_folder(SPECS[spec.start], root), dtype=torch.float32
                )
            model.load_state_dict(other.state_dict())
        train_loss = _train(model, spec)
        validation_loss = _validate(model, spec)
    model.generation_config = GenerationConfig(
        do_sample=True, eos_token_id=VOCABULARY[EOS], pad_token_id=VOCABULARY[PAD]
    )
    with no_progress_bars():
        model.save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "train_loss": train_loss,
        "validation_loss": validation_loss,
        "cpu_seconds": round(time.process_time() - started, 1),
    }


def example_batches(
    task: GeneratedTask, rng: np.random.Generator, steps: int, batch_size: int
) -> Iterator[Batch]:
    """Random problems with demonstrations of them, as tokens of the small tokenizer.

    Args:
        task: Draws the examples.
        rng: Decides which.
        steps: How many batches.
        batch_size: Examples in each, B.

    Yields:
        Tokens (B, S) padded on the right, and whether each is a target (B, S): a token of what
        the model says, or the EOS of a turn.
    """
    for _ in range(steps):
        rows = [_example(*task.sample_demonstration(rng)) for _ in range(batch_size)]
        width = max(len(ids) for ids, _ in rows)
        tokens = np.full((batch_size, width), VOCABULARY[PAD], dtype=np.int64)
        targets = np.zeros((batch_size, width), dtype=bool)
        for row, (ids, said) in enumerate(rows):
            tokens[row, : len(ids)] = ids
            targets[row, : len(ids)] = said
        yield torch.from_numpy(tokens), torch.from_numpy(targets)


def _example(problem: Problem, turns: Sequence[Turn]) -> tuple[list[int], list[bool]]:
    """An episode's tokens, as `TokenEnv` would have them, and which of them the model says."""
    ids = _encode(problem.prompt)
    said, mark = [False] * len(ids), ids[-1]
    for turn in turns:
        answer = [*_encode(turn.completion), VOCABULARY[EOS]]
        ids, said = ids + answer, said + [True] * len(answer)
        if turn.reply is not None and not turn.reply.over:
            reply = [*_encode(turn.reply.text), mark]
            ids, said = ids + reply, said + [False] * len(reply)
    return ids, said


def _encode(text: str) -> list[int]:
    """As the small tokenizer does, at a tenth of the time."""
    return [VOCABULARY[word] for word in text.split()]


def learning_rate(spec: BuiltinSpec, step: int) -> float:
    """Linear warm-up, then a cosine from the peak down to its `LAST_LR_SHARE`.

    Args:
        spec: Gives the peak and the lengths.
        step: From 0.
    """
    warmup = min(spec.warmup_steps, spec.steps)
    if step < warmup:
        return spec.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, spec.steps - warmup)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return spec.lr * (LAST_LR_SHARE + (1.0 - LAST_LR_SHARE) * cosine)


def _train(model: PreTrainedModel, spec: BuiltinSpec) -> float:
    """Trains in place; returns the mean loss of the last steps."""
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=spec.lr, betas=BETAS, weight_decay=0.0, fused=True
    )
    rng = np.random.default_rng(spec.seed)
    batches = example_batches(spec.make_task(), rng, spec.steps, spec.batch_size)
    losses: list[float] = []
    for step, batch in enumerate(_shown(batches, spec)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(spec, step)
        loss = _loss(model, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return float(np.mean(losses[-RECORDED_STEPS:]))


def _validate(model: PreTrainedModel, spec: BuiltinSpec) -> float:
    """The loss on problems of the validation split."""
    task = spec.make_task("validation")
    (batch,) = example_batches(task, np.random.default_rng(spec.seed), 1, VALIDATION_EXAMPLES)
    with torch.no_grad():
        return _loss(model, batch).item()


def _loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Mean cross entropy of the target tokens; the LM head sees no other position."""
    tokens, targets = batch
    # Causal attention and padding on the right: no attention mask is needed.
    hidden = model.base_model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
    counted = targets[:, 1:]
    head = model.get_output_embeddings()
    assert head is not None
    logits = head(hidden[counted])
    return cross_entropy(logits, tokens[:, 1:][counted])


@contextmanager
def _undisturbed(seed: int) -> Iterator[None]:
    """One thread and a seeded generator inside, everything as it was afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


def _shown(batches: Iterable[Batch], spec: BuiltinSpec) -> Iterator[Batch]:
    """Passes the batches on, with a progress bar on a terminal and one line elsewhere."""
    title = f"Warm-starting builtin:{spec.name} (once, then cached)"
    if not sys.stderr.isatty():
        say(f"{title}: {spec.steps:,} steps of {spec.batch_size} examples.")
        yield from batches
        return
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as progress:
        yield from progress.track(batches, total=spec.steps, description=title)
