"""`distrl eval`: a model from a folder on a file or a recipe's problems, end to end."""

from __future__ import annotations

import json
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from typer.testing import CliRunner

from rllib_distrl.cli.app import app
from rllib_distrl.recipe import load_recipe
from rllib_distrl.runs.folder import create_run

sys.path.insert(0, str(Path(__file__).parents[1] / "envs"))
from byte_tokenizer import byte_tokenizer  # pyright: ignore[reportMissingImports]

PROBLEMS = [
    {"problem": "What is 3 + 4?", "answer": "7"},
    {"problem": "What is 4 + 4?", "answer": "8"},
    {"problem": "What is 14 / 2?", "answer": 7.0},
]
ANSWER = "\\boxed{7}"


def chain_model() -> Qwen2ForCausalLM:
    r"""A model without attention whose every token follows from the one before.

    The prompt ends with a full stop, so that it always writes \boxed{7} and ends.
    """
    tokenizer = byte_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=264,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config)
    path = [*tokenizer.encode("." + ANSWER), tokenizer.eos_token_id]
    with torch.no_grad():
        layer: Any = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(len(tokenizer), 264))
        model.lm_head.weight.zero_()
        for before, after in pairwise(path):
            model.lm_head.weight[after, before] = 3.0
    return model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "chain"
    chain_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS))
    return path


def evaluate(*arguments: object):
    sampling = ["--n", "4", "--k", "1,2", "--max-tokens", "16", "--temperature", "0.5"]
    return CliRunner().invoke(app, ["eval", *map(str, arguments), *sampling])


def parts(out: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in (out / "samples").glob("*.parquet")}


def test_file(model: Path, data: Path, tmp_path: Path) -> None:
    out, again = tmp_path / "out", tmp_path / "again"

    # As after a kill: two of three problems are finished.
    result = evaluate(model, "--data", data, "--out", out, "--problems", 2)
    assert result.exit_code == 0, result.output
    assert json.loads((out / "eval.json").read_text())["avg@4"] == 0.5
    first = parts(out)
    assert len(first) == 1

    result = evaluate(model, "--data", data, "--out", out)
    assert result.exit_code == 0, result.output
    assert "2 of 3 problems are finished" in result.output
    assert "sums: 3 problems, 4 samples each" in result.output
    assert "66.7 %" in result.output
    assert first.items() < parts(out).items()

    report = json.loads((out / "eval.json").read_text())
    assert report["avg@4"] == report["pass@1"] == report["pass@2"] == pytest.approx(2 / 3)
    assert "pass@4" not in report
    assert report["intervals"]["pass@2"] == [0.2, 1.0]
    assert report["status"] == {"correct": 8, "wrong": 4}
    asked = {name: report["evaluated"][name] for name in ("max_tokens", "temperature", "top_p")}
    assert asked == {"max_tokens": 16, "temperature": 0.5, "top_p": 0.95}
    samples = pd.read_parquet(out / "samples")
    assert samples["completion"].tolist() == [ANSWER] * 12
    assert samples["finish_reason"].tolist() == ["stop"] * 12
    assert (out / "pass_at_k.png").read_bytes().startswith(b"\x89PNG")

    labels = tmp_path / "labels.csv"
    labels.write_text("problem,sample,right\n0,0,true\n1,0,true\n2,1,false\n2,2,false\n")
    result = evaluate(model, "--data", data, "--out", out, "--audit", labels)
    audited = json.loads((out / "eval.json").read_text())["audit"]
    assert audited["false_positive_rate"]["value"] == 1.0
    assert audited["false_negative_rate"]["value"] == 0.5
    assert "fails what is right" in result.output
    result = evaluate(model, "--data", data, "--audit", labels)
    assert result.exit_code == 2 and "--audit compares labels with" in result.output

    # Another seed is another evaluation: refused there, unless told to replace it.
    seeded = (model, "--data", data, "--seed", 5, "--out", out)
    result = evaluate(*seeded)
    assert result.exit_code == 2
    assert "another evaluation (seed: there 0, now 5)" in result.stderr
    result = evaluate(*seeded, "--overwrite", "--problems", 1)
    assert result.exit_code == 0, result.output
    assert json.loads((out / "eval.json").read_text())["avg@4"] == 1.0

    plain = (out / "pass_at_k.png").read_bytes()
    result = evaluate(model, "--data", data, "--seed", 5, "--problems", 1, "--out", again)
    assert result.exit_code == 0, result.output
    alone = (again / "pass_at_k.png").read_bytes()
    arguments = ("--seed", 5, "--problems", 1, "--out", again, "--compare", out)
    assert evaluate(model, "--data", data, *arguments).exit_code == 0
    assert (again / "pass_at_k.png").read_bytes() not in (alone, plain)


def test_recipes_and_runs_name_a_model(model: Path, data: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "small.toml"
    recipe.write_text(
        f'[run]\nmodel = "{model}"\n[environment]\nenv = "distrl_envs:distrl/Countdown-v0"\n'
    )
    run = tmp_path / "run"
    create_run(run, load_recipe(recipe), ["distrl"])
    shutil.copytree(model, run / "model")
    for number, target in enumerate((recipe, run)):
        out = tmp_path / f"out{number}"
        result = evaluate(target, "--data", data, "--problems", 2, "--out", out)
        assert result.exit_code == 0, result.output
        assert json.loads((out / "eval.json").read_text())["avg@4"] == 0.5


def test_a_prompt_of_more_than_512_tokens(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"problem": "x" * 600, "answer": "1"}))
    result = evaluate(model, "--data", path)
    assert result.exit_code == 2
    assert "exceed the model's window of 512" in result.stderr


def test_repeated_problems_are_asked_once_and_columns_can_be_named(
    model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "twice.jsonl"
    rows = [{"q": row["problem"], "a": row["answer"]} for row in (*PROBLEMS, PROBLEMS[0])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = evaluate(model, "--data", path, "--fields", "problem=q,answer=a")
    assert result.exit_code == 0, result.output
    assert "3 problems, 4 samples each" in result.output
    assert "Asking 3 different problems; 1 of 4 rows repeat one." in result.stderr
    refused = evaluate(model, "--data", path)
    assert "field 'problem' is missing (the row has q, a)" in refused.stderr


BAD = {
    "unknown preset": (["MODEL", "--data", "gsm8", "--n", "4"], "Did you mean 'gsm8k'?"),
    "no such file": (["MODEL", "--data", "missing.jsonl"], "there is no file missing.jsonl"),
    "no local copy": (["MODEL", "--data", "gsm8k", "--data-dir", "."], "gsm8k_test.jsonl"),
    "k above n": (["MODEL", "--data", "DATA", "--n", "2", "--k", "4"], "pass@4 needs 1 <= k <= n"),
    "k no number": (["MODEL", "--data", "DATA", "--k", "1;2"], "--k is '1;2'"),
    "not a model": (["DATA_DIR", "--data", "DATA"], "holds no config.json"),
    "its own tokenizer": (["builtin:countdown-tiny", "--data", "DATA"], "tokenizer"),
    "beyond the window": (["MODEL", "--data", "DATA", "--max-tokens", "999"], "window of 512"),
    "plot of nothing": (["MODEL", "--data", "DATA", "--compare", "."], "give both"),
    "a recipe's setting": (["MODEL", "eval.n=4", "--data", "DATA"], "use options such as --n"),
    "no temperature": (["MODEL", "--data", "DATA", "--temperature", "0"], "--greedy --n 1"),
    "fields without paths": (["MODEL", "--data", "DATA", "--fields", "q"], "--fields is 'q'"),
    "another form": (["MODEL", "--data", "DATA", "--format", "alpaca"], "nearest is 'trl'"),
    "rows without data": (["MODEL", "--format", "trl"], "--format needs --data"),
    "a model alone": (["MODEL"], "say on what: --data"),
    "a model's name alone": (["builtin:countdown-tiny"], "say on what: --data"),
    "an option without data": (["MODEL", "--data-dir", "x"], "--data-dir needs --data"),
}


@pytest.mark.parametrize("name", BAD)
def test_refuses(name: str, model: Path, data: Path, tmp_path: Path) -> None:
    arguments, words = BAD[name]
    places = {"MODEL": str(model), "DATA": str(data), "DATA_DIR": str(tmp_path)}
    result = CliRunner().invoke(app, ["eval", *(places.get(a, a) for a in arguments)])
    assert result.exit_code == 2
    assert words in result.stderr
    assert "Traceback" not in result.output + result.stderr


def test_folders_of_one_name_are_refused(model: Path, data: Path, tmp_path: Path) -> None:
    here, there = tmp_path / "a" / "run", tmp_path / "b" / "run"
    result = evaluate(model, "--data", data, "--out", here, "--compare", there)
    assert result.exit_code == 2
    assert "two folders 'run'" in result.stderr
    assert not here.exists()
