import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from rllib_distrl.engine import Request, RolloutEngine, SamplingParams, TorchEngine
from rllib_distrl.engine.sampling import draw
from tests.engine.engine_models import (
    CONFIGS,
    EOS,
    FAST,
    VOCAB,
    make_engine,
    make_model,
    make_requests,
)
from tests.engine.engine_models import reference_logps as reference

SAMPLED = SamplingParams(max_tokens=40, temperature=1.4)


def tokens_of(completions):
    return [completion.tokens.tolist() for completion in completions]


@pytest.mark.parametrize("name", CONFIGS)
def test_logps_equal_a_full_forward_on_ragged_batches(name):
    model, requests = make_model(name), make_requests()
    engine = make_engine(model)
    kind = "CompiledDecoder" if name in FAST else "GenericDecoder"
    assert type(engine.decoder).__name__ == kind
    assert isinstance(engine, RolloutEngine)
    completions = engine.generate(requests, SAMPLED)
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    for request, completion in zip(requests, completions, strict=True):
        want = reference(model, request, completion, SAMPLED.temperature)
        np.testing.assert_allclose(completion.logps, want, atol=1e-5)


@pytest.mark.parametrize("decoder", ["compiled", "fast"])
@pytest.mark.parametrize("name", FAST)
def test_fast_and_generic_agree(name, decoder):
    model, requests = make_model(name), make_requests()
    fast = make_engine(model, decoder=decoder).generate(requests, SAMPLED)
    generic = make_engine(model, decoder="generic").generate(requests, SAMPLED)
    assert tokens_of(fast) == tokens_of(generic)
    for a, b in zip(fast, generic, strict=True):
        np.testing.assert_allclose(a.logps, b.logps, atol=1e-5)


@pytest.mark.parametrize("decoder", ["compiled", "fast", "generic"])
def test_a_completion_in_segments_is_the_whole_token_for_token(decoder):
    """Random numbers and limits go on where the segment before has ended."""
    model, requests = make_model("qwen2-gqa"), make_requests()
    engine = make_engine(model, decoder=decoder)
    whole = engine.generate(requests, SAMPLED)
    first = engine.generate([replace(request, limit=7) for request in requests], SAMPLED)
    assert {len(c.tokens) for c in first if c.finish_reason == "length"} == {7}
    open_ = [i for i, c in enumerate(first) if c.finish_reason == "length"]
    rest = engine.generate(
        [
            replace(requests[i], prompt_ids=[*requests[i].prompt_ids, *first[i].tokens], start=7)
            for i in open_
        ],
        SAMPLED,
    )
    for i, second in zip(open_, rest, strict=True):
        assert [*first[i].tokens, *second.tokens] == whole[i].tokens.tolist()
        np.testing.assert_allclose([*first[i].logps, *second.logps], whole[i].logps, atol=1e-5)
        assert second.finish_reason == whole[i].finish_reason
    with pytest.raises(ValueError, match="starts at 40 sampled tokens and ends at 40"):
        engine.generate([replace(requests[0], start=40)], SAMPLED)


@pytest.mark.parametrize(
    ("name", "decoder"),
    [
        *((name, kind) for name in FAST for kind in ("compiled", "fast")),
        ("gpt2", "generic"),
    ],
)
def test_greedy_tokens_are_those_of_transformers(name, decoder):
    model, requests = make_model(name), make_requests(samples=1)
    params = SamplingParams(max_tokens=24, greedy=True)
    got = make_engine(model, decoder=decoder).generate(requests, params)
    for request, completion in zip(requests, got, strict=True):
        ids = torch.tensor([request.prompt_ids])
        want = model.generate(ids, do_sample=False, max_new_tokens=24, pad_token_id=0)
        assert completion.tokens.tolist() == want[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("name", ["qwen2-tied", "qwen2-gqa", "gemma"])
def test_results_do_not_depend_on_batch_size_order_or_company(name):
    model, requests = make_model(name), make_requests(prompts=9, samples=5)
    whole = tokens_of(make_engine(model).generate(requests, SAMPLED))
    for size in (11, 4):
        small = make_engine(model, max_batch_size=size)
        assert tokens_of(small.generate(requests, SAMPLED)) == whole
    order = np.random.default_rng(0).permutation(len(requests))
    shuffled = tokens_of(make_engine(model).generate([requests[i] for i in order], SAMPLED))
    assert shuffled == [whole[i] for i in order]
    assert tokens_of(small.generate(requests[11:12], SAMPLED)) == whole[11:12]
    assert len(set(map(tuple, whole))) > len(whole) // 2


@pytest.mark.parametrize("decoder", ["compiled", "fast"])
def test_a_long_queue_through_a_narrow_batch_uses_the_cache_again(decoder):
    model = make_model("qwen2-tied")
    requests = make_requests(prompts=12, samples=10)
    params = SamplingParams(max_tokens=80, temperature=1.4)
    narrow = make_engine(model, max_batch_size=3, decoder=decoder)
    completions = narrow.generate(requests, params)
    tokens, cache = sum(len(c.tokens) for c in completions), narrow.decoder.cache
    # Columns for three sequences: without those of finished ones it could not end.
    columns = {
        "compiled": lambda: 16 * len(cache.users),
        "fast": lambda: 3 * cache.data.shape[3],
    }[decoder]()
    assert tokens > 2 * columns and columns < 3 * 250
    for request, completion in zip(requests[::7], completions[::7], strict=True):
        want = reference(model, request, completion, params.temperature)
        np.testing.assert_allclose(completion.logps, want, atol=1e-5)


@pytest.mark.parametrize("decoder", ["compiled", "fast"])
def test_equal_prompts_are_computed_once(decoder):
    engine, widths = make_engine(make_model("llama-mha"), decoder=decoder), []
    prefill = engine.decoder.prefill
    engine.decoder.prefill = lambda prompts, *rest: (
        widths.append(len(prompts)) or prefill(prompts, *rest)
    )
    engine.generate(make_requests(prompts=5, samples=6), SAMPLED)
    assert widths == [5]
    # A prompt whose samples do not fit into one batch is not computed again either.
    engine.max_batch_size, widths[:] = 4, []
    engine.generate(make_requests(prompts=5, samples=6), SAMPLED)
    assert sum(widths) == 5


@pytest.mark.parametrize("decoder", ["compiled", "fast"])
def test_prompts_in_several_chunks(decoder, monkeypatch):
    model, requests = make_model("llama-mha"), make_requests(longest=40)
    requests = [requests[i] for i in np.random.default_rng(1).permutation(len(requests))]
    want = tokens_of(make_engine(model, decoder=decoder).generate(requests, SAMPLED))
    monkeypatch.setattr(f"rllib_distrl.engine.{decoder}_decoder.PREFILL_TOKENS", 17)
    assert tokens_of(make_engine(model, decoder=decoder).generate(requests, SAMPLED)) == want


@torch.inference_mode()
def test_pages_of_finished_rows_come_back():
    engine = make_engine(make_model("qwen2-gqa"))
    requests = make_requests(prompts=6, samples=5, longest=40)
    decoder, pages = engine.decoder, []
    for _ in range(3):
        engine.generate(requests, SAMPLED)
        assert not decoder.cache.users.any()
        pages.append(len(decoder.cache.users))
    assert pages[0] == pages[-1]
    decoder.open(4, 20, 40)
    prompts = [tuple(range(4, 24)), tuple(range(4, 9))]
    decoder.admit(prompts, np.array([0, 0, 0, 1]))
    # A full page for the first prompt, shared by its rows; a page of each row's own; those of the
    # last prompt stay while another call may continue it.
    users = decoder.cache.users
    assert sorted(users[users > 0].tolist()) == [1, 1, 1, 1, 1, 3]
    decoder.keep(np.array([2, 3]))
    assert sorted(users[users > 0].tolist()) == [1, 1, 1, 1]


def test_temperature_top_k_top_p_and_entropy_reach_the_sampler():
    model, requests = make_model("qwen2-gqa"), make_requests(prompts=4, samples=3)
    params = SamplingParams(12, temperature=0.7, top_p=0.8, top_k=5, entropy=True)
    for request, completion in zip(
        requests, make_engine(model).generate(requests, params), strict=True
    ):
        ids = torch.tensor([[*request.prompt_ids, *completion.tokens.tolist()]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(request.prompt_ids) - 1 : -1].double()
        for t, token in enumerate(completion.tokens):
            probs = torch.softmax(logits[t] / 0.7, -1)
            best = probs.sort(descending=True)
            top, ids_of_top = best.values[:5] / best.values[:5].sum(), best.indices[:5]
            size = int((top.cumsum(0) < 0.8).sum()) + 1
            kept = top[:size] / top[:size].sum()
            at = ids_of_top[:size].tolist().index(token)
            assert completion.logps[t] == pytest.approx(kept[at].log().item(), abs=1e-5)
            entropy = -(kept * kept.log()).sum().item()
            assert completion.entropies[t] == pytest.approx(entropy, abs=1e-5)


def test_completions_end_at_eos_or_at_the_limit():
    model, requests = make_model("qwen2-tied"), make_requests()
    for completion in make_engine(model).generate(requests, SAMPLED):
        assert EOS not in completion.tokens[:-1]
        assert len(completion.tokens) == len(completion.logps) <= SAMPLED.max_tokens
        if completion.finish_reason == "stop":
            assert completion.tokens[-1] == EOS
        else:
            assert len(completion.tokens) == SAMPLED.max_tokens
    one = make_engine(model).generate(requests, SamplingParams(max_tokens=1))
    assert [len(completion.tokens) for completion in one] == [1] * len(requests)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("decoder", ["compiled", "fast", "generic"])
def test_bfloat16(decoder, name):
    model, requests = make_model(name).to(torch.bfloat16), make_requests()
    engine = make_engine(model, dtype=torch.bfloat16, decoder=decoder)
    differences = [
        completion.logps - reference(model, request, completion)
        for request, completion in zip(
            requests, engine.generate(requests, SamplingParams(20)), strict=True
        )
    ]
    # bfloat16 keeps 8 bits: the mean is what separates rounding from a wrong position.
    assert np.abs(np.concatenate(differences)).mean() < 0.05


@pytest.mark.parametrize("name", FAST)
def test_bfloat16_rounds_less_than_transformers_does(name):
    """Both against the same rounded weights in float32: what only computing in bfloat16 costs."""
    model, requests = make_model(name).to(torch.bfloat16), make_requests()
    completions = make_engine(model, dtype=torch.bfloat16).generate(requests, SamplingParams(20))
    exact, pairs = copy.deepcopy(model).float(), zip(requests, completions, strict=True)
    errors = np.array(
        [
            [np.abs(logps - reference(exact, *pair)).mean() for logps in (pair[1].logps, theirs)]
            for pair in pairs
            for theirs in [reference(model, *pair)]
        ]
    )
    ours, theirs = errors.mean(0)
    assert ours < theirs and ours < 0.02


@pytest.mark.parametrize("greedy", [False, True])
def test_diverged_weights_are_an_error_where_a_gpu_draws(greedy, monkeypatch):
    # Logits on a GPU go to `draw`, which does not look at what it gets.
    for place in ("scheduler", "fast_decoder"):
        monkeypatch.setattr(f"rllib_distrl.engine.{place}.sample", draw)
    model = make_model("qwen2-gqa")
    engine = make_engine(model, decoder="fast")
    params = SamplingParams(max_tokens=4, greedy=greedy)
    assert len(engine.generate(make_requests(), params)) == len(make_requests())
    model.model.norm.weight.data.fill_(torch.nan)
    engine.load_weights(model.state_dict(), 1)
    with pytest.raises(RuntimeError, match="row 0 are not finite: the weights have diverged"):
        engine.generate(make_requests(), params)


def test_the_window_is_kept():
    engine = make_engine(make_model("qwen2-tied"), max_seq_len=20)
    request = Request([5] * 10, (0, 0, 0, 0))
    assert engine.generate([request], SamplingParams(10))
    with pytest.raises(ValueError, match="window of 20 tokens"):
        engine.generate([request], SamplingParams(11))
    with pytest.raises(ValueError, match="window of 96 tokens"):
        make_engine(make_model("gpt2")).generate([request], SamplingParams(87))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "empty"), ([VOCAB], f"token {VOCAB}"), ([4, -1], "token -1")],
)
def test_bad_prompts_are_refused(prompt, message):
    engine = make_engine(make_model("qwen2-tied"))
    with pytest.raises(ValueError, match=message):
        engine.generate([Request(prompt, (0, 0, 0, 0))], SAMPLED)
    assert engine.generate([], SAMPLED) == []


def test_construction_is_checked():
    config = CONFIGS["gpt2"]()
    with pytest.raises(ValueError, match="model_type='gpt2'"):
        TorchEngine(config, [EOS], decoder="fast")
    with pytest.raises(ValueError, match=r"float32 and bfloat16 on CPU, not torch.float16"):
        TorchEngine(CONFIGS["qwen2-gqa"](), [EOS], decoder="compiled", dtype=torch.float16)
    odd = CONFIGS["qwen2-tied"]()
    odd.hidden_size = 32
    assert type(TorchEngine(odd, [EOS]).decoder).__name__ == "GenericDecoder"
    with pytest.raises(ValueError, match="heads of 8 are no multiple of 16"):
        TorchEngine(odd, [EOS], decoder="compiled")
    with pytest.raises(ValueError, match="eos token 61"):
        TorchEngine(config, [61])
    with pytest.raises(ValueError, match="max_batch_size=0"):
        TorchEngine(config, [EOS], max_batch_size=0)
