"""The arithmetic of `distrl explain`, against counts made by hand and by torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from rllib_distrl.algorithm.registry import algorithm_config
from rllib_distrl.cli.estimates import (
    count_updates,
    learner_memory,
    machine_memory,
    model_shape,
    runner_memory,
    shape_of,
    size,
    too_large,
)
from rllib_distrl.model.builtin import SPECS
from rllib_distrl.model.loading import load_config
from rllib_distrl.settings import RolloutSettings

QWEN = Qwen2Config(
    vocab_size=112,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    tie_word_embeddings=True,
)


def test_ours_counts_sequences() -> None:
    rollout = RolloutSettings(prompts_per_iteration=32, num_generations=8, max_completion_tokens=24)
    config = algorithm_config("DistRL").training(minibatch_size=128, num_epochs=2)
    updates = count_updates(config, rollout)
    assert updates.counts_sequences
    assert updates.episodes == 256
    assert updates.timesteps == 256 * 24
    assert (updates.minibatch_sequences, updates.minibatch_timesteps) == (128, 3072)
    assert updates.steps == 4
    assert count_updates(config.learners(num_learners=2), rollout).steps == 2


def test_stock_counts_timesteps() -> None:
    rollout = RolloutSettings(max_completion_tokens=20)
    config = algorithm_config("PPO").training(
        train_batch_size_per_learner=1000, minibatch_size=300, num_epochs=3
    )
    updates = count_updates(config, rollout)
    assert not updates.counts_sequences
    assert updates.timesteps == 1000
    assert updates.episodes == 50
    assert updates.minibatch_sequences == 15
    assert updates.steps == 3 * 4


def test_shape_is_the_models_own_without_allocating_it() -> None:
    shape = model_shape(QWEN)
    model = AutoModelForCausalLM.from_config(QWEN)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.trunk_parameters == sum(p.numel() for p in model.base_model.parameters())
    assert (shape.layers, shape.kv_width, shape.vocabulary) == (3, 32, 112)
    huge = Qwen2Config(hidden_size=8192, intermediate_size=32768, num_hidden_layers=80)
    assert model_shape(huge).parameters > 10**10


@pytest.mark.parametrize("name", SPECS)
def test_the_shape_of_a_builtin_model_is_counted_without_its_class(name: str) -> None:
    assert shape_of(f"builtin:{name}") == model_shape(load_config(f"builtin:{name}"))


def test_weights_gradients_and_moments() -> None:
    shape = model_shape(QWEN)
    parts = learner_memory(shape, critic="separate", critic_outputs=16, micro_batch_tokens=1000)
    critic = shape.trunk_parameters + 65 * 16
    assert parts["policy weights"] == 4 * shape.parameters
    assert parts["critic weights"] == 4 * critic
    assert parts["gradients"] == 4 * (shape.parameters + critic)
    assert parts["Adam moments"] == 8 * (shape.parameters + critic)
    shared = learner_memory(shape, critic="shared", critic_outputs=16, micro_batch_tokens=1000)
    assert shared["critic weights"] == 4 * 65 * 16
    assert 2 * shared["activations of a micro-batch"] == parts["activations of a micro-batch"]


def test_adapters_leave_moments_for_themselves_alone() -> None:
    shape = model_shape(QWEN)
    settings = {"critic_outputs": 16, "micro_batch_tokens": 1000, "reference": True}
    full = learner_memory(shape, critic="separate", **settings)
    parts = learner_memory(shape, critic="separate", adapter_parameters=500, **settings)
    assert full["reference weights"] == 4 * shape.parameters
    assert "reference weights" not in parts
    assert parts["policy weights"] == 4 * (shape.parameters + 500)
    assert parts["critic weights"] == 4 * (500 + 65 * 16)
    assert parts["Adam moments"] == 8 * (1000 + 65 * 16)


def test_a_chunk_of_logits_is_larger_on_a_gpu() -> None:
    shape = replace(model_shape(QWEN), vocabulary=151_936)
    settings = {"critic": "none", "critic_outputs": 0, "micro_batch_tokens": 4_096}
    name = "logits of a chunk"
    assert learner_memory(shape, **settings)[name] == 2 * 64 * 2**20
    assert learner_memory(shape, on_gpu=True, **settings)[name] == 2 * 256 * 2**20


def test_checkpointing_keeps_a_block_and_the_inputs_of_all() -> None:
    shape = model_shape(QWEN)
    settings = {"critic": "none", "critic_outputs": 0, "micro_batch_tokens": 1000}
    name = "activations of a micro-batch"
    plain = learner_memory(shape, **settings)[name]
    again = learner_memory(shape, activation_checkpointing=True, **settings)[name]
    assert again == plain // 3 + 3 * 1000 * 64 * 4
    low = learner_memory(shape, precision="bf16", **settings)
    assert plain / 2 < low[name] < plain
    assert low["bfloat16 weights"] == 2 * shape.trunk_parameters


def test_activations_are_near_what_torch_keeps() -> None:
    """Counts the bytes of the tensors that autograd saves in one forward pass."""
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    model = AutoModelForCausalLM.from_config(QWEN).base_model
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = model(input_ids=torch.zeros(10, 40, dtype=torch.long), use_cache=False)
    measured = sum(n for pointer, n in saved.items() if pointer not in weights)
    assert out.last_hidden_state.requires_grad
    parts = learner_memory(
        model_shape(QWEN), critic="none", critic_outputs=0, micro_batch_tokens=400
    )
    assert 0.5 < parts["activations of a micro-batch"] / measured < 2.0


def test_kv_cache() -> None:
    parts = runner_memory(model_shape(QWEN), rows=256, tokens=34)
    assert parts["KV cache"] == 2 * 3 * 256 * 34 * 32 * 4


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(100, "100 B"), (1536, "1.5 KiB"), (3 * 2**30, "3.0 GiB"), (2**41, "2.0 TiB")],
)
def test_size(n_bytes: int, text: str) -> None:
    assert size(n_bytes) == text


QWEN_7B = Qwen2Config(
    vocab_size=152_064, hidden_size=3_584, intermediate_size=18_944, num_hidden_layers=28,
    num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False,
)  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "gib", "remedy"),
    [
        # 7.6 billion parameters, and a critic of 7.1 without head: 16 bytes of each are 219 GiB.
        ({"critic": "separate", "micro_batch_tokens": 1_024}, 200, "smaller model, lora"),
        ({"critic": "none", "micro_batch_tokens": 1_024}, 100, "smaller model, lora"),
        ({"critic": "none", "micro_batch_tokens": 65_536}, 250, "lower micro_batch_tokens"),
        ({"critic": "none", "micro_batch_tokens": 1_024}, 181, "max_batch_size, or num_env"),
        ({"critic": "none", "micro_batch_tokens": 1_024}, 400, None),
    ],
)
def test_a_model_of_seven_billion_is_refused_where_it_cannot_fit(settings, gib, remedy) -> None:
    shape = model_shape(QWEN_7B)
    assert shape.parameters == 7_615_616_512
    learner = learner_memory(shape, critic_outputs=16, **settings)
    runner = runner_memory(shape, rows=64, tokens=2_048)
    config = algorithm_config("DistRL")
    found = too_large(learner, runner, config, gib * 2**30)
    if remedy is None:
        assert found is None
    else:
        assert found is not None and remedy in found
        assert f"this machine has {gib}.0 GiB" in found


def test_the_machines_memory_is_positive_and_no_more_than_there_is() -> None:
    import psutil

    assert 2**28 < machine_memory() <= psutil.virtual_memory().total
