"""A user's own problem: rows in a file, a scoring function, and `distrl train`."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from rllib_distrl.runs.log import read_progress
from tests.envs.byte_tokenizer import byte_tokenizer
from tests.helpers import start_python

SCORES = """
def wanted_letters(prompt, completion, row):
    assert prompt == row["problem"]
    return float(row["letter"] in completion)
"""
RECIPE = """
[run]
model = "{model}"
iterations = 3

[rollout]
prompts_per_iteration = 8
num_generations = 4
evaluation_generations = 2
max_completion_tokens = 12
temperature = 1.5

[eval]
problems = 3
n = 2
k = [1, 2]
interval = 3
validation_problems = 2
token_problems = 2

[environment]
env = "distrl_envs:distrl/Custom-v0"

[environment.env_config]
prompt_template = "Q: {{prompt}}\\nA:"

[environment.env_config.task_config]
data = "{data}"
score = "letter_scores:wanted_letters"
fields = {{ problem = "question" }}
on_bad_row = "skip"
holdout = 0.6

[training]
lr = 1e-3
minibatch_size = 16

[training.prompt_sampler]
name = "variance_mix"
share = 0.25
"""


def save_model(folder: Path) -> None:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer) + 7, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=128,
        eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.slow
def test_training_on_rows_of_ones_own(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    (tmp_path / "letter_scores.py").write_text(SCORES)
    rows = [{"question": f"Write {letter}.", "letter": letter} for letter in "abcdefghijklmnop"]
    lines = [json.dumps(row) for row in [*rows, {"letter": "no question"}]]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    recipe = tmp_path / "letters.toml"
    recipe.write_text(RECIPE.format(model=tmp_path / "model", data=tmp_path / "rows.jsonl"))
    # `-m` finds the scores in the working directory.
    training = start_python("-m", "rllib_distrl.cli", "train", recipe, "--out", "run", cwd=tmp_path)
    out, err = training.communicate(timeout=250)
    assert training.returncode == 0, out + err
    assert "skipped 1 of 17 rows" in err

    last = read_progress(tmp_path / "run" / "progress.jsonl")[-1]
    assert last["evaluation/env_runners/num_episodes"] == 4
    assert last["evaluation/env_runners/pass@1"] <= last["evaluation/env_runners/pass@2"]
    samples = pd.read_parquet(tmp_path / "run" / "samples" / "after.parquet")
    assert len(samples) == 6
    for sample in samples.itertuples():
        letter = str(sample.prompt)[len("Write ")]
        assert sample.score == float(letter in str(sample.completion))
