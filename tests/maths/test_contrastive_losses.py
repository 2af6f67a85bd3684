import math

import pytest
import torch

from rllib_distrl.maths.group_losses import disco, pairwise_bt

MASK = torch.tensor([[True, True], [True, False], [True, True], [True, False], [True, True]])
OLD = torch.tensor([[-1.0, -2.0], [-0.5, 0.0], [-3.0, -1.0], [-2.0, 0.0], [-1.0, -1.0]]).double()
RETURNS = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0]).double()
GROUP = torch.tensor([7, 7, 7, 7, 2])
SCORES = [-1.5, -0.5, -2.0, -2.0]  # mean log π of the first group's rows


def mean(x):
    return sum(x) / len(x)


@pytest.mark.parametrize("filler", [0.0, float("nan"), 1e9])
def test_disco_by_hand(filler):
    logp = torch.where(MASK, OLD, filler).requires_grad_()
    found = disco(logp, torch.where(MASK, OLD, filler), RETURNS, GROUP, temperature=0.5,
                  loss_mask=MASK)  # fmt: skip
    bad = 0.5 * math.log(mean([math.exp(s / 0.5) for s in SCORES[2:]]))
    # Two good ones of four: each stands for 4/2 rows. The second group has one class alone.
    expected = [-2 * (s - bad) for s in SCORES[:2]] + [0, 0, 0]
    torch.testing.assert_close(found, torch.tensor(expected).double())
    found.sum().backward()
    # −2 per good row over its tokens; the bad ones share 4 by softmax, here a half each.
    by_hand = [[-1, -1], [-2, 0], [1, 1], [2, 0], [0, 0]]
    torch.testing.assert_close(logp.grad, torch.tensor(by_hand).double())


def test_without_a_temperature_it_is_the_difference_of_means():
    logp = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = disco(logp, logp, RETURNS, GROUP, temperature=None, loss_mask=MASK)
    s = (logp * MASK).sum(1) / MASK.sum(1)
    expected = -4 * (s[:2].mean() - s[2:4].mean())
    torch.testing.assert_close(plain[:4].sum(), expected)
    hot = disco(logp, logp, RETURNS, GROUP, temperature=1e7, loss_mask=MASK)
    torch.testing.assert_close(hot, plain, rtol=1e-5, atol=1e-6)


def test_a_large_length_temperature_is_disco_and_a_small_one_prefers_the_short():
    settings = {"temperature": 0.5, "loss_mask": MASK, "width": 4}
    plain = disco(OLD, OLD, RETURNS, GROUP, **settings)
    long = disco(OLD, OLD, RETURNS, GROUP, length_temperature=1e9, **settings)
    torch.testing.assert_close(long, plain)
    short = disco(OLD, OLD, RETURNS, GROUP, length_temperature=0.25, **settings)
    # Lengths 2 and 1 of 4: e^{(1 − 1/2)/λ} against e^{(1 − 1/4)/λ}, so 1 : e.
    weight = 1 / (1 + math.e)
    torch.testing.assert_close(short[0], plain[0] * 2 * weight)
    torch.testing.assert_close(short[1], plain[1] * 2 * (1 - weight))


def test_the_kl_holds_only_beyond_its_limit():
    moved = (OLD + 0.1 * MASK).requires_grad_()
    kl = math.exp(0.1) - 1 - 0.1
    free = disco(moved, OLD, RETURNS, GROUP, kl_limit=kl + 1e-9, loss_mask=MASK)
    held = disco(moved, OLD, RETURNS, GROUP, kl_coeff=10.0, kl_limit=0.0, loss_mask=MASK)
    torch.testing.assert_close(held - free, torch.full((5,), 10 * kl * kl).double())


def test_the_score_may_be_the_ratio():
    logp = (OLD + math.log(2.0) * MASK).requires_grad_()
    found = disco(logp, OLD, RETURNS, GROUP, score="ratio", kl_coeff=0.0, loss_mask=MASK)
    torch.testing.assert_close(found, torch.zeros(5).double())  # all ratios 2: nothing to tell
    with pytest.raises(ValueError, match="score must be one of"):
        disco(OLD, OLD, RETURNS, GROUP, score="logit", loss_mask=MASK)
    with pytest.raises(ValueError, match="temperatures must be above 0"):
        disco(OLD, OLD, RETURNS, GROUP, temperature=0.0, loss_mask=MASK)


def test_pairwise_by_hand():
    returns = torch.tensor([1.0, 0.5, 0.0, 0.0, 1.0]).double()
    x = [-3.0, -0.5, -4.0, -2.0]

    def loss(i, j):
        return math.log(1 + math.exp(-0.5 * (x[i] - x[j])))

    pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3)]
    found = pairwise_bt(OLD, returns, GROUP, alpha=0.5, loss_mask=MASK)
    assert found[:4].mean().item() == pytest.approx(mean([loss(*pair) for pair in pairs]))
    assert found[0].item() == pytest.approx(4 / 5 * sum(loss(0, j) for j in (1, 2, 3)))
    assert found[4] == 0
