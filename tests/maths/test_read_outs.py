import math
from statistics import NormalDist

import pytest
import torch

from rllib_distrl.maths.group_advantages import (
    calibrated_edges,
    leave_one_out_posterior,
    logit_shift,
)
from rllib_distrl.maths.quantiles import READ_OUTS, best_of_k, check_read_out, read_out

THETA = torch.tensor([-1.0, 0.0, 2.0, 7.0], dtype=torch.float64)


def bernoulli(p, n=16):
    theta = torch.zeros(n, dtype=torch.float64)
    theta[n - round(p * n) :] = 1.0
    return theta


@pytest.mark.parametrize("p", [0.0, 0.125, 0.5, 0.8125, 1.0])
@pytest.mark.parametrize("alpha", [0.25, 0.3, 1.0])
def test_both_cvars_of_bernoulli_returns(p, alpha):
    lower = max(0.0, (p - 1 + alpha) / alpha)
    upper = min(1.0, p / alpha)
    assert read_out(bernoulli(p), "cvar", alpha).item() == pytest.approx(lower)
    assert read_out(bernoulli(p), "upper_cvar", alpha).item() == pytest.approx(upper)


def test_read_outs_by_hand():
    assert read_out(THETA).item() == 2.0
    assert read_out(THETA, "cvar", 0.5).item() == -0.5
    assert read_out(THETA, "upper_cvar", 0.5).item() == 4.5
    std = math.sqrt((9 + 4 + 0 + 25) / 4)
    assert read_out(THETA, "mean_dev", -2).item() == pytest.approx(2 - 2 * std)
    # cpw, c = .5: g(.25) = .5/(.5 + .8660)^2, g(.5) = .7071/2, g(.75) = .8660/1.8660
    g = [0.0, 0.5 / 1.3660254**2, 0.35355339, 0.8660254 / 1.3660254**2, 1.0]
    expected = sum(t * (b - a) for t, a, b in zip(THETA.tolist(), g, g[1:], strict=False))
    assert read_out(THETA, "cpw", 0.5).item() == pytest.approx(expected, rel=1e-6)
    normal = NormalDist()
    g = [0.0, *(normal.cdf(normal.inv_cdf(u) + 0.3) for u in (0.25, 0.5, 0.75)), 1.0]
    expected = sum(t * (b - a) for t, a, b in zip(THETA.tolist(), g, g[1:], strict=False))
    assert read_out(THETA, "wang", 0.3).item() == pytest.approx(expected, rel=1e-9)


def test_pass_at_k_by_hand():
    assert read_out(bernoulli(0.25), "pass_at_k", 3).item() == pytest.approx(1 - 0.75**3)
    assert read_out(torch.tensor([1.2, 1.4]), "pass_at_k", 2).item() == 1.0


def test_best_of_k_is_the_mean_of_the_maximum():
    # All ordered pairs of four equally likely atoms.
    values = THETA.tolist()
    expected = sum(max(a, b) for a in values for b in values) / 16
    assert best_of_k(THETA, 2).item() == pytest.approx(expected)
    assert best_of_k(bernoulli(0.25), 5).item() == pytest.approx(1 - 0.75**5)
    assert best_of_k(THETA, 1).item() == pytest.approx(2.0)
    assert best_of_k(THETA, 0).item() == 0.0


@pytest.mark.parametrize("name", READ_OUTS)
def test_a_certain_return_reads_as_itself(name):
    value = read_out(torch.full((2, 3, 5), 1.0, dtype=torch.float64), name)
    assert torch.allclose(value, torch.ones(2, 3, dtype=torch.float64))


def test_posterior_leaves_the_own_return_out():
    returns, group = torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([5, 5, 5, 9])
    posterior = leave_one_out_posterior(torch.full((4,), 0.4), returns, group)
    assert posterior.tolist() == pytest.approx([1.8 / 4, 2.8 / 4, 1.8 / 4, 0.4])


def test_calibration_of_bernoulli_returns_is_the_posterior():
    prior = torch.tensor([0.25, 0.5], dtype=torch.float64)
    posterior = torch.tensor([0.6, 0.1], dtype=torch.float64)
    shift = logit_shift(posterior, prior)
    theta = torch.stack([bernoulli(0.25), bernoulli(0.5)]).unsqueeze(1)
    edges = calibrated_edges(shift, 16)
    assert torch.allclose((theta[:, 0] * edges.diff()).sum(-1), posterior)
    # And the best of k - 1 at the calibrated edges is that of the posterior.
    best = best_of_k(theta[:, 0], 3, edges)
    assert torch.allclose(best, 1 - (1 - posterior) ** 3)


def test_no_shift_changes_nothing():
    edges = calibrated_edges(torch.zeros(2, dtype=torch.float64), 7)
    assert torch.allclose(edges, torch.linspace(0, 1, 8, dtype=torch.float64).expand(2, -1))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"name": "median"}, "read_out must be"),
        ({}, "read_out must be"),
        ({"name": "cvar", "alpha": 0.1}, "alpha"),
        ({"name": "cvar", "level": 0.0}, r"\(0, 1\]"),
        ({"name": "upper_cvar", "level": 1.1}, r"\(0, 1\]"),
        ({"name": "cpw", "level": -0.5}, r"\(0, 1\]"),
        ({"name": "pass_at_k", "level": 0}, "whole number"),
        ({"name": "best_of_k", "level": 2.5}, "whole number"),
        ({"name": "wang", "level": math.nan}, "finite"),
        ({"name": "wang", "level": "high"}, "finite"),
    ],
)
def test_refusals(spec, words):
    with pytest.raises(ValueError, match=words):
        check_read_out(spec)
