"""Shapers that remember how prompts have fared, by hand."""

import math

import pytest
import torch

from rllib_distrl.method.batch import PROMPTS_REMEMBERED, SequenceBatch, forget_oldest
from rllib_distrl.method.registry import resolve
from tests.helpers import distrl_config


def batch(passed, of=4, memory=None, prompts=None):
    """A group of ``of`` completions of two tokens for each number of passed ones."""
    rows = len(passed) * of
    returns = torch.tensor([float(i < c) for c in passed for i in range(of)]).double()
    prompts = range(len(passed)) if prompts is None else prompts
    return SequenceBatch(
        rewards=torch.stack([torch.zeros(rows).double(), returns], dim=1),
        loss_mask=torch.ones(rows, 2, dtype=torch.bool),
        action_logp=torch.zeros(rows, 2).double(),
        group=torch.arange(len(passed)).repeat_interleave(of),
        prompt=torch.tensor(list(prompts)).repeat_interleave(of),
        memory={} if memory is None else memory,
    )


def weights(name, data, of=4, **settings):
    found = resolve("shaper", {"name": name, **settings})(data, torch.ones(len(data), 2).double())
    assert torch.equal(found[:, 0], found[:, 1])
    assert torch.equal(found.view(-1, of, 2), found[::of].unsqueeze(1).expand(-1, of, 2))
    return found[::of, 0].tolist()


def test_curve_weights_are_density_over_distribution_of_recent_pass_rates():
    data = batch([0, 1, 1, 3, 4])
    # Rates 1/4 1/4 3/4: two thirds have come by 1/4, all by 3/4.
    assert weights("curve_weight", data) == pytest.approx([0.0, 1.0, 1.0, 1 / 3, 0.0])
    again = batch([3, 2], memory=data.memory)
    # 1/4 1/4 1/2 3/4 3/4 in the window: 2/5 of the mass at 3/4, 1/5 of 3/5 at 1/2.
    assert weights("curve_weight", again) == pytest.approx([2 / 5, 1 / 3])
    short = batch([3, 2], memory=again.memory)
    assert weights("curve_weight", short, window=1) == pytest.approx([1 / 2, 1.0])
    assert [len(rates) for rates in short.memory["curve_weight"]] == [2]


def test_a_batch_without_mixed_groups_has_no_curve():
    assert weights("curve_weight", batch([0, 4])) == [0.0, 0.0]


def test_pressure_grows_with_failures_and_is_felt_in_the_next_batch():
    settings = {"strength": 2.0, "decay": 0.5, "cap": 3.0}
    first = batch([0, 2, 4], prompts=[5, 6, 7])
    assert weights("bin_pressure", first, **settings) == [1.0, 1.0, 1.0]
    # Half of the shares of failures: 1 in the hardest bin, 1/2 in that of .4 to .6, 0 in the last.
    assert first.memory["bin_pressure"]["pressure"] == [0.5, 0, 0, 0.25, 0, 0, 0]
    second = batch([0, 2, 4], prompts=[15, 16, 17], memory=first.memory)
    expected = [math.exp(1.0), math.exp(0.5), 1.0]
    assert weights("bin_pressure", second, **settings) == pytest.approx(expected)
    third = batch([0, 2, 4], memory=second.memory)
    capped = [3.0, math.exp(0.75), 1.0]  # e^1.5 is above the cap
    assert weights("bin_pressure", third, **settings) == pytest.approx(capped)
    off = batch([0, 2, 4], memory=third.memory)
    assert weights("bin_pressure", off, strength=0.0) == [1.0, 1.0, 1.0]


def test_a_prompts_bin_is_that_of_its_mean_and_moves_only_when_it_is_clearly_left():
    memory = {}

    def bin_after(passed, of, **settings):
        weights("bin_pressure", batch([passed], of, memory, [3]), of, **settings)
        return memory["bin_pressure"]["prompts"][3]["bin"]

    assert bin_after(59, 100) == 3
    assert bin_after(64, 100) == 3  # mean .615: within .03 of the edge
    assert bin_after(70, 100) == 4  # mean .643
    assert bin_after(40, 100) == 4  # mean .5825
    assert bin_after(0, 100, history=1) == 0
    assert memory["bin_pressure"]["prompts"][3]["rates"] == [0.0]


def test_bins_are_of_any_of_k():
    data = batch([1], of=4)
    weights("bin_pressure", data, k=2)
    # One of four passes: 1 − C(3, 2)/C(4, 2) = 1/2.
    assert data.memory["bin_pressure"]["prompts"][0]["rates"] == pytest.approx([0.5])
    with pytest.raises(ValueError, match="k = 3, but a group has 2"):
        distrl_config(shapers=[{"name": "bin_pressure", "k": 3}]).validate()


def test_the_oldest_prompts_are_forgotten():
    table = dict.fromkeys(range(PROMPTS_REMEMBERED + 2))
    forget_oldest(table)
    assert len(table) == PROMPTS_REMEMBERED and next(iter(table)) == 2
    forget_oldest(small := {1: None})
    assert small == {1: None}
