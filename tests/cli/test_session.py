"""Bad input is one red paragraph and exit code 2; signals are acted on where the work asks."""

from __future__ import annotations

import os
import pty
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rllib_distrl.cli.app import app
from rllib_distrl.cli.session import (
    Interrupted,
    Interrupts,
    exit_code_of,
    kept_from_ray,
    message_of,
)
from tests.helpers import start_python

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


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def send(signum: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), signum)


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_is_noted_announced_once_and_raised_where_it_is_asked_for(
    signum: int, capfd: pytest.CaptureFixture[str]
) -> None:
    done = False
    with Interrupts("Finishing.") as interrupts:
        interrupts.check()
        send(signum)
        done = True
        assert interrupts.pending
        with pytest.raises(Interrupted) as caught:
            interrupts.check()
    assert done
    assert capfd.readouterr().out == "Finishing.\n"
    assert exit_code_of(caught.value) == 128 + signum


class SendsWhenFreed:
    def __del__(self) -> None:
        send()
        _ = [0 for _ in range(1000)]  # the handler runs in here


def test_a_signal_in_a_destructor_or_a_callback_is_not_lost() -> None:
    with Interrupts("") as interrupts:
        SendsWhenFreed()
        assert interrupts.pending
    with Interrupts("") as interrupts:
        sorted([2, 1], key=lambda x: send() or x)
        with pytest.raises(Interrupted):
            interrupts.check()


def test_handlers_come_back_and_ignored_signals_stay_ignored() -> None:
    before = [signal.getsignal(signum) for signum in SIGNALS]
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts("") as interrupts:
            send(signal.SIGHUP)
            assert not interrupts.pending
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGINT) != before[0]
    finally:
        signal.signal(signal.SIGHUP, ignored)
    assert [signal.getsignal(signum) for signum in SIGNALS] == before


def test_what_comes_while_ray_starts_is_noted_when_it_has() -> None:
    from ray._private import utils

    theirs = utils.set_sigterm_handler
    with Interrupts("") as interrupts:
        with kept_from_ray():
            utils.set_sigterm_handler(lambda *_: pytest.fail("Ray took SIGTERM"))
            # To this thread: what is sent to the process another thread may take, any time later.
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
            inherited = signal.pthread_sigmask(signal.SIG_BLOCK, ())
            assert set(SIGNALS) <= inherited
            assert not interrupts.pending
        assert interrupts.pending
    assert utils.set_sigterm_handler is theirs
    assert not set(SIGNALS) & signal.pthread_sigmask(signal.SIG_BLOCK, ())


WORK = """
import sys, time
from rllib_distrl.cli.session import Interrupted, Interrupts
with Interrupts("first", "last words") as interrupts:
    print("ready", flush=True)
    for _ in range(int(sys.argv[1])):
        time.sleep(0.1)
        print("working", flush=True)
    try:
        interrupts.check()
    except Interrupted:
        sys.exit(7)
"""


def start(tenths: int, terminal: int | None = None) -> subprocess.Popen[str]:
    everything = ("stdin", "stdout", "stderr")
    pipes = {} if terminal is None else dict.fromkeys(everything, terminal)
    process = start_python("-c", WORK, str(tenths), **pipes)
    if process.stdout is not None:
        assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(
    ("second", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGKILL), (signal.SIGHUP, -signal.SIGKILL)],
)
def test_a_second_ctrl_c_ends_the_process_and_nothing_else_does(second: int, code: int) -> None:
    process = start(600)
    process.send_signal(signal.SIGINT)
    time.sleep(0.6)
    process.send_signal(second)
    try:
        process.wait(2 if second == signal.SIGINT else 0.5)
    except subprocess.TimeoutExpired:
        process.kill()
    out, _ = process.communicate()
    assert process.returncode == code
    assert ("last words" in out) == (second == signal.SIGINT)


def test_a_press_that_arrives_twice_is_one() -> None:
    process = start(3)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    process.communicate(timeout=20)
    assert process.returncode == 7  # the work was done


def test_work_goes_on_when_the_terminal_is_gone(tmp_path: Path) -> None:
    controller, terminal = pty.openpty()
    process = start(8, terminal)
    os.close(terminal)
    assert b"ready" in os.read(controller, 100)
    process.send_signal(signal.SIGHUP)  # as the system does, before it is noticed in writing
    os.close(controller)  # from now on every write there is an error
    assert process.wait(20) == 7
