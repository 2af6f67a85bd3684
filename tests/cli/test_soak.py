"""A long run must not grow: memory, file descriptors, processes, shared memory."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

import pytest

from rllib_distrl.runs.log import read_progress
from tests.cli.test_train import start

ITERATIONS = 240
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
    """What the processes of a run hold; the first two by process."""

    rss: dict[int, int]
    descriptors: dict[int, int]
    shared: int


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_long_run_does_not_grow(tmp_path: Path) -> None:
    from rllib_distrl.model.loading import resolve

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
    # Ray starts and ends idle workers as it likes: the processes that were there all the time
    # must not grow, and a few more or fewer are none that an iteration or a checkpoint leaves.
    lasting = set.intersection(*(set(u.rss) for u in (*middle, *last)))
    assert len(lasting) >= 5
    for name, tolerance in (("rss", 4 * MIB), ("descriptors", 2)):  # 4 MiB: 50 kB per iteration
        before, after = (
            median(sum(getattr(u, name)[pid] for pid in lasting) for u in part)
            for part in (middle, last)
        )
        assert after <= before + tolerance, (name, before, after)
    assert median(len(u.rss) for u in last) <= median(len(u.rss) for u in middle) + 1
    assert median(u.shared for u in last) <= median(u.shared for u in middle) + MIB


def usage(pid: int) -> Usage:
    """Of a process and all that it has started."""
    tree = list(_tree(pid))
    names = {
        process: [
            os.path.join(f"/proc/{process}/fd", name) for name in _entries(f"/proc/{process}/fd")
        ]
        for process in tree
    }
    shared = {
        status.st_ino: status.st_blocks * 512
        for paths in names.values()
        for status in _shared(paths)
    }
    descriptors = {process: len(paths) for process, paths in names.items()}
    return Usage({process: _rss(process) for process in tree}, descriptors, sum(shared.values()))


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
