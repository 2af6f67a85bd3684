"""A stage in a file of the user's own works in a recipe, on every learner."""

import subprocess
import sys

import pytest

RECIPE = """
[run]
model = "builtin:countdown-tiny"
iterations = 1
[rollout]
prompts_per_iteration = 4
num_generations = 2
max_completion_tokens = 24
[eval]
problems = 2
n = 2
k = [1]
before = false
critic_prefixes = 0
token_problems = 0
[environment]
env = "distrl_envs:distrl/Countdown-v0"
[learners]
num_learners = 2
[training]
lr = 1e-3
shapers = [{ name = "my_shaper:halved", share = 0.5, log = "LOG" }]
"""
SHAPER = """
import os

def halved(batch, advantages, *, share: float, log: str):
    with open(log, "a") as file:
        print(os.getpid(), len(batch), share, file=file)
    return share * advantages
"""


@pytest.mark.slow
def test_a_stage_in_the_users_own_file_runs_on_two_remote_learners(tmp_path):
    log = tmp_path / "calls.txt"
    (tmp_path / "my_shaper.py").write_text(SHAPER)
    (tmp_path / "own.toml").write_text(RECIPE.replace("LOG", str(log)))
    # As the console script, whose path has not the working directory.
    command = [sys.executable, "-P", "-m", "rllib_distrl.cli", "train", "own.toml", "--out", "run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    calls = [line.split() for line in log.read_text().splitlines()]
    assert len({pid for pid, _, _ in calls}) == 2
    assert {(rows, share) for _, rows, share in calls} == {("4", "0.5")}
