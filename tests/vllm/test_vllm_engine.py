"""The engine on real vLLM; run in the environment that tests/vllm/make_env.sh makes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from rllib_distrl.engine import Request, RolloutEngine, SamplingParams, TorchEngine, content_hash
from rllib_distrl.engine.conversation import converse
from rllib_distrl.engine.weights import PROBE_TOLERANCE
from tests.engine.conversations import PARAMS, Script, check_logps
from tests.engine.engine_models import EOS, VOCAB, make_requests, reference_logps

pytestmark = pytest.mark.vllm
WINDOW = 96
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,  # head size 32
    "max_position_embeddings": WINDOW,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "initializer_range": 0.2,
}
CONFIGS = {
    "qwen2-tied": Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "llama-gqa": LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=False),
}
SAMPLED = SamplingParams(max_tokens=24, temperature=1.4)


def make_model(name, seed=0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module", params=CONFIGS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def engine(name):
    from rllib_distrl.engine.vllm_engine import VllmEngine

    return VllmEngine(CONFIGS[name], [EOS])


@pytest.fixture
def model(name, engine):
    model = make_model(name)
    engine.load_weights(model.state_dict(), 0)
    return model


def tokens_of(completions):
    return [completion.tokens.tolist() for completion in completions]


def test_logps_equal_a_full_forward_on_ragged_batches(engine, model):
    assert isinstance(engine, RolloutEngine)
    requests = make_requests()
    completions = engine.generate(requests, SAMPLED)
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    assert len(set(map(tuple, tokens_of(completions)))) > len(requests) // 2
    for request, completion in zip(requests, completions, strict=True):
        want = reference_logps(model, request, completion, SAMPLED.temperature)
        np.testing.assert_allclose(completion.logps, want, atol=5e-5)
        assert EOS not in completion.tokens[:-1]
        assert (completion.tokens[-1] == EOS) == (completion.finish_reason == "stop")


def test_logps_are_those_of_a_full_forward_over_all_turns(engine, model):
    requests = make_requests()
    script = Script(stops=lambda place, tokens: len(tokens) % 5 == 0)
    found = dict(converse(engine, requests, PARAMS, script))
    assert max(len(said) for said in script.said.values()) == 3
    completions = [found[place] for place in range(len(requests))]
    check_logps(model, requests, completions, script, atol=5e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_greedy_tokens_are_those_of_transformers_and_of_the_torch_engine(
    engine, model, temperature
):
    requests = make_requests(samples=1)
    params = SamplingParams(max_tokens=24, greedy=True, temperature=temperature)
    got = engine.generate(requests, params)
    torch_engine = TorchEngine(model.config, [EOS])
    torch_engine.load_weights(model.state_dict(), 0)
    for request, completion, other in zip(
        requests, got, torch_engine.generate(requests, params), strict=True
    ):
        ids = torch.tensor([request.prompt_ids])
        want = model.generate(ids, do_sample=False, max_new_tokens=24, pad_token_id=0)
        assert completion.tokens.tolist() == want[0, ids.shape[1] :].tolist()
        assert completion.tokens.tolist() == other.tokens.tolist()
        np.testing.assert_allclose(completion.logps, other.logps, atol=5e-5)


def test_a_completion_goes_on_where_a_segment_has_ended(engine, model):
    requests = make_requests(samples=1)
    params = SamplingParams(max_tokens=24, greedy=True)
    whole = engine.generate(requests, params)
    first = engine.generate([replace(request, limit=7) for request in requests], params)
    assert {len(part.tokens) for part in first if part.finish_reason == "length"} == {7}
    for request, want, part in zip(requests, whole, first, strict=True):
        if part.finish_reason == "length":
            ids = [*request.prompt_ids, *part.tokens.tolist()]
            part = part.joined(engine.generate([Request(ids, request.key, start=7)], params)[0])
        assert part.tokens.tolist() == want.tokens.tolist()
        assert part.finish_reason == want.finish_reason
        np.testing.assert_allclose(part.logps, want.logps, atol=5e-5)


def kept_probs(logits, temperature, top_p, top_k):
    """{token: probability} after temperature, top-k and top-p, by its definition."""
    best = torch.softmax(logits.double() / temperature, -1).sort(descending=True)
    top = best.values[: top_k or None] / best.values[: top_k or None].sum()
    kept = top[top.cumsum(0) - top < top_p]
    tokens = best.indices[: len(kept)].tolist()
    return dict(zip(tokens, (kept / kept.sum()).tolist(), strict=True))


@pytest.mark.parametrize(("top_p", "top_k"), [(0.8, 5), (1.0, 3), (0.7, 0)])
def test_logps_are_of_the_distribution_sampled_from(engine, model, top_p, top_k):
    params = SamplingParams(12, temperature=0.7, top_p=top_p, top_k=top_k)
    requests = make_requests(prompts=4, samples=3)
    for request, completion in zip(requests, engine.generate(requests, params), strict=True):
        ids = torch.tensor([[*request.prompt_ids, *completion.tokens.tolist()]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(request.prompt_ids) - 1 : -1]
        for t, token in enumerate(completion.tokens.tolist()):
            kept = kept_probs(logits[t], 0.7, top_p, top_k)
            assert completion.logps[t] == pytest.approx(np.log(kept[token]), abs=5e-5)


def test_frequencies_follow_the_reported_logps(engine, model):
    prompt, params = [5, 9, 17], SamplingParams(1, temperature=2.0, top_k=6)
    with torch.no_grad():
        kept = kept_probs(model(torch.tensor([prompt])).logits[0, -1], 2.0, 1.0, 6)
    requests = [Request(prompt, (0, 0, sample, 0)) for sample in range(600)]
    completions = engine.generate(requests, params)
    drawn = [int(completion.tokens[0]) for completion in completions]
    counts = [drawn.count(token) for token in kept]
    assert sum(counts) == 600
    assert stats.chisquare(counts, 600 * np.array(list(kept.values()))).pvalue > 1e-3
    for token, completion in zip(drawn, completions, strict=True):
        assert completion.logps[0] == pytest.approx(np.log(kept[token]), abs=5e-5)


def test_neither_order_nor_company_change_what_is_sampled(engine, model):
    requests = make_requests(prompts=5, samples=4)
    whole = tokens_of(engine.generate(requests, SAMPLED))
    order = np.random.default_rng(0).permutation(len(requests))
    assert tokens_of(engine.generate([requests[i] for i in order], SAMPLED)) == [
        whole[i] for i in order
    ]
    assert tokens_of(engine.generate(requests[7:8], SAMPLED)) == whole[7:8]


def test_new_weights_replace_the_old_ones_in_place(name, engine, model):
    requests = make_requests(prompts=3, samples=2, longest=60)
    views = {key: view.data_ptr() for key, view in engine.views.items()}
    before = engine.generate(requests, SAMPLED)
    second = make_model(name, seed=1)
    returned = engine.load_weights(second.state_dict(), 1)
    assert returned == content_hash(second.state_dict()) == engine.weights_hash()
    # A stale prefix cache would give the old model's logps.
    for request, completion in zip(requests, engine.generate(requests, SAMPLED), strict=True):
        want = reference_logps(second, request, completion, SAMPLED.temperature)
        np.testing.assert_allclose(completion.logps, want, atol=5e-5)
    engine.load_weights(model.state_dict(), 2)
    assert tokens_of(engine.generate(requests, SAMPLED)) == tokens_of(before)
    assert {key: view.data_ptr() for key, view in engine.views.items()} == views


def test_every_tensor_is_part_of_the_hash_and_of_what_is_computed(engine, model):
    requests = make_requests(prompts=2, samples=1)
    params = SamplingParams(max_tokens=4, greedy=True)
    hashes = {engine.weights_hash()}
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    before = [c.logps.tolist() for c in engine.generate(requests, params)]
    for key in engine.shapes:
        kept = state[key].clone()
        state[key].view(-1)[:] += 0.25 * torch.randn(kept.numel())
        if "lm_head.weight" in state and "lm_head.weight" not in engine.shapes:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        hashes.add(engine.load_weights(state, 1))
        assert engine.weights_hash() == content_hash(state)
        if "k_proj.bias" not in key:  # softmax does not see a shift of all scores
            assert [c.logps.tolist() for c in engine.generate(requests, params)] != before, key
        state[key].copy_(kept)
    assert len(hashes) == 1 + len(engine.shapes)


def test_bfloat16_updates_arrive_and_agree_with_a_float32_learner():
    from rllib_distrl.engine.vllm_engine import VllmEngine

    name, requests = "llama-gqa", make_requests(prompts=6, samples=3)
    engine = VllmEngine(CONFIGS[name], [EOS], dtype=torch.bfloat16)
    assert {view.dtype for view in engine.views.values()} == {torch.bfloat16}
    pointers = {key: view.data_ptr() for key, view in engine.views.items()}
    learners = [make_model(name, seed) for seed in (0, 1)]
    for version, learner in enumerate(learners):
        expected = content_hash(learner.state_dict(), dtype=torch.bfloat16)
        assert engine.load_weights(learner.state_dict(), version) == expected
        completions = engine.generate(requests, SAMPLED)
        errors = [
            np.concatenate(
                [
                    np.abs(completion.logps - reference_logps(other, request, completion, 1.4))
                    for request, completion in zip(requests, completions, strict=True)
                ]
            ).mean()
            for other in (learner, learners[1 - version])
        ]
        # Rounding of weights and activations on one side alone, and another model's logps.
        assert 1e-3 < errors[0] < PROBE_TOLERANCE["bfloat16"] / 2
        assert errors[1] > 5 * PROBE_TOLERANCE["bfloat16"]
    assert {key: view.data_ptr() for key, view in engine.views.items()} == pointers
    with torch.no_grad():  # vLLM's own tensor, under its own name
        dict(engine.model.named_parameters())["model.layers.1.mlp.down_proj.weight"][-1, -1] += 1
    assert engine.weights_hash() != expected


def test_bad_input_is_refused(engine, model):
    with pytest.raises(ValueError, match="window of 96 tokens"):
        engine.generate([Request([5] * 90, (0, 0, 0, 0))], SamplingParams(7))
    with pytest.raises(ValueError, match=f"token {VOCAB}"):
        engine.generate([Request([VOCAB], (0, 0, 0, 0))], SAMPLED)
    with pytest.raises(ValueError, match="entropies"):
        engine.generate(make_requests(), SamplingParams(4, entropy=True))
    state = dict(model.state_dict())
    state.pop("model.norm.weight")
    with pytest.raises(ValueError, match=r"missing: model\.norm\.weight"):
        engine.load_weights(state, 1)
    assert engine.generate([], SAMPLED) == []
    assert engine.version == 0


def test_the_process_keeps_its_threads_and_randomness(engine):
    torch.set_num_threads(1)
    assert torch.get_num_threads() == 1
    assert torch.set_num_threads.__module__ != "vllm.v1.worker.cpu_worker"


def test_sleep_needs_a_gpu():
    from rllib_distrl.engine.vllm_engine import VllmEngine

    with pytest.raises(ValueError, match="sleep gives a GPU's memory back"):
        VllmEngine(CONFIGS["qwen2-tied"], [EOS], sleep=True)
