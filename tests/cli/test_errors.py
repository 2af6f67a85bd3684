"""Bad input: one red paragraph, exit code 2, nothing started and nothing lost."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rllib_distrl.cli.app import app
from rllib_distrl.cli.session import message_of

RECIPE = """
[run]
model = "builtin:countdown-tiny"
[environment]
env = "distrl_envs:distrl/Countdown-v0"
"""

BAD = {
    "unknown table": (["trainng.lr=1"], "The nearest one is [training]"),
    "unknown key": (["training.n_quantile=4"], "The nearest one is 'n_quantiles'"),
    "another trainer's key": (["training.learning_rate=1"], "The nearest one is 'lr'"),
    "wrong type": (["training.lr=true"], "training.lr: wanted a number"),
    "batch arithmetic": (["training.minibatch_size=100"], "minibatch_size=100"),
    "no such model": (["run.model=./no/such/model"], "no/such/model"),
    "beyond the window": (["rollout.max_completion_tokens=1000000"], "1000000"),
    "unknown option of ours": (["--resume", "--overwrite"], "give one of them"),
    "nothing to resume": (["--resume"], "no run to resume"),
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(RECIPE)
    return path


@pytest.mark.parametrize("name", BAD)
def test_train_refuses(name: str, recipe: Path, tmp_path: Path) -> None:
    arguments, words = BAD[name]
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["train", str(recipe), *arguments, "--out", str(out)])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert words in result.stderr
    assert "Traceback" not in result.output + result.stderr
    assert not out.exists()


@pytest.mark.slow
def test_gpus_that_are_not_there_are_not_waited_for(recipe: Path, tmp_path: Path) -> None:
    """By an algorithm of RLlib's own, which asks for them itself."""
    out = tmp_path / "out"
    settings = [
        "run.algorithm=PPO", "eval.before=false", "env_runners.num_env_runners=1",
        "env_runners.num_gpus_per_env_runner=100", "training.train_batch_size_per_learner=256",
    ]  # fmt: skip
    result = CliRunner().invoke(app, ["train", str(recipe), *settings, "--out", str(out)])
    assert result.exit_code == 2
    assert "100 for env runners: that many GPUs were asked for" in result.stderr
    assert not out.exists()


def test_a_run_beyond_the_machines_memory(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rllib_distrl.algorithm.estimates.machine_memory", lambda: 2**22)
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["train", str(recipe), "--out", str(out)])
    assert result.exit_code == 2
    assert "this machine has 4.0 MiB" in " ".join(result.stderr.split())
    assert not out.exists()
    explained = CliRunner().invoke(app, ["explain", str(recipe)])
    assert explained.exit_code == 0
    said = " ".join(explained.output.split())
    assert "this machine has 4.0 MiB" in said and "[rollout] max_" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["explain", "missing.toml"], "no recipe at missing.toml"),
        (["export", "nowhere", "out"], "neither a run folder nor a checkpoint"),
        (["eval", "nowhere"], "neither a run folder nor a checkpoint"),
        (["train", "."], "is a folder"),
    ],
)
def test_other_commands_refuse(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert words in result.stderr


def test_an_address_where_no_cluster_answers(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["train", str(recipe), "--out", str(out)])
    assert result.exit_code == 2
    assert f"RAY_ADDRESS=127.0.0.1:{port}: no Ray cluster answers" in result.stderr
    assert not out.exists()


def test_an_unwritable_place(recipe: Path) -> None:
    result = CliRunner().invoke(app, ["train", str(recipe), "--out", "/proc/nowhere/run"])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: /proc/nowhere")


def test_a_tokenizer_without_eos(recipe: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import BertConfig, PreTrainedTokenizerFast

    vocabulary = {"a": 0, "b": 1, "<unk>": 2}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    BertConfig(vocab_size=8).save_pretrained(tmp_path / "m")
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "m")
    arguments = ["train", str(recipe), f"run.model={tmp_path / 'm'}", "--out", str(tmp_path / "o")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "has no EOS token" in result.stderr
    assert not (tmp_path / "o").exists()


def test_a_model_without_weights_leaves_no_run_behind(recipe: Path, tmp_path: Path) -> None:
    from transformers import Qwen2Config

    from distrl_envs.tokenizers import small_tokenizer

    Qwen2Config(vocab_size=128, hidden_size=32, num_hidden_layers=1).save_pretrained(tmp_path / "m")
    small_tokenizer().save_pretrained(tmp_path / "m")
    out = tmp_path / "out"
    arguments = ["train", str(recipe), f"run.model={tmp_path / 'm'}", "--out", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "No model could be loaded" in result.stderr
    assert not out.exists()


def test_a_traceback_on_request(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTRL_TRACEBACK", "1")
    result = CliRunner().invoke(app, ["explain", str(recipe), "trainng.lr=1"])
    assert isinstance(result.exception, ValueError)


def test_messages_for_people() -> None:
    rllib = ValueError("too small\nTo suppress all validation errors, set `config.x`")
    assert message_of(rllib) == "too small"
    assert message_of(FileNotFoundError(2, "No such file", "a/b")) == "a/b: No such file"
    assert message_of(ValueError()) == "ValueError"
    remote = ValueError("ray::Runner() long remote traceback")
    remote.cause = ValueError("the window is 512")  # type: ignore[attr-defined]
    assert message_of(remote) == "the window is 512"


def test_help_imports_neither_torch_nor_ray() -> None:
    program = (
        "import sys; from typer.testing import CliRunner\n"
        "from rllib_distrl.cli.app import app\n"
        "result = CliRunner().invoke(app, ['--help'])\n"
        "assert result.exit_code == 0 and 'explain' in result.output\n"
        "print(sorted({'torch', 'ray', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
