import math

import pytest
import torch

from rllib_distrl.maths.heads import (
    bernoulli_loss,
    categorical_loss,
    gaussian_loss,
    hl_gauss,
    tilted_logits,
    two_hot,
)

D = torch.float64
MASK = torch.tensor([[True, True, False]])
GRID = torch.linspace(-1, 1, 5, dtype=D)


def targets(*rows, filler=math.nan):
    """(1, 3, M), the third token padding."""
    m = len(rows[0])
    return torch.tensor([[*rows, [filler] * m]], dtype=D)


def test_bernoulli_cross_entropy_by_hand():
    # p = 3/4, y = 1 and 0; p = 1/2, y = 1 and 1.
    logits = torch.tensor([[math.log(3.0), 0.0, math.nan]], dtype=D, requires_grad=True)
    found = bernoulli_loss(logits, targets([1.0, 0.0], [1.0, 1.0]), MASK)
    expected = [-0.5 * math.log(0.75) - 0.5 * math.log(0.25), math.log(2.0), 0.0]
    assert found[0].tolist() == pytest.approx(expected, abs=1e-12)
    found.sum().backward()
    # p - y.
    assert logits.grad is not None
    assert logits.grad[0].tolist() == pytest.approx([0.25, -0.5, 0.0], abs=1e-12)


def test_bernoulli_is_finite_where_it_is_sure_and_wrong():
    logits = torch.tensor([[100.0, -100.0, 0.0]], requires_grad=True)
    found = bernoulli_loss(logits, targets([0.0], [1.0]).float(), MASK)
    found.sum().backward()
    assert found[0].tolist() == [100.0, 100.0, 0.0]
    assert logits.grad is not None and logits.grad[0].tolist() == [1.0, -1.0, 0.0]


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_gaussian_likelihood_by_hand(beta):
    # y = 1 and -1 of N(0, 1); y = 2 and 4 of N(1, 4): squared errors of 1 and of (1 + 9)/2.
    mean = torch.tensor([[0.0, 1.0, math.nan]], dtype=D, requires_grad=True)
    log_std = torch.tensor([[0.0, math.log(2.0), math.nan]], dtype=D, requires_grad=True)
    found = gaussian_loss(mean, log_std, targets([1.0, -1.0], [2.0, 4.0]), MASK, beta)
    by_std = 2.0 ** (2 * beta)
    assert found[0].tolist() == pytest.approx([0.5, by_std * (math.log(2) + 5 / 8), 0.0])
    found.sum().backward()
    assert mean.grad is not None and log_std.grad is not None
    # σ^(2β) (μ - ȳ)/σ², and σ^(2β) (1 - mean squared error/σ²).
    assert mean.grad[0].tolist() == pytest.approx([0.0, by_std * (1 - 3) / 4, 0.0])
    assert log_std.grad[0].tolist() == pytest.approx([0.0, by_std * (1 - 5 / 4), 0.0])


def test_two_hot_by_hand():
    found = two_hot(torch.tensor([-1.0, 0.125, 1.0, 0.5], dtype=D), GRID)
    expected = [[1, 0, 0, 0, 0], [0, 0, 0.75, 0.25, 0], [0, 0, 0, 0, 1], [0, 0, 0, 1, 0]]
    assert torch.allclose(found, torch.tensor(expected, dtype=D), atol=1e-12)


def phi(x):
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def test_hl_gauss_by_hand():
    # Bins of width .5 around the atoms; sigma is .75 of that: .375.
    y = 0.1
    mass = [phi((z + 0.25 - y) / 0.375) - phi((z - 0.25 - y) / 0.375) for z in GRID.tolist()]
    expected = [each / sum(mass) for each in mass]
    found = hl_gauss(torch.tensor([y], dtype=D), GRID, 0.75)
    assert found[0].tolist() == pytest.approx(expected, abs=1e-12)
    # Far from both ends the mean stays; at an end it moves inwards by a third of a step.
    wide = torch.linspace(0, 1, 51, dtype=D)
    found = hl_gauss(torch.tensor([0.43, 0.0], dtype=D), wide) @ wide
    assert found[0].item() == pytest.approx(0.43, abs=1e-4)
    assert 0.3 * 0.02 < found[1].item() < 0.4 * 0.02


@pytest.mark.parametrize("projection", ["two_hot", "hl_gauss"])
def test_categorical_loss_is_the_cross_entropy_to_the_mean_target(projection):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 3, 5, generator=g, dtype=D)
    logits[0, 2] = math.nan
    logits.requires_grad_()
    y = targets([-0.3, 0.9], [0.5, 0.5])
    found = categorical_loss(logits, y, GRID, MASK, projection, 0.6)
    project = two_hot if projection == "two_hot" else lambda x, z: hl_gauss(x, z, 0.6)
    for t in range(2):
        mass = sum(project(y[0, t, j : j + 1], GRID)[0] for j in range(2)) / 2
        p = logits[0, t].detach().exp() / logits[0, t].detach().exp().sum()
        assert found[0, t].item() == pytest.approx(-float((mass * p.log()).sum()), abs=1e-12)
        (gradient,) = torch.autograd.grad(found[0, t], logits, retain_graph=True)
        assert torch.allclose(gradient[0, t], p - mass, atol=1e-12)
        assert (gradient[0, 2] == 0).all()
    assert found[0, 2] == 0


def test_an_unknown_projection_is_refused():
    with pytest.raises(ValueError, match="projection must be one of"):
        categorical_loss(torch.zeros(1, 3, 5), targets([0.0], [0.0]).float(), GRID, MASK, "c51")


@pytest.mark.parametrize("mean", [-0.9, -0.2, 0.0, 0.55])
def test_a_start_has_the_mean_asked_for(mean):
    p = tilted_logits(GRID, mean).softmax(0)
    assert float(p @ GRID) == pytest.approx(mean, abs=1e-9)
    # Of most entropy: ln p is straight in z.
    assert torch.allclose(p.log().diff(n=2), torch.zeros(3, dtype=D), atol=1e-9)


def test_a_start_at_an_end_still_learns():
    p = tilted_logits(GRID, 1.0).softmax(0)
    assert float(p @ GRID) == pytest.approx(0.98, abs=1e-9)
