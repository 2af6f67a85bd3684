"""Arithmetic of a recipe: episodes, tokens, minibatches, optimiser steps and memory."""

from __future__ import annotations

import contextlib
import math
import os
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from distrl_envs.tokenizers import VOCABULARY
from rllib_distrl.rllib_traps import is_registered_env
from rllib_distrl.settings import (
    CRITIC_TRUNKS,
    MOST_MICRO_BATCH_TOKENS,
    RolloutSettings,
    micro_batch_budget,
)

if TYPE_CHECKING:
    from rllib_distrl.model.builtin import BuiltinSpec

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
ACTIVATIONS = "activations of a micro-batch"
# What FSDP2 leaves a share of to each learner; beside it is what `_at_once` counts.
_SHARED_OUT = (
    "policy weights", "critic weights", "gradients", "Adam moments", "reference weights"
)  # fmt: skip
_LOGITS_COPIES = 2  # logits and softmax of one chunk
_FLOAT32 = 4  # bytes of a number that learns, whatever type the model was saved in
_ENGINE_BYTES = {"float32": 4, "bfloat16": 2}
UNKNOWN_PROMPT = 8_192  # tokens of a prompt that is longer than most
# Shares of a machine's and a GPU's memory that "auto" fills; the rest is left to what is not
# counted: libraries, the system, fragments. (Measured on a GPU: 1.05 to 1.17 times the estimate.)
_FILLED, _FILLED_OF_GPU = 0.9, 0.8


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
    """

    parameters: int
    trunk_parameters: int
    layers: int
    hidden: int
    intermediate: int
    kv_width: int
    vocabulary: int

    @property
    def embedding_parameters(self) -> int:
        """Those of the embedding."""
        return self.vocabulary * self.hidden

    @property
    def block_parameters(self) -> int:
        """Those of one block, about: of the trunk without its embeddings."""
        return (self.trunk_parameters - self.embedding_parameters) // self.layers

    @property
    def tied(self) -> bool:
        """Whether the embedding is the language-model head too."""
        return self.parameters == self.trunk_parameters


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
    learners: int = 1,
    sharded: bool = False,
) -> dict[str, int]:
    """Estimates one learner's memory by part, in bytes.

    Args:
        shape: The model.
        critic: "separate" (own trunk), "twin" (two), "shared", "detached" or "none".
        critic_outputs: Outputs of the value head.
        micro_batch_tokens: Tokens that are computed in one forward and backward pass.
        precision: "fp32" or "bf16", whose products are half as large, and which keeps a copy
            of the trunks' weights for the backward pass.
        activation_checkpointing: Whether blocks keep their inputs alone.
        adapter_parameters: Of one trunk's LoRA adapters; None: all parameters learn.
        reference: Whether a reference policy is kept; with adapters it needs no memory.
        learners: How many there are.
        sharded: Whether each of them holds its share alone, and not a copy.
    """
    from rllib_distrl.maths.lm_head import CHUNK_LOGITS

    each, own_trunks = _FLOAT32, CRITIC_TRUNKS.get(critic, 0)
    trunks = 1 + own_trunks
    head = (shape.hidden + 1) * critic_outputs if critic != "none" else 0
    if adapter_parameters is None:
        policy = shape.parameters
        own = head + own_trunks * shape.trunk_parameters
        trained = policy + own
    else:
        policy = shape.parameters + adapter_parameters
        own = head + own_trunks * adapter_parameters
        trained = own + adapter_parameters
        if sharded:  # A trunk beside the policy's then has frozen weights of its own.
            own += own_trunks * shape.layers * shape.block_parameters
            own += own_trunks * shape.embedding_parameters * (not shape.tied)
    block = _block_activations(shape, each if precision == "fp32" else each // 2, each)
    kept = shape.layers * block
    if activation_checkpointing:
        kept = shape.layers * shape.hidden * each + block
    parts = {
        "policy weights": policy * each,
        "critic weights": own * each,
        "gradients": trained * each,
        "Adam moments": 2 * trained * each,
        ACTIVATIONS: micro_batch_tokens * kept * trunks,
        "logits of a chunk": _LOGITS_COPIES
        * 4
        * min(CHUNK_LOGITS, micro_batch_tokens * shape.vocabulary),
    }
    if reference and adapter_parameters is None:
        parts["reference weights"] = shape.parameters * each
    if precision == "bf16" and not sharded:
        parts["bfloat16 weights"] = shape.trunk_parameters * trunks * each // 2
    if learners > 1 and not sharded:
        parts["gradients that are sent"] = trained * each
    if sharded:
        held = {name: -(-parts[name] // learners) for name in _SHARED_OUT if name in parts}
        parts |= held
        parts["gathered weights"], parts["gradients that are sent"] = _at_once(
            shape, trunks, head, adapter_parameters, each if precision == "fp32" else each // 2
        )
    return parts


def _at_once(
    shape: ModelShape, trunks: int, value_head: int, adapters: int | None, block_bytes: int
) -> tuple[int, int]:
    """Bytes of gathered weights and of whole gradients at the worst moment of a sharded pass.

    Gathered are what is in no unit (the value head, and an embedding that is the head too) and the
    unit that runs: with it the memory it has come in, or the next block. Its gradient is there
    twice, as it is made and as it is sent; those of embeddings, and of what is in no unit, wait for
    the end of the backward pass, where they are sent one by one (our count; PyTorch 2.13).
    """
    each, block = _FLOAT32, shape.block_parameters
    head = shape.parameters - shape.trunk_parameters
    embedding = learned = shape.embedding_parameters
    learned_head, learned_block = head, block
    if adapters is not None:
        learned, learned_head, learned_block = 0, 0, adapters // shape.layers
    outside = each * (value_head + (embedding if shape.tied else 0))
    # Of a tied model a critic's own embedding is a unit, unless it is the policy's frozen one.
    unit = 0 if shape.tied and (trunks == 1 or adapters is not None) else each * embedding
    waiting = value_head + (trunks - 1 + shape.tied) * learned
    moments = {
        "forward": (outside + 2 * max(block_bytes * block, unit), 0),
        "of the head": (
            outside + each * head + block_bytes * block,
            each * (waiting + 2 * learned_head),
        ),
        "of a block": (outside + 2 * block_bytes * block, each * (waiting + 2 * learned_block)),
        "the end": (outside, each * (value_head + (trunks + 1) * learned)),
    }
    return max(moments.values(), key=sum)


def _block_activations(shape: ModelShape, product_bytes: int, each: int) -> int:
    """Bytes that one block keeps of a token: products in their precision, the stream in full."""
    products = (
        (_HIDDEN_ACTIVATIONS - _STREAM_ACTIVATIONS) * shape.hidden
        + 2 * shape.kv_width
        + _FEED_FORWARD_ACTIVATIONS * shape.intermediate
    )
    return products * product_bytes + _STREAM_ACTIVATIONS * shape.hidden * each


def runner_memory(
    shape: ModelShape, *, rows: int, tokens: int, dtype: str = "float32", lent: bool = False
) -> dict[str, int]:
    """Estimates one env runner's memory by part, in bytes.

    Args:
        shape: The model.
        rows: Sequences that the engine decodes at once.
        tokens: Longest sequence, prompt included.
        dtype: Of the engine: [rollout] dtype. What hands weights on to it holds float32.
        lent: Whether that is the learner's own memory.
    """
    each = _ENGINE_BYTES[dtype]
    held = {} if lent else {"policy weights": shape.parameters * _FLOAT32}
    return {
        **held,
        "engine's weights": shape.parameters * each,
        "KV cache": 2 * shape.layers * rows * tokens * shape.kv_width * each,
    }


def machine_memory() -> int:
    """Bytes that processes of this machine may use: its memory, or the container's limit."""
    limits = [psutil.virtual_memory().total]
    for file in _CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # "max" where there is none
            limits.append(int(file.read_text()))
    return min(limits)


def gpu_memory() -> int | None:
    """Bytes of this machine's smallest GPU; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return min(int(device.total_memory) for device in devices)


@dataclass(frozen=True)
class Room:
    """Memory for a run.

    Attributes:
        machine: Bytes of this machine.
        gpu: Bytes of a GPU; None where that is not known.
    """

    machine: int
    gpu: int | None = None

    @classmethod
    def here(cls, config: Any) -> Room | None:
        """That of this machine; None on a cluster, of whose machines nothing is known.

        Args:
            config: A validated `AlgorithmConfig`.
        """
        if os.environ.get("RAY_ADDRESS"):
            return None
        return cls(machine_memory(), gpu_memory() if config.num_gpus_per_learner else None)

    def to_fill(self) -> Room:
        """The part that "auto" may fill."""
        gpu = None if self.gpu is None else int(_FILLED_OF_GPU * self.gpu)
        return Room(int(_FILLED * self.machine), gpu)


@dataclass(frozen=True)
class Needs:
    """Memory of the processes of a run.

    Attributes:
        learner: Of each, bytes by part, as `learner_memory` gives them.
        runner: Of each env runner, as `runner_memory` does.
        micro_batch_tokens: Token places of the learner's largest micro-batch.
        longest: Tokens of the longest sequence, below which no micro-batch can be.
    """

    learner: Mapping[str, int]
    runner: Mapping[str, int]
    micro_batch_tokens: int
    longest: int

    @classmethod
    def of(
        cls,
        config: Any,
        rollout: RolloutSettings,
        shape: ModelShape,
        longest: int,
        budget: int | None = None,
    ) -> Needs:
        """Those of a validated configuration, ours or one of RLlib's own.

        Args:
            config: An `AlgorithmConfig`.
            rollout: How it samples.
            shape: Of its model.
            longest: Tokens of the longest sequence, prompt included.
            budget: Token places of a micro-batch; None: those of the configuration.
        """
        from rllib_distrl.method.critic import make_head

        settings, updates = config.model_config, count_updates(config, rollout)
        # In steady state every segment of a completion is under way, and whole groups come in
        # bursts.
        segments = 1
        if rollout.segment_tokens:
            segments = math.ceil(rollout.max_completion_tokens / rollout.segment_tokens)
        growth = segments * _growth(config, rollout)
        bursts = growth if config.minibatch_size is None else 1
        minibatch_tokens = math.ceil(bursts * updates.minibatch_sequences) * longest
        if budget is None:
            budget = micro_batch_budget(settings.get("micro_batch_tokens", minibatch_tokens))
        budget = min(budget, minibatch_tokens)
        learner = learner_memory(
            shape,
            critic=settings.get("critic", "separate"),
            critic_outputs=make_head(settings).n_outputs if "head" in settings else 1,
            micro_batch_tokens=budget,
            precision=settings.get("precision", "fp32"),
            activation_checkpointing=settings.get("activation_checkpointing", False),
            adapter_parameters=_adapter_parameters(settings),
            reference=_keeps_reference(config),
            learners=max(config.num_learners, 1),
            sharded=getattr(config, "sharding", "none") != "none",
        )
        rows = min(rollout.max_batch_size, math.ceil(growth * updates.episodes))
        # Merged adapters, and what comes from a GPU, are copies.
        copied = config.num_env_runners or config.num_gpus_per_learner or settings.get("lora")
        lent = getattr(config, "lends_weights", False) and not copied
        runner = runner_memory(shape, rows=rows, tokens=longest, dtype=rollout.dtype, lent=lent)
        return cls(learner, runner, budget, longest)


def _growth(config: Any, rollout: RolloutSettings) -> float:
    """Completions of the largest batch over those that prompts are given at first."""
    from rllib_distrl.method.registry import resolve

    if not hasattr(config, "allocator"):
        return 1.0
    allocator = resolve("allocator", config.allocator)(rollout.num_generations, 0)
    return getattr(allocator, "growth", 1.0)


def _adapter_parameters(settings: Mapping[str, Any]) -> int | None:
    from rllib_distrl.model.loading import load_config
    from rllib_distrl.model.lora import count_adapter_parameters

    lora = settings.get("lora")
    return count_adapter_parameters(lora, load_config(settings["model"])) if lora else None


def _keeps_reference(config: Any) -> bool:
    """Whether a stage of ours reads a reference policy; stock algorithms have none."""
    from rllib_distrl.method.pipeline import Method

    return hasattr(config, "rollout_settings") and "ref_logp" in Method.from_config(config).needs


def largest_micro_batch(config: Any) -> int:
    """What ``micro_batch_tokens = "auto"`` stands for on this machine.

    The most that our methods take by default, 16,384, or the longest sequence where that is more.
    Where the estimate then exceeds nine tenths of the machine's memory (four fifths of a GPU's; our
    choice), the most with which it does not, and at least the longest sequence, fit or not.

    Args:
        config: A `DistRLConfig`, validated but for this.
    """
    room = Room.here(config)
    shape = shape_of(config.model_config["model"])
    rollout = config.rollout_settings

    def largest(longest: int) -> int:
        most = max(MOST_MICRO_BATCH_TOKENS, longest)
        if room is None:
            return most
        available = room.to_fill()

        def exceeds(budget: int) -> bool:
            needs = Needs.of(config, rollout, shape, longest, budget)
            return too_large(needs, config, available) is not None

        if not exceeds(most):
            return most
        choices = range(longest, most + 1)
        return choices[max(bisect_left(choices, True, key=exceeds) - 1, 0)]

    # The env, which knows the longest sequence, is made only where it could matter.
    found = largest(UNKNOWN_PROMPT + rollout.max_completion_tokens)
    if found != MOST_MICRO_BATCH_TOKENS:
        found = largest(longest_sequence(config, rollout))
    return found


def longest_sequence(config: Any, rollout: RolloutSettings) -> int:
    """Tokens of the longest sequence that the env of a configuration admits.

    That is prompt, completion and, in a task of several turns, the replies to all turns but the
    last; before them a text for the critic, where it reads one. An env that Gymnasium does not make
    is not asked: ``max_prompt_tokens`` in its ``env_config`` counts, or 8,192, and the completion.
    """
    import gymnasium

    if not isinstance(config.env, str) or is_registered_env(config.env):
        prompt = config.env_config.get("max_prompt_tokens", UNKNOWN_PROMPT)
        return prompt + rollout.max_completion_tokens
    env: Any = gymnasium.make(config.env, disable_env_checker=True, **config.env_config)
    try:
        inner = env.unwrapped
        before = inner.critic_room if inner.critic_observation == "text" else 0
        return int(inner.max_context_tokens) + before
    finally:
        env.close()


def too_large(needs: Needs, config: Any, room: Room) -> str | None:
    """Says what to do where the processes of a run cannot fit into the memory that there is.

    Args:
        needs: Of each process.
        config: A validated `AlgorithmConfig`, which says how many there are, and where.
        room: What Ray places on GPUs is compared with ``gpu``, one learner each, the rest with
            ``machine``; other nodes are not known here.

    Returns:
        None where they fit.
    """
    learner, runner = sum(needs.learner.values()), sum(needs.runner.values())
    share = min(config.num_gpus_per_learner, 1)
    if share and room.gpu is not None and learner > share * room.gpu:
        of_it = f"{share:g} of a GPU" if share < 1 else "its GPU"
        return (
            f"Each learner needs about {size(learner)}, and {of_it} has {size(share * room.gpu)}. "
            + _learners_remedy(needs, share * room.gpu)
        )
    counts = {
        "learner": 0 if config.num_gpus_per_learner else max(config.num_learners, 1),
        "env runner": 0 if config.num_gpus_per_env_runner else max(config.num_env_runners, 1),
    }
    each = {"learner": learner, "env runner": runner}
    needed = sum(counts[name] * each[name] for name in counts)
    if needed <= room.machine:
        return None
    parts = [f"{n} {name}(s) x {size(each[name])}" for name, n in counts.items() if n]
    activations = needs.learner[ACTIVATIONS]
    if counts["learner"] and (
        learner - activations > room.machine or activations > needs.runner["KV cache"]
    ):
        remedy = _learners_remedy(needs, room.machine)
    else:
        remedy = "Lower [rollout] max_batch_size, or num_env_runners in [env_runners]."
    return (
        f"This run needs about {size(needed)} ({' + '.join(parts)}), and this machine has "
        f"{size(room.machine)}. {remedy}"
    )


def _learners_remedy(needs: Needs, memory: float) -> str:
    activations = needs.learner[ACTIVATIONS]
    fixed = sum(needs.learner.values()) - activations
    if fixed > memory:
        return (
            f"Weights, gradients and moments of one learner alone are {size(fixed)}: take a "
            "smaller model, lora ([rl_module.model_config.lora]), critic = 'shared', more learners "
            "with sharding = 'fsdp', or more room."
        )
    lower = "lower micro_batch_tokens"
    if needs.micro_batch_tokens <= needs.longest:
        lower = "no micro-batch is smaller than the longest sequence, so lower max_prompt_tokens "
        lower += "or [rollout] max_completion_tokens"
    return (
        f"Activations of a micro-batch of {needs.micro_batch_tokens:,} token places are "
        f"{size(activations)}: {lower}, or set activation_checkpointing = true, "
        "precision = 'bf16' or critic = 'shared'."
    )


def size(n_bytes: float) -> str:
    """Formats bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} TiB"
