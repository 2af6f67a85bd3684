"""Losses of shown completions, by hand."""

import math

import pytest
import torch

from rllib_distrl.maths.imitation import (
    few_right,
    shown_advantage,
    srft_sampled,
    srft_shown,
    supervised,
)

MASK = torch.tensor([[True, True], [True, False]])
NAN = float("nan")
ENTROPY = torch.tensor([[math.log(2), math.log(8)], [math.log(3), NAN]])  # e^H is 4, and 3


def leaf(*rows):
    return torch.tensor(rows).log().requires_grad_()


def test_the_gate_counts_right_completions_of_each_prompt():
    right = torch.tensor([True, False, True, False, False, True, False])
    group = torch.tensor([5, 9, 5, 9, 9, 2, 2])
    assert few_right(right, group, 0).tolist() == [False, True, False, True, True, False, False]
    assert few_right(right, group, 1).tolist() == [False, True, False, True, True, True, True]
    assert few_right(right, group, 2).all()


def test_supervised_is_minus_logp_and_padding_counts_nothing():
    logp = leaf([0.5, 0.25], [0.1, NAN])
    found = supervised(logp, loss_mask=MASK)
    found.sum().backward()
    assert found[0].tolist() == pytest.approx([math.log(2), math.log(4)])
    assert logp.grad.tolist() == [[-1, -1], [-1, 0]]


def test_srft_pulls_right_completions_by_e_to_the_entropy_and_pushes_wrong_ones():
    logp = leaf([0.5, 0.25], [0.1, NAN])
    right = torch.tensor([True, False])
    found = srft_sampled(logp, ENTROPY, right, positive_coeff=0.1, loss_mask=MASK)
    found.sum().backward()
    assert found[0].tolist() == pytest.approx([0.4 * math.log(2), 0.4 * math.log(4)])
    assert found[1].tolist() == pytest.approx([math.log(0.1), 0.0])
    torch.testing.assert_close(logp.grad, torch.tensor([[-0.4, -0.4], [1.0, 0.0]]))


def test_srft_imitates_by_e_to_minus_the_entropy_and_reinforces_what_was_shown():
    logp = leaf([0.5, 0.1], [0.3, NAN])
    advantages = torch.tensor([[0.8, 0.8], [0.0, NAN]])
    found = srft_shown(logp, ENTROPY, advantages, supervised_coeff=0.5, shaping=0.1, loss_mask=MASK)
    found.sum().backward()
    # .5/4 −ln π and .8 π/(π + .1); .5/3 and nothing.
    expected = [0.125 * math.log(2) - 0.8 * 0.5 / 0.6, 0.125 * math.log(10) - 0.8 * 0.5]
    assert found[0].tolist() == pytest.approx(expected)
    assert found[1].tolist() == pytest.approx([-math.log(0.3) / 6, 0.0])
    # d π/(π + s) / d ln π = π s/(π + s)².
    slope = [-0.125 - 0.8 * 0.05 / 0.36, -0.125 - 0.8 * 0.01 / 0.04]
    assert logp.grad[0].tolist() == pytest.approx(slope)
    assert logp.grad[1].tolist() == pytest.approx([-1 / 6, 0.0])


def test_what_was_shown_joins_its_group():
    returns = torch.tensor([1.0, 0.0, 0.0, 0.5])
    group = torch.tensor([3, 3, 3, 1])
    found = shown_advantage(returns, group, torch.tensor([1, 3]), 1.0)
    assert found.tolist() == pytest.approx([1 - 1.5 / 2, 1 - 2 / 4])
    assert shown_advantage(returns, group, torch.tensor([3]), 2.0).tolist() == [2 - 3 / 4]
