"""The arithmetic of `distrl explain`, against counts made by hand and by torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from distrl_envs.tokenizers import VOCABULARY
from rllib_distrl.algorithm import estimates
from rllib_distrl.algorithm.estimates import (
    ACTIVATIONS,
    ModelShape,
    Needs,
    Room,
    count_updates,
    learner_memory,
    machine_memory,
    model_shape,
    runner_memory,
    shape_of,
    size,
    too_large,
)
from rllib_distrl.algorithm.registry import algorithm_config
from rllib_distrl.model.builtin import SPECS
from rllib_distrl.model.loading import load_config, load_model
from rllib_distrl.settings import RolloutSettings
from tests.helpers import TINY, distrl_config, with_model_config

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
    assert 2 * shared[ACTIVATIONS] == parts[ACTIVATIONS]


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


def test_learners_hold_shares_and_what_is_gathered_for_the_moment() -> None:
    model = AutoModelForCausalLM.from_config(QWEN)
    shape = model_shape(QWEN)
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    assert shape.block_parameters == pytest.approx(block, abs=shape.hidden)
    settings = {"critic": "shared", "critic_outputs": 16, "micro_batch_tokens": 100}
    one = learner_memory(shape, reference=True, **settings)
    two = learner_memory(shape, reference=True, learners=2, **settings)
    head = 65 * 16
    assert two == {**one, "gradients that are sent": one["gradients"]}
    shares = learner_memory(shape, reference=True, learners=4, sharded=True, **settings)
    halved = ("policy weights", "critic weights", "gradients", "Adam moments", "reference weights")
    assert [shares[name] for name in halved] == [one[name] / 4 for name in halved]
    # While a block runs, with the next one and an embedding that is the head too.
    outside = shape.vocabulary * shape.hidden + head
    assert shares["gathered weights"] == 4 * (outside + 2 * shape.block_parameters)
    assert shares["gradients that are sent"] == 4 * (outside + 2 * shape.block_parameters)
    low = learner_memory(shape, precision="bf16", learners=4, sharded=True, **settings)
    assert low["gathered weights"] == 4 * (outside + shape.block_parameters)
    assert "bfloat16 weights" not in low
    adapted = {"adapter_parameters": 300, "learners": 4, "sharded": True}
    lora = learner_memory(shape, **{**settings, "critic": "separate"}, **adapted)
    assert lora["gradients that are sent"] == 4 * (head + 200)
    assert lora["critic weights"] == 300 + head + 3 * shape.block_parameters


@pytest.mark.parametrize(
    ("tied", "settings", "gathered", "gradients"),
    [
        # While the head runs: it, the value head and the last block. Its gradient as it is made
        # and as it is sent; the embedding's of a trunk of its own is there already.
        (False, {"critic": "shared"}, 11 + 1000 + 50, 11 + 2000),
        (False, {"critic": "separate"}, 11 + 1000 + 50, 11 + 1000 + 2000),
        # At the end: the embedding, which is the head, and gradients of as many as there are
        # trunks, of which one is sent.
        (True, {"critic": "shared"}, 11 + 1000, 11 + 2000),
        (True, {"critic": "separate"}, 11 + 1000, 11 + 3000),
        # No gradients: one unit, and the memory it has come in; tied ones stay for the pass.
        (False, {"critic": "shared", "adapter_parameters": 6}, 11 + 2000, 0),
        (True, {"critic": "separate", "adapter_parameters": 6}, 11 + 1000 + 100, 11 + 6),
    ],
)
def test_an_embedding_and_a_head_of_their_own_are_gathered_one_at_a_time(
    tied: bool, settings: dict, gathered: int, gradients: int
) -> None:
    shape = ModelShape(
        parameters=1100 if tied else 2100, trunk_parameters=1100, layers=2, hidden=10,
        intermediate=20, kv_width=10, vocabulary=100,
    )  # fmt: skip
    found = learner_memory(
        shape, critic_outputs=1, micro_batch_tokens=1, learners=2, sharded=True, **settings
    )
    assert found["gathered weights"] == 4 * gathered
    assert found["gradients that are sent"] == 4 * gradients


def test_adapters_of_a_critic_have_a_frozen_trunk_of_their_own() -> None:
    untied = ModelShape(
        parameters=2100, trunk_parameters=1100, layers=2, hidden=10,
        intermediate=20, kv_width=10, vocabulary=100,
    )  # fmt: skip
    settings = {"critic": "separate", "critic_outputs": 1, "micro_batch_tokens": 1}
    lora = {"adapter_parameters": 6, "learners": 2, "sharded": True}
    assert learner_memory(untied, **settings, **lora)["critic weights"] == 2 * (11 + 6 + 1100)


def test_logits_are_those_of_a_chunk_at_most() -> None:
    shape = replace(model_shape(QWEN), vocabulary=151_936)
    settings = {"critic": "none", "critic_outputs": 0, "micro_batch_tokens": 4_096}
    name = "logits of a chunk"
    assert learner_memory(shape, **settings)[name] == 2 * 256 * 2**20
    small = replace(shape, vocabulary=1_000)
    assert learner_memory(small, **settings)[name] == 2 * 4 * 4_096 * 1_000


def test_checkpointing_keeps_a_block_and_the_inputs_of_all() -> None:
    shape = model_shape(QWEN)
    settings = {"critic": "none", "critic_outputs": 0, "micro_batch_tokens": 1000}
    name = ACTIVATIONS
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
    assert 0.5 < parts[ACTIVATIONS] / measured < 2.0


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
    config = algorithm_config("DistRL")
    found = too_large(needs_of(shape, **settings), config, Room(gib * 2**30))
    if remedy is None:
        assert found is None
    else:
        assert found is not None and remedy in found
        assert f"this machine has {gib}.0 GiB" in found


def needs_of(shape, *, longest=1_024, **settings) -> Needs:
    learner = learner_memory(shape, critic_outputs=16, **settings)
    runner = runner_memory(shape, rows=64, tokens=2_048)
    return Needs(learner, runner, settings["micro_batch_tokens"], longest)


@pytest.mark.parametrize(
    ("gpus", "gib", "longest", "words"),
    [
        (1, 80, 1_024, "Weights, gradients and moments of one learner alone are 114"),
        (1, 141, 1_024, "GPU has 141.0 GiB. Activations of a micro-batch of 16,384 token places"),
        (1, 141, 1_024, ": lower micro_batch_tokens, or set activation_checkpointing"),
        (1, 141, 16_384, "so lower max_prompt_tokens or [rollout] max_completion_tokens, or set"),
        (0.5, 200, 1_024, "0.5 of a GPU has 100.0 GiB"),
        (1, 400, 1_024, None),
    ],
)  # fmt: skip
def test_a_learner_on_a_gpu_is_compared_with_that_gpu(gpus, gib, longest, words) -> None:
    needs = needs_of(
        model_shape(QWEN_7B), critic="none", micro_batch_tokens=16_384, longest=longest
    )
    config = algorithm_config("DistRL").learners(num_learners=1, num_gpus_per_learner=gpus)
    found = too_large(needs, config, Room(200 * 2**30, gib * 2**30))
    assert found is None if words is None else words in found
    assert too_large(needs, config, Room(200 * 2**30)) is None  # A GPU of unknown size.


def test_a_model_saved_in_bfloat16_learns_in_float32(tmp_path) -> None:
    config = Qwen2Config(**{**QWEN.to_dict(), "dtype": "bfloat16"})
    model = AutoModelForCausalLM.from_config(config)
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    shape = shape_of(str(tmp_path))
    assert shape == model_shape(QWEN)
    learns = sum(p.nbytes for p in load_model(str(tmp_path)).parameters())
    parts = learner_memory(
        shape, critic="none", critic_outputs=0, micro_batch_tokens=9, reference=True
    )
    assert parts["policy weights"] == parts["reference weights"] == learns
    low = runner_memory(shape, rows=256, tokens=34, dtype="bfloat16")
    assert (low["policy weights"], low["engine's weights"]) == (learns, learns // 2)
    assert low["KV cache"] == 2 * 3 * 256 * 34 * 32 * 2


@pytest.mark.parametrize(
    ("runners", "settings", "held"),
    [(0, {}, 0), (2, {}, 1), (0, {"lora": {"r": 2}}, 1), (0, {"max_staleness": 1}, 1)],
)
def test_in_one_process_the_policy_is_held_once(runners, settings, held) -> None:
    config = distrl_config(micro_batch_tokens=100).env_runners(num_env_runners=runners)
    if "lora" in settings:
        config = with_model_config(config, **settings)
    else:
        config.rollout(**settings)
    shape = shape_of(TINY)
    parts = Needs.of(config, config.rollout_settings, shape, longest=31).runner
    weights = 4 * shape.parameters
    assert parts.get("policy weights", 0) == held * weights
    assert parts["engine's weights"] == weights


def test_rows_of_all_segments_are_under_way_at_once() -> None:
    def needs(**rollout) -> Needs:
        config = distrl_config(micro_batch_tokens=10_000).rollout(**rollout)
        config.validate()
        return Needs.of(config, config.rollout_settings, model_shape(QWEN), longest=31)

    # 24 tokens in segments of 10: the first, second and third of three iterations' prompts.
    one, three = needs(), needs(segment_tokens=10)
    assert three.runner["KV cache"] == 3 * one.runner["KV cache"]
    assert (one.micro_batch_tokens, three.micro_batch_tokens) == (8 * 31, 3 * 8 * 31)


def test_the_micro_batch_is_the_largest_that_leaves_a_tenth_of_the_memory(monkeypatch) -> None:
    def chosen(mib: float, **training) -> int:
        monkeypatch.setattr(estimates, "machine_memory", lambda: int(mib * 2**20))
        config = distrl_config(**training)
        config.validate()
        assert config.model_config["micro_batch_tokens"] == config.micro_batch_tokens
        return config.micro_batch_tokens

    config = distrl_config(micro_batch_tokens=100)
    config.validate()
    longest = estimates.longest_sequence(config, config.rollout_settings)
    assert longest == 7 + 24
    config.environment("distrl_envs:distrl/Mastermind-v0")
    config.validate()
    # Replies of four tokens come after four of the five guesses.
    assert estimates.longest_sequence(config, config.rollout_settings) == 7 + 24 + 4 * 4
    config.environment(env_config={"max_reply_tokens": 7, "max_turns": 2})
    config.validate()
    assert estimates.longest_sequence(config, config.rollout_settings) == 7 + 24 + 7
    config = distrl_config(micro_batch_tokens=100)
    config.validate()
    assert chosen(1_000) == 16_384
    assert chosen(1_000, micro_batch_tokens=77) == chosen(1, micro_batch_tokens=77) == 77
    assert chosen(1) == longest  # Nothing less can be; `distrl train` refuses to start.
    # Of one token: 8 streams, 2 keys and values and 4 x inner of each of the blocks, twice.
    spec = SPECS[TINY.removeprefix("builtin:")]
    width, inner = spec.hidden_size, spec.intermediate_size
    token = 2 * spec.num_layers * (10 * width + 4 * inner) * 4 + 2 * 4 * len(VOCABULARY)
    shape = shape_of(TINY)
    needs = Needs.of(config, config.rollout_settings, shape, longest, budget=100)
    rest = sum(needs.learner.values()) + sum(needs.runner.values()) - 100 * token
    assert chosen((rest + 200 * token + 9) / 0.9 / 2**20) == 200
    assert chosen((rest + 200 * token - 9) / 0.9 / 2**20) == 199
    of_learner = rest - sum(needs.runner.values()) + 200 * token
    monkeypatch.setattr(estimates, "gpu_memory", lambda: int(of_learner / 0.8) + 9)
    config.learners(num_gpus_per_learner=1)
    monkeypatch.setattr(estimates, "machine_memory", lambda: 2**30)
    assert estimates.largest_micro_batch(config) == 200
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert chosen(1) == 16_384  # Of other machines nothing is known.


def test_the_machines_memory_is_positive_and_no_more_than_there_is() -> None:
    import psutil

    assert 2**28 < machine_memory() <= psutil.virtual_memory().total
