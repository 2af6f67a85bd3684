"""What the handshake's probe samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rllib_distrl.engine import Request, SamplingParams, TorchEngine, content_hash
from rllib_distrl.engine.weights import check_engine, take_probe
from tests.engine.engine_models import make_engine, make_model, make_requests, reference_logps

NARROW = {
    "nucleus": {"top_p": 0.2},
    "three tokens": {"top_k": 3},
    "greedy": {"greedy": True},
}


@pytest.mark.parametrize("name", NARROW)
def test_a_probe_samples_from_the_whole_distribution_at_the_temperature_of_training(
    name: str,
) -> None:
    model = make_model("qwen2-tied")
    engine = make_engine(model)
    prompt = make_requests()[0].prompt_ids
    params = SamplingParams(max_tokens=40, temperature=1.4, **NARROW[name])
    probe = take_probe(engine, prompt, params)
    request = Request(prompt, (0, 0, 0, 0))
    want = reference_logps(model, request, probe, 1.4)
    np.testing.assert_allclose(probe.logps, want, atol=1e-5)
    assert len(probe.tokens) <= 8
    plain = take_probe(engine, prompt, SamplingParams(max_tokens=40, temperature=1.4))
    assert probe.tokens.tolist() == plain.tokens.tolist()


_SIZES = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_MIXED = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4,
    "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
# Architectures beside their own settings, and whether their cache can be shared.
CACHES: dict[str, tuple[dict[str, Any], bool]] = {
    "qwen3_5_text": (_MIXED, True),
    "jamba": ({"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4}, True),
    "biogpt": ({}, True),  # a head that is tied under another name
    "mamba": ({"state_size": 8}, False),
    "recurrent_gemma": ({"lru_width": 32, "num_hidden_layers": 3}, False),
    "minimax": ({"num_local_experts": 4}, False),
}


@pytest.mark.parametrize("kind", CACHES)
def test_an_engine_samples_from_the_model_with_or_without_its_cache(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings, shares = CACHES[kind]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**_SIZES, **settings})
    model = AutoModelForCausalLM.from_config(config).eval()
    engine = TorchEngine(config, range(0, 60, 7))
    assert engine.load_weights(model.state_dict(), 0) == content_hash(model.state_dict())
    check_engine(engine, model, SamplingParams(max_tokens=8), "float32")
    assert engine.decoder.caches == shares  # pyright: ignore[reportAttributeAccessIssue]
    requests = [Request([5, 6, 7], (0, 0, i, 0)) for i in range(4)]
    requests += [Request([8, 9], (0, 1, i, 0)) for i in range(2)]
    completions = engine.generate(requests, SamplingParams(max_tokens=12))
    assert len({len(completion.tokens) for completion in completions}) > 1
    for request, completion in zip(requests, completions, strict=True):
        want = reference_logps(model, request, completion)
        np.testing.assert_allclose(completion.logps, want, atol=1e-5)


def test_an_engine_with_other_weights_than_the_model_is_refused() -> None:
    engine, other = make_engine(make_model("llama-mha")), make_model("llama-mha", seed=1)
    with pytest.raises(ValueError, match="other probabilities than LlamaForCausalLM has"):
        check_engine(engine, other, SamplingParams(max_tokens=8), "bfloat16")
