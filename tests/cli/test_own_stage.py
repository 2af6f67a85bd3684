"""Stages of every kind in a file of the user's own work in a recipe, on every learner."""

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
head = "my_stages:Head"
target = "my_stages:target"
bonus_stat = { name = "my_stages:bonus_stat", scale = 2.0 }
aggregation = "my_stages:aggregation"
importance_correction = "my_stages:importance_correction"
read_out = { name = "my_stages:read_out" }
reward_transforms = [{ name = "my_stages:reward", scale = 2.0 }]
advantage = { name = "my_stages:advantage" }
shapers = [{ name = "my_stages:shaper", share = 0.5 }]
policy_loss = { name = "my_stages:policy_loss" }
regularisers = [{ name = "my_stages:regulariser" }]
controllers = [{ name = "my_stages:Controller" }]
prompt_sampler = { name = "my_stages:Sampler" }
"""
STAGES = """
import os

from rllib_distrl.method.critic import Quantile
from rllib_distrl.method.loss_terms import AdaptiveEntropy
from rllib_distrl.method.prompt_samplers import WithoutReplacement
from rllib_distrl.method.registry import register


def seen(kind, *facts):
    with open("LOG", "a") as file:
        print(kind, os.getpid(), *facts, file=file)


def prepare(batch, *, scale: float):
    batch.extras["mine"] = scale * batch.rewards
    seen("prepare", len(batch), scale)


@register("reward", "mine", prepare=prepare)
def reward(batch, *, scale: float):
    seen("reward", len(batch), scale)
    return batch.column("mine")


@register("advantage", "mine", needs=("values",))
def advantage(batch):
    seen("advantage", len(batch))
    return batch.at_tokens(batch.returns) - batch.values


def shaper(batch, advantages, *, share: float):
    seen("shaper", len(batch), share)
    return share * advantages


def target(batch):
    seen("target", len(batch))
    return batch.at_tokens(batch.returns).unsqueeze(-1)


def read_out(law):
    seen("read_out", len(law.atoms))
    return law.mean


def prepare_statistic(batch, *, scale: float):
    seen("prepare_bonus_stat", len(batch), scale)


@register("bonus_statistic", "mine", needs=("quantiles",), prepare=prepare_statistic)
def bonus_stat(batch, *, scale: float):
    seen("bonus_stat", len(batch), scale)
    return scale * batch.column("quantiles").std(-1)


def aggregation(batch):
    seen("aggregation", len(batch))
    return batch.loss_mask / batch.all_reduce(batch.loss_mask.sum())


def importance_correction(logp, batch):
    seen("importance_correction", len(batch))
    return batch.loss_mask.float()


def policy_loss(logp, batch):
    seen("policy_loss", len(batch))
    return -(logp - batch.action_logp).exp() * batch.advantages


def regulariser(logp, batch):
    seen("regulariser", len(batch))
    return 0.1 * logp.square()


class Head(Quantile):
    def loss(self, outputs, targets, loss_mask):
        seen("head", len(targets))
        return super().loss(outputs, targets, loss_mask)


class Controller(AdaptiveEntropy):
    def update(self, entropy):
        seen("controller")
        return super().update(entropy)


class Sampler(WithoutReplacement):
    def next(self, n):
        seen("prompt_sampler", n)
        return super().next(n)
"""
ON_LEARNERS = {
    "reward", "prepare", "advantage", "shaper", "target", "read_out", "bonus_stat",
    "prepare_bonus_stat", "aggregation", "importance_correction", "policy_loss", "regulariser",
    "controller", "head",
}  # fmt: skip


@pytest.mark.slow
def test_stages_in_the_users_own_file_run_on_two_remote_learners(tmp_path):
    log = tmp_path / "calls.txt"
    (tmp_path / "my_stages.py").write_text(STAGES.replace("LOG", str(log)))
    (tmp_path / "own.toml").write_text(RECIPE)
    # As the console script, whose path has not the working directory.
    command = [sys.executable, "-P", "-m", "rllib_distrl.cli", "train", "own.toml", "--out", "run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    calls = [line.split() for line in log.read_text().splitlines()]
    kinds = {kind for kind, *_ in calls}
    assert kinds == ON_LEARNERS | {"prompt_sampler"}
    for kind in ON_LEARNERS:
        assert len({pid for name, pid, *_ in calls if name == kind}) == 2, kind
    facts = {kind: {tuple(rest) for name, _, *rest in calls if name == kind} for kind in kinds}
    assert facts["shaper"] == {("4", "0.5")}
    assert facts["reward"] == facts["prepare"] == {("4", "2.0")}
