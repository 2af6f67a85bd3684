"""Every supported family trains a step, with its own tokenizer file, loaded by path."""

import json

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from distrl_envs.tokenizers import small_tokenizer
from rllib_distrl.algorithm.export import check_export, policy_state
from tests.helpers import distrl_config

pytestmark = pytest.mark.usefixtures("ray_session")

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "Qwen2": SIZES,
    "Qwen3": SIZES,
    "Llama": SIZES,
    "Gemma": SIZES,
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
}


def make_model(family, path):
    tokenizer = small_tokenizer()
    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(tokenizer) + 9,  # Models pad their vocabulary.
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **FAMILIES[family],
    )
    torch.manual_seed(0)
    name = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    getattr(transformers, name)(config).save_pretrained(path)
    tokenizer.save_pretrained(path)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_a_family_trains_a_step(family, critic, tmp_path):
    make_model(family, tmp_path)
    algo = distrl_config(model=str(tmp_path), critic=critic).build_algo()
    try:
        before = policy_state(algo)
        result = algo.train()
        after = policy_state(algo)
        metrics = result["learners"]["default_policy"]
        assert metrics["logp_mismatch_max"] == pytest.approx(1.0, abs=1e-4)
        assert result["env_runners"]["num_env_steps_sampled"] > 8
        # Random models earn nothing; the critic and the bonus move the weights all the same.
        assert any(not torch.equal(before[name], after[name]) for name in before)
    finally:
        algo.stop()


def test_a_generation_config_that_transformers_would_not_save_is_exported_as_it_came(tmp_path):
    """A temperature without do_sample, as older chat models have it."""
    make_model("Llama", tmp_path)
    came = {"eos_token_id": 1, "temperature": 0.6, "top_p": 0.9, "do_sample": False}
    (tmp_path / GENERATION_CONFIG_NAME).write_text(json.dumps(came))
    with pytest.raises(ValueError, match="temperature"):
        GenerationConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "refused")
    algo = distrl_config(model=str(tmp_path)).build_algo()
    try:
        algo.export_model(tmp_path / "exported")
        weights = policy_state(algo)
    finally:
        algo.stop()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    written = exported.generation_config.to_dict()
    assert {name: written[name] for name in came} == came
    for name, tensor in exported.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    # What was exported trains and is exported again.
    check_export(str(tmp_path / "exported"))
