"""A model learns as it computes, packs rows only where that is exact, or is refused by name."""

import gymnasium
import pytest
import torch
from ray.rllib.core.columns import Columns
from transformers import AutoConfig, AutoModelForCausalLM

from rllib_distrl.model import causal_lm
from rllib_distrl.model.causal_lm import packs_rows
from rllib_distrl.model.causal_lm_module import CausalLMModule
from rllib_distrl.model.sequences import INPUT_IDS, PROMPT_LENS
from tests.model.test_causal_lm import SIZES

MLA = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
# Settings, and whether rows can be packed.
KINDS = {
    "qwen2": ({}, True),
    "granite": ({"logits_scaling": 8.0}, True),
    "cohere2": ({"logit_scale": 0.3}, False),
    "gemma2": ({"final_logit_softcapping": 2.0, "attn_logit_softcapping": 2.0}, False),
    "nemotron": ({}, False),  # says that its attention can be exchanged, and does not exchange it
    "deepseek_v3": (MLA, True),  # values of another size than keys
    "deepseek_v3, wide values": ({**MLA, "v_head_dim": 24}, True),
    "gpt_oss": ({"num_local_experts": 4, "num_experts_per_tok": 2}, False),
}


def save_model(folder, kind, **settings):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **settings})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(3.0)  # logits are not flat
    model.save_pretrained(folder)
    return model


def make_module(folder, **settings):
    space = gymnasium.spaces.Discrete(60)
    return CausalLMModule(
        observation_space=space,
        action_space=space,
        inference_only=False,
        model_config={"model": str(folder), "critic": "none", "temperature": 0.8, **settings},
    )


def batch():
    """Four rows, two with one prompt; all of other lengths."""
    ids = torch.randint(5, 60, (4, 20), generator=torch.Generator().manual_seed(1))
    ids[1, :6] = ids[0, :6]
    prompt_lens, steps = torch.tensor([6, 6, 4, 9]), torch.tensor([9, 3, 12, 7])
    actions = torch.zeros(4, 12, dtype=torch.long)
    for row, (n, m) in enumerate(zip(prompt_lens, steps, strict=True)):
        actions[row, :m] = ids[row, n : n + m]
        ids[row, n + m :] = 0
    mask = torch.arange(12) < steps[:, None]
    return {INPUT_IDS: ids, PROMPT_LENS: prompt_lens, Columns.ACTIONS: actions,
            Columns.LOSS_MASK: mask}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_logps_are_those_of_the_models_own_forward_pass(name, tmp_path):
    kind, (settings, packs) = name.partition(",")[0], KINDS[name]
    model = save_model(tmp_path, kind, **settings)
    module, columns = make_module(tmp_path), batch()
    assert packs_rows(module.policy) == packs
    found = module.compute_logps(columns)
    for row, n in enumerate(columns[PROMPT_LENS].tolist()):
        m = int(columns[Columns.LOSS_MASK][row].sum())
        ids = columns[INPUT_IDS][row, : n + m]
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, n - 1 : -1] / 0.8
        expected = logits.log_softmax(-1).gather(-1, ids[n:, None])[:, 0]
        torch.testing.assert_close(found[row, :m], expected, rtol=1e-5, atol=1e-5)


def test_an_encoder_is_refused(tmp_path):
    save_model(tmp_path, "bert", type_vocab_size=2)
    with pytest.raises(ValueError, match=r"BertLMHeadModel is no causal model.*Choose a decoder"):
        make_module(tmp_path)


def test_an_encoder_that_was_made_a_decoder_is_not(tmp_path):
    save_model(tmp_path, "bert", type_vocab_size=2, is_decoder=True)
    make_module(tmp_path)


def test_a_wrong_path_is_refused_with_what_deviates(tmp_path, monkeypatch):
    save_model(tmp_path, "qwen2")
    monkeypatch.setattr(CausalLMModule, "token_logps", half_as_sharp(CausalLMModule.token_logps))
    with pytest.raises(ValueError, match=r"other probabilities than Qwen2ForCausalLM.*differ by"):
        make_module(tmp_path)


def half_as_sharp(token_logps):
    def changed(module, policy, states, *others):
        return token_logps(module, policy, states * 0.5, *others)

    return changed


def test_a_leak_between_packed_rows_means_padded_ones(tmp_path, monkeypatch):
    save_model(tmp_path, "llama")
    monkeypatch.setattr(causal_lm, "packed_attention", sees_everything)
    assert not packs_rows(make_module(tmp_path).policy)


def sees_everything(query, key, value, packed, scale):
    repeats = query.shape[1] // key.shape[1]
    q, k, v = query, key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1)
