import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rllib_distrl.engine import SamplingParams, TorchEngine, content_hash, torch_engine
from rllib_distrl.engine.weights import copy_weights
from tests.engine.engine_models import CONFIGS, EOS, make_engine, make_model, make_requests

PARAMS = SamplingParams(max_tokens=8)


@pytest.mark.parametrize("decoder", ["auto", "generic"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_engines_hash_is_that_of_the_state_dict(name, decoder):
    model = make_model(name)
    engine = TorchEngine(model.config, [EOS], decoder=decoder)
    assert engine.version == -1
    returned = engine.load_weights(model.state_dict(), 4)
    assert returned == content_hash(model.state_dict()) == engine.weights_hash()
    assert engine.version == 4


def test_a_tied_head_counts_once_however_it_is_listed():
    state = make_model("qwen2-tied").state_dict()
    without = {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}
    copied = {name: tensor.clone() for name, tensor in state.items()}
    assert content_hash(without) == content_hash(state) == content_hash(copied)
    engine = make_engine(make_model("qwen2-tied", seed=1))
    assert engine.load_weights(without, 1) == engine.load_weights(copied, 2)
    copied["lm_head.weight"][0, 0] += 1.0
    with pytest.raises(ValueError, match=r"unexpected: lm_head\.weight"):
        engine.load_weights(copied, 3)


@pytest.mark.parametrize("name", ["qwen3-gqa", "gpt2"])
def test_every_tensor_is_part_of_the_hash(name):
    model = make_model(name)
    engine = make_engine(model)
    seen = {engine.weights_hash()}
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    changed = [key for key in state if not (name == "gpt2" and key == "lm_head.weight")]
    for key in changed:
        state[key].view(-1)[-1] += 0.5
        if name == "gpt2" and key == "transformer.wte.weight":
            state["lm_head.weight"] = state[key]
        seen.add(engine.load_weights(state, 1))
        assert engine.weights_hash() == content_hash(state)
    assert len(seen) == 1 + len(changed)


def test_every_word_and_its_place_count_in_long_tensors():
    tensor = torch.randn(3 * 2**16 + 5, generator=torch.Generator().manual_seed(0))
    before = content_hash({"a": tensor})
    for place in (0, 2**15, 2**16 - 1, 2**16, 3 * 2**16, -1):
        changed = tensor.clone()
        changed[place] += 1.0
        assert content_hash({"a": changed}) != before
    swapped = tensor.clone()
    swapped[[1, 2**16 + 9]] = tensor[[2**16 + 9, 1]]
    assert content_hash({"a": swapped}) != before
    assert content_hash({"a": tensor[:-1]}) != content_hash({"a": tensor[:-2]})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
def test_the_hash_is_that_of_the_content_wherever_it_lies(dtype):
    tensor = torch.randn(40, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    want = content_hash({"a": tensor})
    for offset in range(1, 9):
        stored = torch.zeros(tensor.numel() + offset, dtype=dtype)[offset:].view(40, 7)
        assert content_hash({"a": stored.copy_(tensor)}) == want
    assert content_hash({"a": tensor.T.contiguous().T}) == want


def test_zeros_of_different_lengths_and_types_differ():
    hashes = {content_hash({"a": torch.zeros(n, dtype=t)}) for n in (1, 2, 3) for t in
              (torch.float32, torch.bfloat16)}  # fmt: skip
    assert len(hashes) == 6


def test_names_are_part_of_the_hash():
    tensor = torch.arange(6.0)
    assert content_hash({"a": tensor}) != content_hash({"b": tensor})


def test_the_hash_reads_the_engines_own_tensors():
    engine = make_engine(make_model("qwen2-tied"))
    before = engine.weights_hash()
    with torch.no_grad():
        engine.decoder.weights.layers[1].qkv[-1, -1] += 0.25
    assert engine.weights_hash() != before


def test_new_weights_change_what_is_sampled_and_old_ones_restore_it():
    first, second, requests = make_model("qwen2-gqa"), make_model("qwen2-gqa", 1), make_requests()
    engine = make_engine(first)
    qkv = engine.decoder.weights.layers[0].qkv.data_ptr()
    before = engine.generate(requests, PARAMS)
    engine.load_weights(second.state_dict(), 1)
    between = engine.generate(requests, PARAMS)
    engine.load_weights(first.state_dict(), 2)
    after = engine.generate(requests, PARAMS)
    assert engine.decoder.weights.layers[0].qkv.data_ptr() == qkv
    assert any(a.tokens.tolist() != b.tokens.tolist() for a, b in zip(before, between, strict=True))
    for a, b in zip(before, after, strict=True):
        assert np.array_equal(a.tokens, b.tokens) and np.array_equal(a.logps, b.logps)


def test_the_engine_does_not_share_the_learners_tensors():
    model = make_model("qwen2-tied")
    engine = make_engine(model)
    before = engine.weights_hash()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert engine.weights_hash() == before


def test_the_hash_of_another_type_is_that_of_the_cast_weights():
    model = make_model("llama-mha")
    engine = TorchEngine(model.config, [EOS], dtype=torch.bfloat16)
    returned = engine.load_weights(model.state_dict(), 0)
    assert returned == content_hash(model.state_dict(), dtype=torch.bfloat16)
    assert returned != content_hash(model.state_dict())


def test_the_receipt_is_read_back_from_the_engine(monkeypatch):
    model, other = make_model("qwen2-gqa"), make_model("qwen2-gqa", 1)
    engine, lost = make_engine(model), "model.layers.1.mlp.down_proj.weight"
    monkeypatch.setattr(
        torch_engine,
        "copy_weights",
        lambda state, views: copy_weights(
            state, {name: view for name, view in views.items() if name != lost}
        ),
    )
    mixed = {**other.state_dict(), lost: model.state_dict()[lost]}
    assert engine.load_weights(other.state_dict(), 1) == content_hash(mixed)


@pytest.mark.parametrize("decoder", ["compiled", "generic"])
def test_wrong_weights_are_refused_and_nothing_is_loaded(decoder):
    model = make_model("qwen2-gqa")
    engine = make_engine(model, decoder=decoder)
    before, state = engine.weights_hash(), make_model("qwen2-gqa", 1).state_dict()
    name = "model.layers.1.mlp.down_proj.weight"
    missing = {key: tensor for key, tensor in state.items() if key != name}
    with pytest.raises(ValueError, match=f"missing: {name}"):
        engine.load_weights(missing, 1)
    with pytest.raises(ValueError, match="unexpected: critic"):
        engine.load_weights({**state, "critic": torch.zeros(1)}, 1)
    with pytest.raises(ValueError, match=r"\(48, 64\) instead of \(64, 48\)"):
        engine.load_weights({**state, name: state[name].T}, 1)
    with pytest.raises(ValueError, match="version=-1"):
        engine.load_weights(state, -1)
    assert engine.weights_hash() == before and engine.version == 0


def test_no_rollout_without_weights():
    engine = TorchEngine(CONFIGS["qwen2-tied"](), [EOS])
    with pytest.raises(RuntimeError, match="load_weights"):
        engine.generate(make_requests(), PARAMS)


LARGE = 2**18 + 40


@pytest.mark.parametrize("wrong", [LARGE, LARGE // 100])
def test_a_sample_sees_stale_parts_of_large_tensors(wrong):
    tensor = torch.randn(LARGE, generator=torch.Generator().manual_seed(0))
    stale = tensor.clone()
    stale[1_000 : 1_000 + wrong] += 1e-3
    seen = [
        content_hash({"a": stale}, sample=n) != content_hash({"a": tensor}, sample=n)
        for n in range(40)
    ]
    assert sum(seen) == 40


def test_versions_sample_other_places_until_a_single_wrong_number_is_found():
    tensor = torch.zeros(LARGE)
    stale = tensor.clone()
    stale[77] = 1.0
    samples = range(4 * LARGE // 1024)
    seen = [n for n in samples if content_hash({"a": stale}, sample=n) != content_hash(
        {"a": tensor}, sample=n)]  # fmt: skip
    assert 0 < len(seen) < 20
    assert content_hash({"a": tensor}, sample=1) != content_hash({"a": tensor[:-1]}, sample=1)


def test_a_sample_reads_all_of_small_tensors_and_the_same_places_however_they_are_stored():
    small = torch.arange(2.0**18)
    assert content_hash({"a": small}, sample=3) == content_hash({"a": small})
    large = torch.randn(520, 512, generator=torch.Generator().manual_seed(0))
    want = content_hash({"a": large}, sample=3)
    assert content_hash({"a": large.T.contiguous().T}, sample=3) == want
    assert content_hash({"a": large.view(130, 4, 512)}, sample=3) == want
    assert content_hash({"a": large}, sample=4) != want
    low = {"a": large.bfloat16()}
    assert content_hash({"a": large}, dtype=torch.bfloat16, sample=3) == content_hash(low, sample=3)
    tied = {"a": large, "lm_head.weight": large.clone()}
    assert content_hash(tied, sample=3) == want


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_engine_of_a_large_model_proves_its_weights_by_the_versions_sample(dtype):
    config = CONFIGS["qwen2-tied"]()
    config.vocab_size = 2**18 // config.hidden_size + 1
    state = AutoModelForCausalLM.from_config(config).state_dict()
    engine = TorchEngine(config, [EOS], dtype=dtype)
    receipts = {engine.load_weights(state, version) for version in range(3)}
    assert receipts == {content_hash(state, dtype=dtype, sample=n) for n in range(3)}
    assert len(receipts) == 3
    with torch.no_grad():
        engine.decoder.weights.embed[-config.vocab_size // 8 :] = 0.0
    assert engine.weights_hash() not in receipts
