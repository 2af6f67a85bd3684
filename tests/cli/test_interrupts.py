"""Signals are noted, and acted on where the work asks; a second Ctrl-C ends the process."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from rllib_distrl.cli.session import Interrupted, Interrupts, exit_code_of, kept_from_ray
from tests.helpers import start_python

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
    os.close(controller)  # from now on every write is an error
    process.send_signal(signal.SIGHUP)
    assert process.wait(20) == 7
