"""A long run must not grow: memory, file descriptors, processes, shared memory."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from rllib_distrl.run_log import read_progress
from tests.cli.test_train import start

ITERATIONS = 360
RECIPE = f"""
[run]
model = "builtin:countdown-tiny"
iterations = {ITERATIONS}
checkpoint_interval = 20
keep_checkpoints = 2
log_interval = 1000

[rollout]
prompts_per_iteration = 2
num_generations = 2
max_completion_tokens = 8

[eval]
before = false
problems = 2
n = 1
k = [1]
interval = 40
validation_problems = 2
token_problems = 0
critic_prefixes = 0

[env_runners]
num_env_runners = 1

[environment]
env = "distrl_envs:distrl/Countdown-v0"
"""
MIB = 2**20


class Usage(NamedTuple):
    """What the processes of a run hold."""

    rss: int
    descriptors: int
    processes: int
    shared: int


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_long_run_does_not_grow(tmp_path: Path) -> None:
    from rllib_distrl.models.loading import resolve

    resolve("builtin:countdown-tiny")
    (tmp_path / "soak.toml").write_text(RECIPE)
    process = start("train", "soak.toml", "--out", "run", cwd=tmp_path)
    usages: dict[int, Usage] = {}
    while process.poll() is None:
        done = len(read_progress(tmp_path / "run" / "progress.jsonl"))
        if 0 < done < ITERATIONS:
            usages[done] = usage(process.pid)
        time.sleep(0.3)
    out, err = process.communicate()
    assert process.returncode == 0, out + err
    assert len(read_progress(tmp_path / "run" / "progress.jsonl")) == ITERATIONS
    middle = [u for done, u in usages.items() if ITERATIONS / 3 <= done < ITERATIONS * 2 / 3]
    last = [u for done, u in usages.items() if done >= ITERATIONS * 2 / 3]
    assert min(len(middle), len(last)) >= 5
    for name, tolerance in (
        ("rss", 6 * MIB),  # of 1.2 GiB: 50 kB per iteration would show
        ("descriptors", 2),
        ("processes", 0),
        ("shared", MIB),
    ):
        before, after = (max(getattr(u, name) for u in part) for part in (middle, last))
        assert after <= before + tolerance, (name, before, after)


def usage(pid: int) -> Usage:
    """Sums over a process and all that it has started."""
    tree = list(_tree(pid))
    names = [
        os.path.join(folder, name)
        for process in tree
        for folder in [f"/proc/{process}/fd"]
        for name in _entries(folder)
    ]
    shared = {status.st_ino: status.st_blocks * 512 for status in _shared(names)}
    return Usage(sum(map(_rss, tree)), len(names), len(tree), sum(shared.values()))


def _tree(pid: int) -> Iterator[int]:
    yield pid
    for thread in _entries(f"/proc/{pid}/task"):
        for child in _read(f"/proc/{pid}/task/{thread}/children").split():
            yield from _tree(int(child))


def _rss(pid: int) -> int:
    fields = _read(f"/proc/{pid}/statm").split()
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE") if fields else 0


def _shared(descriptors: list[str]) -> Iterator[os.stat_result]:
    """Files in /dev/shm that are open."""
    for path in descriptors:
        try:
            if os.readlink(path).startswith("/dev/shm/"):
                yield os.stat(path)
        except OSError:
            continue  # closed meanwhile


def _read(path: str) -> str:
    """The file's text, empty once the process has ended."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _entries(path: str) -> list[str]:
    """The folder's entries, none once the process has ended."""
    try:
        return os.listdir(path)
    except OSError:
        return []
