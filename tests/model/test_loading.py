"""Every way of naming a model, and what is said where a name is wrong."""

import json
import os
import re

import huggingface_hub
import pytest
import torch
from tokenizers import Tokenizer, models
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GemmaConfig,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from distrl_envs.tokenizers import small_tokenizer
from rllib_distrl.model.builtin import SPECS
from rllib_distrl.model.loading import (
    check_vocabulary,
    eos_token_ids,
    load_config,
    load_generation_config,
    load_model,
    load_tokenizer,
    resolve,
)

VOCABULARY = len(small_tokenizer())
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE),
    "llama": LlamaConfig(**SHAPE),  # its default EOS, 2, is <unk> here
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=64),
    "gemma": GemmaConfig(**SHAPE),
}


def saved(folder, config, tokenizer=None):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return model


def words(count, **special):
    vocabulary = {f"w{index}": index for index in range(count)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary)), **special)


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen2")
    saved(folder, FAMILIES["qwen2"], small_tokenizer())
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_of_each_family_loads_by_its_path(family, tmp_path):
    original = saved(tmp_path, FAMILIES[family], small_tokenizer())
    name = str(tmp_path)

    model, tokenizer = load_model(name), load_tokenizer(name)

    assert load_config(name).model_type == family
    prompt = tokenizer.encode("3 4 7 9 -> 24 :", add_special_tokens=False)
    assert prompt == [6, 7, 10, 12, 108, 27, 109]
    assert eos_token_ids(model, tokenizer) == (1,)
    ids = torch.tensor([prompt])
    assert torch.equal(model(input_ids=ids).logits, original(input_ids=ids).logits)
    assert not model.training


def test_precision_is_chosen_and_full_by_default(qwen2):
    assert {p.dtype for p in load_model(str(qwen2)).parameters()} == {torch.float32}
    half = load_model(str(qwen2), dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_a_hub_id_is_passed_on_as_it_is():
    assert resolve("Qwen/Qwen2.5-Math-7B") == "Qwen/Qwen2.5-Math-7B"
    assert resolve("gpt2") == "gpt2"


def test_a_folder_goes_before_a_hub_id(tmp_path, monkeypatch, qwen2):
    monkeypatch.chdir(tmp_path)
    os.symlink(qwen2, tmp_path / "gpt2")
    assert load_config("gpt2").model_type == "qwen2"


def test_all_but_the_weights_of_a_builtin_need_no_build(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTRL_CACHE", str(tmp_path))
    config = load_config("builtin:countdown")
    assert (config.vocab_size, config.max_position_embeddings) == (VOCABULARY, 128)
    assert load_tokenizer("builtin:countdown").eos_token_id == config.eos_token_id == 1
    assert load_generation_config("builtin:countdown").eos_token_id == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("spec", SPECS.values(), ids=str)
def test_vllm_takes_the_head_size_of_every_builtin(spec):
    assert spec.hidden_size // spec.num_heads >= 32


def wrong_names(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("text")
    (tmp_path / "no_weights").mkdir()
    FAMILIES["qwen2"].save_pretrained(tmp_path / "no_weights")
    (tmp_path / "not_json").mkdir()
    (tmp_path / "not_json" / "config.json").write_text("{")
    (tmp_path / "no_type").mkdir()
    (tmp_path / "no_type" / "config.json").write_text("{}")
    return {
        f"{tmp_path}/absent": "There is no folder",
        "../absent/model": "There is no folder",
        "a/b/c": "There is no folder",
        "": "Got the empty name",
        f"{tmp_path}/empty": "holds no config.json",
        f"{tmp_path}/file.txt": "Got the file",
        f"{tmp_path}/no_weights": "No model could be loaded from the folder",
        f"{tmp_path}/not_json": "could be loaded from the folder",
        f"{tmp_path}/no_type": "could be loaded from the folder",
        "builtin:chess": "the built-in models are builtin:countdown, builtin:graph-path, builtin:",
    }


def test_a_wrong_name_is_told_with_what_is_allowed(tmp_path):
    for name, message in wrong_names(tmp_path).items():
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            load_model(name)
        assert repr(name) in str(caught.value)
        assert "hub" in str(caught.value)  # the remedy names the choices
        assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize("load", [load_config, load_model, load_tokenizer])
def test_an_unreachable_hub_is_told_from_a_missing_folder(load, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"neither a local folder nor could its .* hub"):
        load("nobody-at-all/no-such-model")


def test_damaged_weights_are_refused(tmp_path):
    saved(tmp_path, FAMILIES["qwen2"])
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="No model could be loaded from the folder"):
        load_model(str(tmp_path))


def test_weights_of_another_shape_are_refused(tmp_path):
    saved(tmp_path, FAMILIES["qwen2"])
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "intermediate_size": 64}))
    with pytest.raises(ValueError, match="No model could be loaded from the folder"):
        load_model(str(tmp_path))


def test_incomplete_weights_are_refused_instead_of_made_up(tmp_path):
    saved(tmp_path, FAMILIES["qwen2"])
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_hidden_layers": 3}))
    file.write_text(file.read_text().replace('"layer_types"', '"_layer_types"'))
    with pytest.raises(ValueError, match=r"lack 12 tensors .* model\.layers\.2\."):
        load_model(str(tmp_path))


def test_a_model_without_a_language_model_head_is_refused(tmp_path):
    BertModel(
        BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lack \d+ tensors of BertLMHeadModel"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gemma"])
def test_a_folder_without_a_tokenizer_is_refused(family, tmp_path):
    saved(tmp_path, FAMILIES[family])
    with pytest.raises(ValueError, match="No tokenizer was saved with"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    saved(tmp_path, FAMILIES["llama"], words(20))
    with pytest.raises(ValueError, match=r"no EOS token.* set tokenizer\.eos_token"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ValueError, match="no EOS token"):
        eos_token_ids(GenerationConfig(), words(20))


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    config = LlamaConfig(**{**SHAPE, "vocab_size": VOCABULARY - 1})
    saved(tmp_path, config, small_tokenizer())
    with pytest.raises(ValueError, match=rf"ids up to {VOCABULARY - 1}.* ends at {VOCABULARY - 2}"):
        load_tokenizer(str(tmp_path))


def test_a_model_may_have_more_tokens_than_its_tokenizer():
    check_vocabulary(LlamaConfig(vocab_size=200), words(200, eos_token="w1"))
    with pytest.raises(ValueError, match="up to 200"):
        check_vocabulary(LlamaConfig(vocab_size=200), words(201, eos_token="w1"))


@pytest.mark.parametrize(
    ("named", "expected"),
    [(None, (5,)), (5, (5,)), (7, (5, 7)), ([9, 7, 5], (5, 7, 9)), ([7, 5000], (5, 7)), (3, (5,))],
)
def test_eos_ids_are_the_tokenizers_and_those_of_the_generation_config(named, expected):
    tokenizer = words(20, eos_token="w5", unk_token="w3")
    assert eos_token_ids(GenerationConfig(eos_token_id=named), tokenizer) == expected


def test_quantised_weights_are_refused_in_a_sentence(tmp_path):
    saved(tmp_path, FAMILIES["llama"], small_tokenizer())
    file = tmp_path / "config.json"
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": settings}))
    for load in (load_config, load_model):
        with pytest.raises(ValueError, match=r"are quantised \(gptq\), so they cannot learn"):
            load(str(tmp_path))


@pytest.mark.parametrize("model_type", ["of_my_own", "llama"])
def test_code_of_its_own_is_never_run_nor_asked_about(model_type, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    (tmp_path / "modeling.py").write_text("raise SystemExit('it ran')")
    auto_map = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "modeling.X")
    saved(tmp_path, FAMILIES["llama"], small_tokenizer())
    file = tmp_path / "config.json"
    settings = {**json.loads(file.read_text()), "model_type": model_type, "auto_map": auto_map}
    file.write_text(json.dumps(settings))
    if model_type == "llama":  # Transformers knows it by itself.
        assert load_model(str(tmp_path)).config.model_type == "llama"
        return
    for load in (load_config, load_model, load_tokenizer):
        with pytest.raises(ValueError, match="needs code that comes with it, which is never run"):
            load(str(tmp_path))


def test_an_adapter_is_told_from_a_model(tmp_path):
    saved(tmp_path, FAMILIES["llama"])
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    with pytest.raises(ValueError, match=r"adapter for 'some/base', not a model.*merge_and_unload"):
        load_config(str(tmp_path))


@pytest.mark.parametrize("text", ["{", "[1, 2]", '{"eos_token_id": "</s>"}'])
def test_a_broken_generation_config_is_named(text, tmp_path):
    saved(tmp_path, FAMILIES["qwen2"])
    (tmp_path / "generation_config.json").write_text(text)
    for load in (load_generation_config, load_model):
        with pytest.raises(ValueError, match=r"generation_config\.json of .* cannot be read"):
            load(str(tmp_path))


def test_without_a_generation_config_the_tokenizer_decides(tmp_path):
    saved(tmp_path, FAMILIES["qwen2"])
    (tmp_path / "generation_config.json").unlink()
    assert load_generation_config(str(tmp_path)).eos_token_id is None


def byte_level(**special):
    """Never makes an unknown token, whatever it calls one; as Qwen2.5 and GPT-2."""
    bytes_ = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}, []))
    bytes_.pre_tokenizer = ByteLevel(add_prefix_space=False)
    made = PreTrainedTokenizerFast(tokenizer_object=bytes_)
    made.add_special_tokens(special)
    return made


def test_an_end_of_text_may_be_called_the_unknown_token():
    tokenizer = byte_level(eos_token="<|im_end|>", unk_token="<|endoftext|>")
    end, text = tokenizer.eos_token_id, tokenizer.unk_token_id
    named = GenerationConfig(eos_token_id=[end, text])
    assert eos_token_ids(named, tokenizer) == tuple(sorted((end, text)))
    assert eos_token_ids(GenerationConfig(eos_token_id=text), tokenizer) == tuple(
        sorted((end, text))
    )
