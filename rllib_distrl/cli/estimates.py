"""Arithmetic of a recipe: episodes, tokens, minibatches, optimiser steps and memory."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from distrl_envs.tokenizers import VOCABULARY

if TYPE_CHECKING:
    from rllib_distrl.model.builtin import BuiltinSpec
    from rllib_distrl.settings import RolloutSettings

# Forward activations kept for backward, per token and layer, in multiples of the hidden size:
# residual stream, two norms, attention's output and its projection (our count, fused attention).
_HIDDEN_ACTIVATIONS = 8
# Of these the residual stream and the norms, which stay in full precision under autocast.
_STREAM_ACTIVATIONS = 4
# Of the feed-forward block: gate, up, their product and its input.
_FEED_FORWARD_ACTIVATIONS = 4
# Limits of control groups, versions 2 and 1, as a container sees its own.
_CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
_LOGITS_COPIES = 2  # logits and softmax of one chunk


@dataclass(frozen=True)
class Updates:
    """What one iteration does, in sequences and in timesteps.

    Attributes:
        episodes: Sequences per iteration.
        timesteps: Completion tokens per iteration, at most.
        minibatch_sequences: Sequences of a minibatch; for RLlib's own algorithms what fits at
            most into a minibatch of timesteps.
        minibatch_timesteps: Timesteps of a minibatch, at most.
        epochs: Passes over the batch.
        steps: Optimiser steps per iteration; at most, where minibatches count timesteps.
        counts_sequences: Whether `minibatch_size` counts sequences (ours) or timesteps.
    """

    episodes: int
    timesteps: int
    minibatch_sequences: int
    minibatch_timesteps: int
    epochs: int
    steps: int
    counts_sequences: bool


@dataclass(frozen=True)
class ModelShape:
    """What the memory of a causal language model depends on.

    Attributes:
        parameters: All parameters of the policy.
        trunk_parameters: Those without the language-model head.
        layers: Transformer blocks.
        hidden: Width.
        intermediate: Width of the feed-forward block.
        kv_width: Key-value heads times head size.
        vocabulary: Size of the vocabulary.
        bytes_each: Bytes of one number.
    """

    parameters: int
    trunk_parameters: int
    layers: int
    hidden: int
    intermediate: int
    kv_width: int
    vocabulary: int
    bytes_each: int


def count_updates(config: Any, rollout: RolloutSettings) -> Updates:
    """Counts what one iteration of a validated `AlgorithmConfig` does."""
    limit = rollout.max_completion_tokens
    learners = max(config.num_learners, 1)
    epochs = config.num_epochs or 1
    if hasattr(config, "rollout_settings"):
        episodes = rollout.prompts_per_iteration * rollout.num_generations
        size = config.minibatch_size or episodes // learners
        return Updates(
            episodes=episodes,
            timesteps=episodes * limit,
            minibatch_sequences=size,
            minibatch_timesteps=size * limit,
            epochs=epochs,
            steps=epochs * math.ceil(episodes / learners / size),
            counts_sequences=True,
        )
    timesteps = config.total_train_batch_size
    size = min(getattr(config, "minibatch_size", None) or timesteps // learners, timesteps)
    return Updates(
        episodes=math.ceil(timesteps / limit),
        timesteps=timesteps,
        minibatch_sequences=max(1, size // limit),
        minibatch_timesteps=size,
        epochs=epochs,
        steps=epochs * math.ceil(timesteps / learners / size),
        counts_sequences=False,
    )


def shape_of(name: str) -> ModelShape:
    """The shape of a model by its name: a folder, a hub id, or `builtin:...`."""
    from rllib_distrl.model.builtin import PREFIX, find_spec
    from rllib_distrl.model.loading import load_config

    if name.startswith(PREFIX):
        return _builtin_shape(find_spec(name))
    return model_shape(load_config(name))


def model_shape(config: Any) -> ModelShape:
    """Reads a model's shape from its Hugging Face configuration, without allocating it."""
    from rllib_distrl.model.causal_lm import trunk_of, without_weights

    model = without_weights(config)
    text = config.get_text_config()
    heads = text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    return ModelShape(
        parameters=sum(p.numel() for p in model.parameters()),
        trunk_parameters=sum(p.numel() for p in trunk_of(model).parameters()),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        kv_width=kv_heads * head_size,
        vocabulary=text.vocab_size,
        bytes_each=next(model.parameters()).element_size(),
    )


def _builtin_shape(spec: BuiltinSpec) -> ModelShape:
    """Counts a built-in Qwen2: Transformers' own class takes two seconds to import."""
    width, inner, vocabulary = spec.hidden_size, spec.intermediate_size, len(VOCABULARY)
    attention = 4 * width * width + 3 * width  # Queries, keys and values have a bias.
    block = attention + 3 * width * inner + 2 * width
    parameters = vocabulary * width + spec.num_layers * block + width
    return ModelShape(
        parameters=parameters,
        trunk_parameters=parameters,  # The head is the embedding.
        layers=spec.num_layers,
        hidden=width,
        intermediate=inner,
        kv_width=width,
        vocabulary=vocabulary,
        bytes_each=4,
    )


def learner_memory(
    shape: ModelShape,
    *,
    critic: str,
    critic_outputs: int,
    micro_batch_tokens: int,
    precision: str = "fp32",
    activation_checkpointing: bool = False,
    adapter_parameters: int | None = None,
    reference: bool = False,
    on_gpu: bool = False,
) -> dict[str, int]:
    """Estimates one learner's memory by part, in bytes.

    Args:
        shape: The model.
        critic: "separate" (own trunk), "shared", "detached" or "none".
        critic_outputs: Outputs of the value head.
        micro_batch_tokens: Tokens that are computed in one forward and backward pass.
        precision: "fp32" or "bf16", whose products are half as large, and which keeps a copy
            of the trunks' weights for the backward pass.
        activation_checkpointing: Whether blocks keep their inputs alone.
        adapter_parameters: Of one trunk's LoRA adapters; None: all parameters learn.
        reference: Whether a reference policy is kept; with adapters it needs no memory.
        on_gpu: Whether it learns on a GPU, where chunks of logits are larger.
    """
    from rllib_distrl.maths.lm_head import ACCELERATOR_LOGITS, CPU_LOGITS

    most_logits = ACCELERATOR_LOGITS if on_gpu else CPU_LOGITS
    each, trunks = shape.bytes_each, 2 if critic == "separate" else 1
    head = (shape.hidden + 1) * critic_outputs if critic != "none" else 0
    if adapter_parameters is None:
        policy = shape.parameters
        own = head + (shape.trunk_parameters if critic == "separate" else 0)
        trained = policy + own
    else:
        policy = shape.parameters + adapter_parameters
        own = head + (adapter_parameters if critic == "separate" else 0)
        trained = own + adapter_parameters
    block = _block_activations(shape, each if precision == "fp32" else each // 2, each)
    kept = shape.layers * block
    if activation_checkpointing:
        kept = shape.layers * shape.hidden * each + block
    parts = {
        "policy weights": policy * each,
        "critic weights": own * each,
        "gradients": trained * each,
        "Adam moments": 2 * trained * each,
        "activations of a micro-batch": micro_batch_tokens * kept * trunks,
        "logits of a chunk": _LOGITS_COPIES
        * 4
        * min(most_logits, micro_batch_tokens * shape.vocabulary),
    }
    if precision == "bf16":
        parts["bfloat16 weights"] = shape.trunk_parameters * trunks * each // 2
    if reference and adapter_parameters is None:
        parts["reference weights"] = shape.parameters * each
    return parts


def machine_memory() -> int:
    """Bytes that processes of this machine may use: its memory, or the container's limit."""
    limits = [psutil.virtual_memory().total]
    for file in _CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # "max" where there is none
            limits.append(int(file.read_text()))
    return min(limits)


def too_large(
    learner: Mapping[str, int], runner: Mapping[str, int], config: Any, memory: int
) -> str | None:
    """Says what to do where the processes of a run cannot fit into this machine's memory.

    Counts those on the CPU: what Ray places on GPUs and other nodes is not known here.

    Args:
        learner: of `learner_memory`, bytes by part.
        runner: of `runner_memory`.
        config: a validated `AlgorithmConfig`.
        memory: bytes that there are.

    Returns:
        None where they fit.
    """
    counts = {
        "learner": 0 if config.num_gpus_per_learner else max(config.num_learners, 1),
        "env runner": 0 if config.num_gpus_per_env_runner else max(config.num_env_runners, 1),
    }
    each = {"learner": sum(learner.values()), "env runner": sum(runner.values())}
    needed = sum(counts[name] * each[name] for name in counts)
    if needed <= memory:
        return None
    parts = [f"{n} {name}(s) x {size(each[name])}" for name, n in counts.items() if n]
    activations = learner["activations of a micro-batch"]
    fixed = sum(learner.values()) - activations
    if counts["learner"] and fixed > memory:
        remedy = (
            f"Weights, gradients and moments of one learner alone are {size(fixed)}: take a "
            "smaller model, lora ([rl_module.model_config.lora]), critic = 'shared', or more RAM."
        )
    elif counts["learner"] and activations > runner["KV cache"]:
        remedy = (
            f"Activations of a micro-batch are {size(activations)}: lower micro_batch_tokens, or "
            "set activation_checkpointing = true, precision = 'bf16' or critic = 'shared'."
        )
    else:
        remedy = "Lower [rollout] max_batch_size, or num_env_runners in [env_runners]."
    return (
        f"This run needs about {size(needed)} ({' + '.join(parts)}), and this machine has "
        f"{size(memory)}. {remedy}"
    )


def size(n_bytes: float) -> str:
    """Formats bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} TiB"


def _block_activations(shape: ModelShape, product_bytes: int, each: int) -> int:
    """Bytes that one block keeps of a token: products in their precision, the stream in full."""
    products = (
        (_HIDDEN_ACTIVATIONS - _STREAM_ACTIVATIONS) * shape.hidden
        + 2 * shape.kv_width
        + _FEED_FORWARD_ACTIVATIONS * shape.intermediate
    )
    return products * product_bytes + _STREAM_ACTIVATIONS * shape.hidden * each


def runner_memory(shape: ModelShape, *, rows: int, tokens: int) -> dict[str, int]:
    """Estimates one env runner's memory by part, in bytes.

    Args:
        shape: The model.
        rows: Sequences that the engine decodes at once.
        tokens: Longest sequence, prompt included.
    """
    each = shape.bytes_each
    return {
        "policy weights": shape.parameters * each,
        "engine's weights": shape.parameters * each,
        "KV cache": 2 * shape.layers * rows * tokens * shape.kv_width * each,
    }
