"""Heads agree wherever more than one of them is exact."""

import math

import pytest
import torch

from rllib_distrl.maths.calibration import calibration_metrics
from rllib_distrl.maths.laws import Law, rank, read_out, uncertainty, utility
from rllib_distrl.method.critic import check_targets, head_stage, make_head
from tests.helpers import distrl_config

D = torch.float64
P = 5 / 16
GRADED = {"name": "categorical", "bins": 5, "low": 0.0, "high": 2.0}


def bernoulli_laws():
    """Bernoulli(5/16) by each head: 16 quantiles, a logit, and a grid of two atoms."""
    logit = math.log(P / (1 - P))
    two = {"name": "categorical", "bins": 2, "projection": "two_hot"}
    quantiles = torch.tensor([[0.0] * 11 + [1.0] * 5], dtype=D)
    return {
        "quantile": Law(quantiles),
        "bernoulli": head_stage({"head": "bernoulli"})().law(torch.tensor([[logit]], dtype=D)),
        "categorical": head_stage({"head": two})().law(torch.tensor([[0.0, logit]], dtype=D)),
    }


@pytest.mark.parametrize("name", ["quantile", "bernoulli", "categorical"])
def test_the_interface_is_exact_for_a_bernoulli_law(name):
    law = bernoulli_laws()[name]
    std = math.sqrt(P * (1 - P))

    def close(found, *expected):
        assert found.flatten().tolist() == pytest.approx(list(expected), abs=1e-12)

    close(law.mean, P)
    close(law.std, std)
    below = {False: [0.0, 1 - P, 1 - P, 1, 1], True: [0.0, 0.0, 1 - P, 1 - P, 1]}
    for strict, expected in below.items():
        for x, value in zip((-0.1, 0.0, 0.5, 1.0, 2.0), expected, strict=True):
            close(law.cdf(torch.tensor([x], dtype=D), strict=strict), value)
    u = torch.tensor([[0.1, 0.6874, 0.6876, 0.99]], dtype=D)
    close(law.inverse(u), 0, 0, 1, 1)
    close(law.sample(u), 0, 0, 1, 1)
    close(law.quantiles(16), *[0.0] * 11, *[1.0] * 5)
    close(law.quantiles(4), 0, 0, 0.25, 1)  # 1 - p = 2.75 quarters
    close(read_out(law), P)
    close(read_out(law, "cvar", 0.75), (P - 0.25) / 0.75)
    close(read_out(law, "upper_cvar", 0.5), P / 0.5)
    close(read_out(law, "mean_dev", 2.0), P + 2 * std)
    close(read_out(law, "best_of_k", 3), 1 - (1 - P) ** 3)
    close(read_out(law, "pass_at_k", 3), 1 - (1 - P) ** 3)
    close(uncertainty(law), math.sqrt(P / 2))
    close(uncertainty(law, "ltv"), P / 2)
    close(uncertainty(law, "std"), std)
    x = torch.tensor([[1.0, 0.0]], dtype=D)
    close(rank(x, law), 1 - P, -P)
    close(utility(x, law, 3), 3 * (1 - P) ** 2, 0)


def test_an_uneven_law_has_the_quantiles_of_its_steps():
    """Atoms 0, 1, 2 of .3, .5 and .2, read as 4 and as 10 quantiles, and beyond the median."""
    law = Law(torch.tensor([0.0, 1.0, 2.0], dtype=D), torch.tensor([0.3, 0.5, 0.2], dtype=D))
    assert law.quantiles(4).tolist() == pytest.approx([0.0, 0.8, 1.0, 1.8], abs=1e-12)
    assert law.quantiles(10).tolist() == pytest.approx([0.0] * 3 + [1.0] * 5 + [2.0] * 2, abs=1e-12)
    ten = Law(law.quantiles(10))
    for name in ("ltv", "ltv_sqrt", "std"):
        assert uncertainty(law, name).item() == pytest.approx(uncertainty(ten, name).item())
    for name in ("cvar", "upper_cvar", "wang", "cpw", "best_of_k"):
        assert read_out(law, name).item() == pytest.approx(read_out(ten, name).item(), abs=1e-9)


@pytest.mark.parametrize("name", ["quantile", "bernoulli", "categorical"])
def test_the_pit_is_uniform_for_the_true_law(name):
    """16 returns of one state, 5 of them 1."""
    law = bernoulli_laws()[name]
    law = Law(law.atoms.expand(16, 1, -1), law.weights.expand(16, 1, -1))
    returns = (torch.arange(16) < 5).to(D).unsqueeze(1)
    found = calibration_metrics(law, returns, torch.ones(16, 1, dtype=torch.bool))
    assert found["quantile_coverage_90"] == pytest.approx(0.9)
    assert found["quantile_coverage_50"] == pytest.approx(0.5)
    assert found["quantile_pit_ks"] == pytest.approx(0.0, abs=1e-9)
    assert found["quantile_bias"] == pytest.approx(0.0, abs=1e-12)
    # p (1 - p), the Brier score of a calibrated probability.
    assert found["quantile_crps"] == pytest.approx(P * (1 - P))
    # Of p = 4/16 in its place: F(0) is 1/16 above the share of zeros.
    wrong = Law(law.atoms[..., [0, -1]], law.atoms.new_tensor([0.75, 0.25]).expand(16, 1, 2))
    found = calibration_metrics(wrong, returns, torch.ones(16, 1, dtype=torch.bool))
    assert found["quantile_pit_ks"] == pytest.approx(1 / 16, abs=1e-9)


HEADS = {
    "quantile": ({"n_quantiles": 8, "quantile_huber_kappa": 0.01, "head_center": "mean"}, 0.03),
    "bernoulli": ({"head": "bernoulli"}, 1e-3),
    "gaussian": ({"head": "gaussian", "n_quantiles": 8}, 1e-3),
    "two_hot": ({"head": {**GRADED, "projection": "two_hot"}}, 1e-3),
    "hl_gauss": ({"head": GRADED}, 0.2),
}


@pytest.mark.parametrize("name", HEADS)
def test_each_head_learns_the_law_of_its_samples(name):
    """Free outputs, 8 returns: 3 of 1 and 5 of 0, or .5 and 2 where the head has more than two."""
    settings, tolerance = HEADS[name]
    head = head_stage({"init_spread": 0.1, **settings})()
    y = torch.tensor([1.0] * 3 + [0.0] * 5, dtype=D)
    if "categorical" in str(settings):
        y = torch.tensor([2.0] * 3 + [0.5] * 5, dtype=D)
    targets, mask = y.view(1, 1, 8), torch.ones(1, 1, dtype=torch.bool)
    outputs = head.start(0.5).to(D).view(1, 1, -1).clone().requires_grad_()
    optimizer = torch.optim.LBFGS([outputs], lr=0.5, max_iter=400, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = head.loss(outputs, targets, mask).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    law = head.law(outputs.detach())
    assert law.mean.item() == pytest.approx(float(y.mean()), abs=tolerance)
    assert law.std.item() == pytest.approx(float(y.std(correction=0)), abs=tolerance)
    if name not in ("hl_gauss", "gaussian"):
        assert torch.allclose(law.quantiles(8).flatten(), y.sort().values, atol=0.05)


def test_a_gaussian_head_is_a_mean_and_a_deviation():
    head = head_stage({"head": "gaussian", "n_quantiles": 4, "init_spread": 0.5})()
    law = head.law(head.start(2.0).to(D))
    assert law.mean.item() == pytest.approx(2.0) and law.std.item() == pytest.approx(0.5)
    # Φ⁻¹ of 1/8, 3/8, 5/8, 7/8, their root mean square being .84447.
    inner, outer = 0.318639, 1.150349
    root = math.sqrt((inner**2 + outer**2) / 2)
    expected = [2 + 0.5 * z / root for z in (-outer, -inner, inner, outer)]
    assert law.atoms.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("spec", ["bernoulli", GRADED, "gaussian"])
def test_a_head_starts_at_the_value_asked_for(spec):
    head = head_stage({"head": spec})()
    assert head.law(head.start(0.3)).mean.item() == pytest.approx(0.3, abs=1e-5)


def test_a_grid_without_ends_lies_over_the_data_and_counts_what_is_beyond_as_its_end():
    head = head_stage({"head": {"name": "categorical", "bins": 5, "projection": "two_hot"}})()
    head.fit(-1.0, 3.0)
    assert head.support == (-1.0, 0.0, 1.0, 2.0, 3.0)
    mask, outputs = torch.tensor([[True, False]]), torch.zeros(1, 2, 5)
    beyond = torch.tensor([[[3.0, 7.5], [9.0, 9.0]]])
    assert check_targets(head, beyond, mask).tolist() == [[[False, True], [False, False]]]
    at_the_end = torch.tensor([[[3.0, 3.0], [9.0, 9.0]]])
    assert torch.equal(head.loss(outputs, beyond, mask), head.loss(outputs, at_the_end, mask))


@pytest.mark.parametrize(
    ("ends", "seen", "expected"),
    [
        ({}, (2.0, 2.0), (1.0, 3.0)),
        ({"low": 0.0}, (-5.0, 4.0), (0.0, 4.0)),
        ({"low": 0.0}, (0.0, 0.0), (0.0, 1.0)),
        ({"high": 2.0}, (2.0, 9.0), (1.0, 2.0)),
    ],
)
def test_ends_that_are_given_stay(ends, seen, expected):
    head = head_stage({"head": {"name": "categorical", "bins": 3, **ends}})()
    head.fit(*seen)
    assert (head.support[0], head.support[-1]) == expected


def test_targets_beyond_the_atoms_are_refused_and_padding_is_not():
    head = head_stage({"head": GRADED})()
    mask = torch.tensor([[True, False]])
    check_targets(head, torch.tensor([[[2.0], [9.0]]]), mask)
    with pytest.raises(ValueError, match=r"in \[0, 2\], and is to learn 2.5.*low and high"):
        check_targets(head, torch.tensor([[[2.5], [0.0]]]), mask)


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ({"head": "normal"}, "unknown head 'normal'; known: bernoulli, categorical, gaussian, qu"),
        ({"head": "gaussian", "n_quantiles": 1, "bonus_coeff": 0.0}, "cannot show. Set n_quant"),
        ({"head": {"name": "categorical", "bins": 1}}, "bins is 1; it must be .*>= 2"),
        ({"head": {"name": "categorical", "low": 1.0, "high": 1.0}}, "low < high; got 1.0 and 1.0"),
        ({"head": {"name": "categorical", "projection": "c51"}}, "one of hl_gauss, two_hot"),
        ({"head": {"name": "categorical", "projection": "two_hot", "sigma": 2.0}},
         "sigma = 2.0, which its other settings"),
        ({"head": {"name": "quantile", "n_quantiles": 8}}, "a setting of .training.. Set it there"),
        ({"head": "bernoulli", "quantile_huber_kappa": 0.5}, "kappa is 0.5, but nothing"),
        ({"head": "bernoulli", "head_center": "median"}, "head_center is 'median', but nothing"),
        ({"head": "bernoulli", "init_value": 2.0}, r"init_value is 2.0.*\[0, 1\]"),
        ({"head": "bernoulli", "critic": "none", "advantage": {"name": "grpo"},
          "bonus_coeff": 0.0}, "head is 'bernoulli', but nothing"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(training, words):
    with pytest.raises(ValueError, match=words):
        distrl_config(generations=2, **training).validate()


def test_of_twins_the_whole_law_of_the_smaller_mean_counts():
    twin = make_head({"critic": "twin", "head": "quantile", "n_quantiles": 2})
    assert twin.n_outputs == 4
    gap = math.log(math.expm1(1.0))  # softplus⁻¹(1)
    narrow = math.log(math.expm1(0.2))
    # {0, 1} beside {.3, .5}, {0, 1} beside {.6, .8}, and twice the same mean.
    outputs = torch.tensor(
        [[0.5, gap, 0.4, narrow], [0.5, gap, 0.7, narrow], [0.5, gap, 0.5, narrow]], dtype=D
    )
    expected = torch.tensor([[0.3, 0.5], [0.0, 1.0], [0.0, 1.0]], dtype=D)
    torch.testing.assert_close(twin.law(outputs).atoms, expected)
    assert twin.law(twin.start(0.25).to(D)).mean.item() == pytest.approx(0.25)


def test_both_twins_learn_the_same_targets_and_fixed_atoms_stay():
    twin = make_head({"critic": "twin", "head": "bernoulli"})
    outputs = torch.tensor([[[math.log(3), 0.0], [-math.log(3), 0.0]]], dtype=D, requires_grad=True)
    assert twin.law(outputs).mean.tolist() == [[pytest.approx(0.5), pytest.approx(0.25)]]
    assert twin.support == (0.0, 1.0)
    targets, mask = torch.tensor([[[1.0], [1.0]]], dtype=D), torch.tensor([[True, False]])
    loss = twin.loss(outputs, targets, mask)
    assert loss.tolist() == [[pytest.approx(-math.log(0.75) - math.log(0.5)), 0.0]]
    (gradient,) = torch.autograd.grad(loss.sum(), outputs)
    assert gradient.flatten().tolist() == pytest.approx([-0.25, -0.5, 0.0, 0.0])  # p − y
