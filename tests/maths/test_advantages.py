import math

import numpy as np
import pytest
import torch

from rllib_distrl.maths.advantages import (
    discounted_sum,
    gae,
    length_gae,
    returns_to_go,
    whiten,
)
from tests.maths.several_learners import on_learners

MASK = torch.tensor([[True] * 6, [True] * 2 + [False] * 4, [True] * 5 + [False]])


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    return values, torch.randn(3, 6, generator=generator, dtype=torch.float64)


def test_gae_by_hand():
    values, rewards = torch.tensor([[0.5, 0.2]]), torch.tensor([[0.0, 1.0]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    # delta_2 = 1 - .2 = .8; delta_1 = .9 * .2 - .5 = -.32; A_1 = -.32 + .9 * .5 * .8
    assert gae(values, rewards, mask, 0.9, 0.5)[0].tolist() == pytest.approx([0.04, 0.8])


def test_gae_equals_rllibs():
    value_predictions = pytest.importorskip("ray.rllib.utils.postprocessing.value_predictions")
    values, rewards = batch()
    ours = gae(values, rewards, MASK, 0.95, 0.9)
    for b, length in enumerate(MASK.sum(1).tolist()):
        ends = np.zeros(length)
        ends[-1] = 1.0
        targets = value_predictions.compute_value_targets(
            values=values[b, :length].numpy(),
            rewards=rewards[b, :length].numpy(),
            terminateds=ends,
            truncateds=np.zeros(length),
            gamma=0.95,
            lambda_=0.9,
        )
        expected = targets - values[b, :length].numpy()
        assert ours[b, :length].numpy() == pytest.approx(expected, abs=1e-6)


def test_the_lambda_of_each_length_is_its_own():
    values, rewards = batch()
    found = length_gae(values, rewards, MASK, alpha=0.4)
    # Six tokens: 1 - 1/2.4; two: below 0, hence 0; five: 1 - 1/2.
    for row, lambda_ in enumerate([1 - 1 / 2.4, 0.0, 0.5]):
        alone = slice(row, row + 1)
        expected = gae(values[alone], rewards[alone], MASK[alone], 1.0, lambda_)
        assert torch.allclose(found[alone], expected, atol=1e-12)


@pytest.mark.parametrize(("gamma", "lambda_"), [(1.0, 1.0), (0.9, 1.0)])
def test_lambda_one_is_the_return_minus_the_value(gamma, lambda_):
    values, rewards = batch()
    expected = torch.where(MASK, returns_to_go(rewards, MASK, gamma) - values, 0.0)
    assert torch.allclose(gae(values, rewards, MASK, gamma, lambda_), expected)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.99, 1.0])
@pytest.mark.parametrize("length", [1, 2, 7, 33])
def test_discounted_sum_equals_the_loop(decay, length):
    terms = torch.randn(2, length, 3, dtype=torch.float64)
    running, expected = torch.zeros(2, 3, dtype=torch.float64), torch.zeros_like(terms)
    for t in reversed(range(length)):
        running = terms[:, t] + decay * running
        expected[:, t] = running
    assert torch.allclose(discounted_sum(terms, decay), expected)


def test_padding_moves_nothing():
    values, rewards = batch()
    for filler in (math.nan, 1e9):
        dirty_v = torch.where(MASK, values, filler)
        dirty_r = torch.where(MASK, rewards, filler)
        clean = gae(values, rewards, MASK, 0.9, 0.8)
        dirty = gae(dirty_v, dirty_r, MASK, 0.9, 0.8)
        assert torch.equal(clean, dirty)
        assert (dirty[~MASK] == 0).all()
        assert torch.equal(whiten(torch.where(MASK, clean, filler), MASK), whiten(clean, MASK))


def test_whitening_is_rllibs_formula():
    advantages = batch()[0]
    flat = advantages[MASK].numpy()
    expected = (flat - flat.mean()) / max(1e-4, flat.std())
    assert whiten(advantages, MASK)[MASK].numpy() == pytest.approx(expected, rel=1e-9)


def test_whitening_of_equal_advantages_divides_by_the_floor():
    advantages = torch.full((1, 4), 3.0, dtype=torch.float64)
    advantages[0, 0] += 1e-6
    out = whiten(advantages, torch.ones(1, 4, dtype=torch.bool))
    assert out[0, 0].item() == pytest.approx(0.75e-6 / 1e-4, rel=1e-6)


def test_whitening_over_two_learners_equals_one_on_the_union():
    advantages = batch()[0]
    whole = whiten(advantages, MASK)
    parts = [slice(0, 1), slice(1, 3)]
    results = on_learners(
        2, lambda rank, reduce: whiten(advantages[parts[rank]], MASK[parts[rank]], reduce)
    )
    assert torch.allclose(torch.cat(results), whole)
