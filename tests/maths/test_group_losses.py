"""Losses on whole groups against loops over pairs."""

import torch

from rllib_distrl.maths.group_losses import copg

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
