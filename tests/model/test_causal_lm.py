"""What stands around a model's LM head is found by running it, whatever its settings are called."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rllib_distrl.maths.lm_head import IDENTITY, LogitMap
from rllib_distrl.model.causal_lm import last_states, logit_map_of, ordinary_tokens, trunk_of

SIZES = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MAPS = {
    "qwen2": ({}, IDENTITY),
    "granite": ({"logits_scaling": 8.0}, LogitMap(1 / 8)),
    "cohere": ({"logit_scale": 0.3}, LogitMap(0.3)),
    "gemma2": ({"final_logit_softcapping": 7.0}, LogitMap(cap=7.0)),
    "nanochat": ({"final_logit_softcapping": 15.0}, LogitMap(cap=15.0)),
}


def make_model(kind, **settings):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **{**SIZES, **settings})
    ).eval()


@pytest.mark.parametrize("kind", MAPS)
def test_what_follows_the_head_is_measured(kind):
    settings, expected = MAPS[kind]
    assert logit_map_of(make_model(kind, **settings)) == expected


def test_a_factor_and_a_cap_together_are_told_apart():
    model = make_model("gemma2", final_logit_softcapping=7.0)
    capped = model.forward

    def tripled(*arguments, **keywords):
        outputs = capped(*arguments, **keywords)
        outputs.logits = 3.0 * outputs.logits
        return outputs

    model.forward = tripled
    found = logit_map_of(model)
    assert (found.scale, found.cap) == (pytest.approx(3.0), pytest.approx(21.0))


def test_anything_else_after_the_head_is_refused():
    model = make_model("qwen2")
    own = model.forward

    def suppressed(*arguments, **keywords):
        outputs = own(*arguments, **keywords)
        outputs.logits[..., 7] = -1e4
        return outputs

    model.forward = suppressed
    with pytest.raises(ValueError, match="Qwen2ForCausalLM does more to the output of its LM head"):
        logit_map_of(model)


def test_states_are_what_the_head_reads():
    model = make_model("modernbert-decoder", local_attention=8, global_attn_every_n_layers=1,
                       cls_token_id=3, sep_token_id=4)  # fmt: skip
    ids = torch.tensor([ordinary_tokens(model.config, 6)])
    with torch.no_grad():
        states = last_states(model, input_ids=ids)
        expected = model(input_ids=ids).logits
        trunk = last_states(trunk_of(model), input_ids=ids)
        found = model.get_output_embeddings()(states)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(states, trunk, atol=1e-3)  # a layer stands between


def test_a_trunk_is_found_where_the_class_names_another():
    model = make_model("llama4_text", num_local_experts=2, intermediate_size_mlp=48)
    assert model.base_model is model
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        logits = model.lm_head(last_states(trunk_of(model), input_ids=ids))
    torch.testing.assert_close(logits, model(input_ids=ids).logits, rtol=1e-5, atol=1e-6)
