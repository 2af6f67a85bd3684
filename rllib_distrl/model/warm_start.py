"""The supervised warm start of a built-in model: next-token training on random solutions."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch.nn.functional import cross_entropy

from distrl_envs.task import GeneratedTask
from distrl_envs.tokenizers import EOS, PAD, VOCABULARY, small_tokenizer
from rllib_distrl.model.cached_folder import say

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rllib_distrl.model.builtin import BuiltinSpec

BETAS = (0.9, 0.98)
GRAD_CLIP = 1.0
LAST_LR_SHARE = 0.02
"""The cosine ends at this share of the peak learning rate."""

RECORDED_STEPS = 100
"""The recorded training loss is the mean of this many last steps."""

VALIDATION_EXAMPLES = 1_024

Batch = tuple[torch.Tensor, torch.Tensor]


def build(spec: BuiltinSpec, folder: Path) -> dict[str, Any]:
    """Trains the model of a specification and writes its Hugging Face folder.

    Args:
        spec: The model and its recipe.
        folder: Gets configuration, weights, tokenizer and generation configuration.

    Returns:
        For the record: parameters, losses (nats per completion token), CPU seconds.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    started = time.process_time()
    with _undisturbed(spec.seed):
        model = AutoModelForCausalLM.from_config(spec.model_config(), dtype=torch.float32)
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
    """Random problems with random solutions, as tokens of the small tokenizer.

    Args:
        task: Draws the examples.
        rng: Decides which.
        steps: How many batches.
        batch_size: Examples in each, B.

    Yields:
        Tokens (B, S) padded on the right, and whether each is a target (B, S): a token of the
        completion or its EOS.
    """
    pad, eos = VOCABULARY[PAD], VOCABULARY[EOS]
    for _ in range(steps):
        drawn = [task.sample_solved(rng) for _ in range(batch_size)]
        prompts = [_encode(problem.prompt) for problem, _ in drawn]
        answers = [[*_encode(solution), eos] for _, solution in drawn]
        width = max(len(a) + len(b) for a, b in zip(prompts, answers, strict=True))
        tokens = np.full((batch_size, width), pad, dtype=np.int64)
        targets = np.zeros((batch_size, width), dtype=bool)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            end = len(prompt) + len(answer)
            tokens[row, :end] = prompt + answer
            targets[row, len(prompt) : end] = True
        yield torch.from_numpy(tokens), torch.from_numpy(targets)


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
def no_progress_bars() -> Iterator[None]:
    """Transformers shows no bars inside: for models that load at once they are only noise."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


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
