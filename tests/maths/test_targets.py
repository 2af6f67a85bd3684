import math

import numpy as np
import pytest
import torch

from rllib_distrl.maths.advantages import (
    TARGETS,
    comonotone,
    expected_value,
    gae,
    mixture,
    monte_carlo,
    returns_to_go,
    sample_replacement,
)
from tests.maths.tabular_walk import success_probability, trained_law, trained_values

LENGTHS = (5, 1, 3)


def ragged(n=4, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    quantiles = torch.randn(3, 5, n, dtype=dtype, generator=generator).sort(-1).values
    rewards = torch.randn(3, 5, dtype=dtype, generator=generator)
    mask = torch.arange(5) < torch.tensor(LENGTHS).unsqueeze(1)
    return quantiles, rewards, mask


def test_comonotone_by_hand():
    # Two tokens, reward 1 at the end, gamma .5, lambda .5: A_2 = 1 - theta(s_2);
    # A_1 = .5 theta(s_2) - theta(s_1) + .25 A_2.
    quantiles = torch.tensor([[[0.0, 0.4], [0.2, 0.8]]])
    rewards = torch.tensor([[0.0, 1.0]])
    y = comonotone(quantiles, rewards, torch.ones(1, 2, dtype=torch.bool), gamma=0.5, lambda_=0.5)
    assert y[0, 1].tolist() == pytest.approx([1.0, 1.0])
    assert y[0, 0].tolist() == pytest.approx([0.5 * 0.2 + 0.25 * 0.8, 0.5 * 0.8 + 0.25 * 0.2])


def test_comonotone_equals_the_loop():
    quantiles, rewards, mask = ragged()
    y = comonotone(quantiles, rewards, mask, gamma=0.9, lambda_=0.7)
    for b, length in enumerate(LENGTHS):
        for i in range(4):
            running = 0.0
            for t in reversed(range(length)):
                after = quantiles[b, t + 1, i].item() if t + 1 < length else 0.0
                here = quantiles[b, t, i].item()
                running = rewards[b, t].item() + 0.9 * after - here + 0.9 * 0.7 * running
                assert y[b, t, i].item() == pytest.approx(here + running, rel=1e-9)


def test_mean_of_comonotone_advantages_is_gae_of_the_mean():
    quantiles, rewards, mask = ragged()
    y = comonotone(quantiles, rewards, mask, gamma=0.97, lambda_=0.8)
    mean_advantage = torch.where(mask, (y - quantiles).mean(-1), 0.0)
    assert torch.allclose(mean_advantage, gae(quantiles.mean(-1), rewards, mask, 0.97, 0.8))


@pytest.mark.parametrize("name", ["comonotone", "mixture", "mixture_mean", "monte_carlo"])
def test_lambda_one_is_the_observed_return(name):
    quantiles, rewards, mask = ragged()
    y = TARGETS[name](quantiles, rewards, mask, gamma=0.9, lambda_=1.0)
    observed = returns_to_go(rewards, mask, 0.9).unsqueeze(-1)
    assert torch.allclose(y, observed.expand_as(y), atol=1e-12)


@pytest.mark.parametrize("name", ["comonotone", "mixture", "mixture_mean", "sample_replacement"])
def test_below_lambda_one_a_target_is_not_the_return(name):
    quantiles, rewards, mask = ragged()
    generator = torch.Generator().manual_seed(0)
    y = TARGETS[name](quantiles, rewards, mask, gamma=1.0, lambda_=0.5, generator=generator)
    observed = returns_to_go(rewards, mask, 1.0).unsqueeze(-1)
    assert ((y - observed)[0, :4].abs() > 0.01).any()
    # At a row's last token there is nothing to bootstrap from.
    for b, length in enumerate(LENGTHS):
        assert torch.allclose(y[b, length - 1], observed[b, length - 1])


@pytest.mark.parametrize("name", list(TARGETS))
@pytest.mark.parametrize("filler", [math.nan, 1e9])
def test_padding_moves_nothing(name, filler):
    quantiles, rewards, mask = ragged()
    dirty = torch.where(mask[..., None], quantiles, filler), torch.where(mask, rewards, filler)
    results = []
    for q, r in ((quantiles, rewards), dirty):
        generator = torch.Generator().manual_seed(4)
        results.append(TARGETS[name](q, r, mask, gamma=0.9, lambda_=0.6, generator=generator))
    assert torch.equal(*results)
    assert (results[0][~mask] == 0).all()


def weighted_mixture(law, theta, lambda_):
    atoms = [(z, lambda_ / len(law)) for z in law]
    atoms += [(z, (1 - lambda_) / len(theta)) for z in theta]
    return sorted(atoms)


def midpoint_loop(atoms, n):
    found = []
    for i in range(n):
        cumulated = 0.0
        for value, weight in atoms:
            cumulated += weight
            if cumulated >= (i + 0.5) / n:
                found.append(value)
                break
    return found


def bin_mean_loop(atoms, n, cells=2000):
    grid = [(c + 0.5) / (n * cells) for c in range(n * cells)]
    values, weights = np.array([a for a, _ in atoms]), np.cumsum([w for _, w in atoms])
    picks = values[np.minimum(np.searchsorted(weights, grid), len(values) - 1)]
    return picks.reshape(n, cells).mean(1).tolist()


@pytest.mark.parametrize(
    ("projection", "loop", "tolerance"),
    [("midpoint", midpoint_loop, 1e-9), ("bin_mean", bin_mean_loop, 5e-3)],
)
def test_mixture_equals_the_loop(projection, loop, tolerance):
    quantiles, rewards, mask = ragged()
    y = mixture(quantiles, rewards, mask, gamma=0.9, lambda_=0.63, projection=projection)
    for b, length in enumerate(LENGTHS):
        law = [rewards[b, length - 1].item()] * 4
        for t in reversed(range(length - 1)):
            atoms = weighted_mixture(law, quantiles[b, t + 1].tolist(), 0.63)
            law = [rewards[b, t].item() + 0.9 * z for z in loop(atoms, 4)]
            assert y[b, t].tolist() == pytest.approx(law, abs=tolerance)
            law = y[b, t].tolist()


def test_mean_keeping_mixture_has_the_mean_of_gae():
    quantiles, rewards, mask = ragged()
    y = mixture(quantiles, rewards, mask, gamma=0.9, lambda_=0.63, projection="bin_mean")
    expected = quantiles.mean(-1) + gae(quantiles.mean(-1), rewards, mask, 0.9, 0.63)
    assert torch.allclose(y.mean(-1)[mask], expected[mask])


def test_midpoint_mixture_ignores_the_critic_close_to_lambda_one():
    # 1 - lambda = .03 < 1 / (2 * 16): what is below half an atom's weight is dropped for good.
    quantiles = torch.full((1, 40, 16), 0.5, dtype=torch.float64)
    rewards = torch.zeros(1, 40, dtype=torch.float64)
    rewards[0, -1] = 1.0
    mask = torch.ones(1, 40, dtype=torch.bool)
    stuck = mixture(quantiles, rewards, mask, lambda_=0.97)
    kept = mixture(quantiles, rewards, mask, lambda_=0.97, projection="bin_mean")
    assert stuck[0, 0].mean().item() == pytest.approx(1.0)
    assert kept[0, 0].mean().item() == pytest.approx(0.5 + 0.5 * 0.97**39, rel=1e-6)


def test_sample_replacement_follows_its_uniforms():
    quantiles = torch.tensor([[[0.0, 10.0], [1.0, 2.0], [3.0, 4.0]]])
    rewards = torch.tensor([[0.5, 0.0, 7.0]])
    uniforms = torch.zeros(2, 1, 3, 2)
    uniforms[0, 0, 0] = torch.tensor([0.95, 0.1])  # particle 1 replaced at the first token
    uniforms[1, 0, 0] = torch.tensor([0.6, 0.0])  # by the upper of (1, 2)
    uniforms[0, 0, 2] = 0.99  # nothing to replace by at the end
    y = sample_replacement(
        quantiles, rewards, torch.ones(1, 3, dtype=torch.bool),
        gamma=0.5, lambda_=0.9, particles=2, uniforms=uniforms,
    )  # fmt: skip
    assert y[0, 2].tolist() == [7.0, 7.0]
    assert y[0, 1].tolist() == [3.5, 3.5]
    assert y[0, 0].tolist() == [0.5 + 0.5 * 2.0, 0.5 + 0.5 * 3.5]


def test_sample_replacement_draws_where_its_generator_lives():
    # A generator on the CPU serves quantiles on another device ("meta" stands for a GPU).
    quantiles, rewards, mask = (tensor.to("meta") for tensor in ragged())
    y = sample_replacement(quantiles, rewards, mask, generator=torch.Generator().manual_seed(0))
    assert y.shape == (3, 5, 8)
    assert y.device.type == "meta"


def test_sample_replacement_has_the_mixtures_mean():
    quantiles, rewards, mask = ragged()
    generator = torch.Generator().manual_seed(5)
    y = sample_replacement(
        quantiles, rewards, mask, gamma=0.9, lambda_=0.7, generator=generator, particles=40_000
    )
    expected = quantiles.mean(-1) + gae(quantiles.mean(-1), rewards, mask, 0.9, 0.7)
    assert torch.allclose(y.mean(-1)[mask], expected[mask], atol=0.03)


def test_targets_carry_no_gradient():
    quantiles, rewards, mask = ragged()
    for target in TARGETS.values():
        assert not target(quantiles.requires_grad_(), rewards, mask).requires_grad


def test_expected_values_by_hand():
    quantiles = torch.tensor([[[0.2, 0.6], [0.5, 0.9], [9.0, 9.0]]])
    rewards, mask = torch.tensor([[0.25, 1.0, 7.0]]), torch.tensor([[True, True, False]])
    # Means .4 and .7; the last token's target is its reward, the first's .25 + .8 (½ .7 + ½ 1).
    y = expected_value(quantiles, rewards, mask, gamma=0.8, lambda_=0.5)
    torch.testing.assert_close(y, torch.tensor([[[0.93], [1.0], [0.0]]]))
    whole = expected_value(quantiles, rewards, mask, gamma=0.8, lambda_=1.0)
    torch.testing.assert_close(whole, monte_carlo(quantiles, rewards, mask, gamma=0.8))


def test_monte_carlo_by_hand():
    quantiles, _, mask = ragged()
    rewards = torch.tensor([[1.0, 2.0, 0.0, 0.0, 4.0], [3.0, 9.0, 9.0, 9.0, 9.0], [0.0] * 5])
    y = monte_carlo(quantiles, rewards, mask, gamma=0.5)
    assert y[0, :, 0].tolist() == [1 + 1 + 0.25, 2.5, 1.0, 2.0, 4.0]
    assert y[1, :, 0].tolist() == [3.0, 0.0, 0.0, 0.0, 0.0]


# Biases as a prototype measured them (METHOD's table), root value where it is known.
@pytest.mark.parametrize(
    ("lambda_", "bias"), [(1.0, -0.002), (0.95, 0.009), (0.5, 0.093), (0.0, 0.195)]
)
def test_walk_comonotone_matched_is_biased_below_lambda_one(lambda_, bias):
    values = trained_values("comonotone", "matched", lambda_, iterations=1000)
    assert (values - success_probability()).mean().item() == pytest.approx(bias, abs=0.006)
    if lambda_ == 0.0:
        assert values[0, 0].item() == pytest.approx(0.475, abs=0.02)


@pytest.mark.parametrize(
    ("target", "lambda_", "bias"),
    [
        ("comonotone", 0.95, 0.001),
        ("mixture", 0.95, -0.008),
        ("mixture", 0.5, -0.019),
        ("mixture_mean", 0.5, 0.005),
    ],
)
def test_walk_pairwise_recovers_the_law(target, lambda_, bias):
    error = (trained_values(target, "pairwise", lambda_) - success_probability()).mean().item()
    assert abs(error) < 0.02
    assert error == pytest.approx(bias, abs=0.005)


# Standard deviation of the learned law over that of the true one, Bernoulli(p), mean over visits
# to states that are not decided. Comonotone targets of own weight w have (1 - w)²/(1 - w²)
# of the variance as their fixed point; replaced samples keep the law at any lambda.
@pytest.mark.parametrize(
    ("target", "lambda_", "ratio"),
    [
        ("comonotone", 1.0, 0.98),
        ("comonotone", 0.95, 0.85),
        ("comonotone", 0.8, 0.68),
        ("sample_replacement", 0.95, 0.975),
        ("sample_replacement", 0.5, 0.97),
        ("mixture_mean", 0.5, 0.95),
    ],
)
def test_walk_law_keeps_its_spread_unless_targets_are_comonotone(target, lambda_, ratio):
    law, p = trained_law(target, "pairwise", lambda_, kappa=0.001), success_probability()
    open_ = (p > 0) & (p < 1)
    true = (p * (1 - p)).sqrt()[open_].mean()
    found = law.std(-1, correction=0)[open_].mean() / true
    assert found.item() == pytest.approx(ratio, abs=0.015)
    if target != "comonotone":  # Its quantiles at the root are those of Bernoulli(37/256).
        assert law[0, 0, :13].max().item() < 0.1
        assert law[0, 0, 14:].min().item() > 0.8


def test_walk_root_probability():
    assert success_probability()[0, 0].item() == pytest.approx(37 / 256)
