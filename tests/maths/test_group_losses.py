"""Losses on whole groups against loops over pairs."""

import math

import pytest
import torch

from rllib_distrl.maths.group_losses import DPG_DIVERGENCES, copg, divergence_slope, fdpg
from tests.helpers import distrl_config

GROUP = torch.tensor([7, 3, 7, 3, 7, 5])
LENGTHS = torch.tensor([3, 1, 4, 2, 2, 3])
MASK = torch.arange(4) < LENGTHS.unsqueeze(1)
RETURNS = torch.tensor([1.0, 0.25, 0.0, -2.0, 0.5, 9.0], dtype=torch.float64)
BETA = 0.3


def logps(filler):
    generator = torch.Generator().manual_seed(4)
    logp, ref = -torch.rand(2, 6, 4, generator=generator, dtype=torch.float64)
    return torch.where(MASK, logp, filler).requires_grad_(), torch.where(MASK, ref, filler)


def others(i):
    return [j for j in range(6) if j != i and GROUP[j] == GROUP[i]]


def by_pairs(logp, ref):
    """Each row's loss and the gradient by its log-ratio, pair by pair."""
    x = torch.where(MASK, logp.detach() - ref, 0.0).sum(1)
    loss, gradient = torch.zeros(6).double(), torch.zeros(6).double()
    for i in range(6):
        for j in others(i):
            gap, reward_gap = x[i] - x[j], RETURNS[i] - RETURNS[j]
            loss[i] -= (reward_gap * gap - BETA / 2 * gap**2) / len(others(i))
            for row, sign in ((i, 1), (j, -1)):
                gradient[row] -= sign * (reward_gap - BETA * gap) / len(others(i)) / 6
    return loss, gradient


def test_copg_is_the_mean_over_the_pairs_of_a_group():
    logp, ref = logps(0.0)
    loss = copg(logp, ref, RETURNS, GROUP, beta=BETA, loss_mask=MASK)
    expected, gradient = by_pairs(logp, ref)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    assert loss[5] == 0  # alone in its group
    loss.mean().backward()
    torch.testing.assert_close(logp.grad, MASK * gradient.unsqueeze(1), rtol=1e-12, atol=1e-12)
    assert float(logp.grad.abs().max()) > 0.01


def test_the_optimum_of_copg_is_the_reward_gap_over_beta():
    logp, ref = logps(0.0)
    wanted = RETURNS / BETA
    logp = ref + MASK * (wanted / LENGTHS).unsqueeze(1)
    logp.requires_grad_()
    copg(logp, ref, RETURNS, GROUP, beta=BETA, loss_mask=MASK).mean().backward()
    assert float(logp.grad.abs().max()) < 1e-12


def test_padding_moves_nothing():
    clean, ref = logps(0.0)
    dirty, dirty_ref = logps(float("nan"))
    found = [
        copg(logp, other, RETURNS, GROUP, beta=BETA, loss_mask=MASK)
        for logp, other in ((clean, ref), (dirty, dirty_ref))
    ]
    assert torch.equal(*found)
    for loss in found:
        loss.mean().backward()
    assert torch.equal(clean.grad, torch.where(MASK, dirty.grad, 0.0))
    assert (dirty.grad[~MASK] == 0).all()


def test_groups_of_equal_returns_are_only_held_to_the_reference():
    logp, ref = logps(0.0)
    equal = torch.full_like(RETURNS, 0.1 + 0.2)
    loss = copg(logp, ref, equal, GROUP, beta=0.0, loss_mask=MASK)
    assert (loss == 0).all()


def generators(t):
    """f of D_f(π, p) = Σ p f(π/p)."""
    return {
        "reverse_kl": t * t.log(),
        "kl": -t.log(),
        "js": t * (2 * t / (1 + t)).log() + (2 / (1 + t)).log(),
        "tv": 0.5 * (t - 1).abs(),
        "chi_squared": 1 / t + t - 2,
        "reverse_chi_squared": (t - 1) ** 2,
    }


@pytest.mark.parametrize("divergence", DPG_DIVERGENCES)
def test_the_expected_gradient_of_fdpg_is_that_of_the_divergence(divergence):
    generator = torch.Generator().manual_seed(2)
    logits, target = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    pi, p = logits.softmax(0), target.softmax(0)
    (expected,) = torch.autograd.grad((p * generators(pi / p)[divergence]).sum(), logits)
    log_pi = logits.log_softmax(0)
    slope = divergence_slope((log_pi - p.log()).detach(), divergence)
    (found,) = torch.autograd.grad((pi.detach() * slope * log_pi).sum(), logits)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_fdpg_by_hand():
    logp = torch.tensor([[-1.0, -1.0], [-3.0, 7.0], [-0.5, -0.5]]).double().requires_grad_()
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    ref = torch.tensor([[-1.0, -1.0], [-2.0, math.nan], [-1.0, -1.0]]).double()
    returns, beta = torch.tensor([1.0, 0.0, 0.5]).double(), 0.5
    loss = fdpg(logp, ref, returns, torch.zeros(3).long(), divergence="kl", beta=beta,
                loss_mask=mask)  # fmt: skip
    weight = [math.exp(2.0), math.exp(1.0), math.exp(-1.0 + 1.0)]  # (π_ref/π) e^{R/β}
    ratio = [w / (sum(weight) / 3) for w in weight]  # p/π, which is −f'
    advantage = [ratio[i] - (sum(ratio) - ratio[i]) / 2 for i in range(3)]
    expected = [-a * total for a, total in zip(advantage, (-2.0, -3.0, -1.0), strict=True)]
    torch.testing.assert_close(loss, torch.tensor(expected).double())
    loss.sum().backward()
    gradient = -torch.tensor(advantage).double().unsqueeze(1) * mask
    torch.testing.assert_close(logp.grad, gradient)


@pytest.mark.parametrize("divergence", [name for name in DPG_DIVERGENCES if name != "tv"])
def test_fdpg_rests_at_its_target_and_where_there_is_nothing_to_compare(divergence):
    logp, ref = logps(0.0)
    wanted = ref + MASK * (RETURNS / BETA / LENGTHS).unsqueeze(1)
    wanted.requires_grad_()
    settings = {"divergence": divergence, "beta": BETA, "loss_mask": MASK}
    fdpg(wanted, ref, RETURNS, GROUP, **settings).sum().backward()
    assert float(wanted.grad.abs().max()) < 1e-9
    alone = fdpg(logp, ref, RETURNS, torch.arange(6), divergence=divergence, loss_mask=MASK)
    assert (alone == 0).all()


def test_fdpg_refuses_what_it_is_not_defined_for():
    around = {"advantage": {"name": "zero"}, "bonus_coeff": 0.0}
    for loss, more, words in (
        ({"divergence": "hellinger"}, {}, "divergence 'hellinger'; it must be one of"),
        ({"beta": 0.0}, {}, r"beta 0\.0; it must be above 0"),
        ({}, {"num_epochs": 2}, "one optimiser step per batch"),
    ):
        with pytest.raises(ValueError, match=words):
            distrl_config(policy_loss={"name": "fdpg", **loss}, **around, **more).validate()
