import math

import numpy as np
import pytest
import torch

from rllib_distrl.maths.calibration import (
    calibration_metrics,
    central_coverage,
    crossing_rate,
    crps,
    explained_variance,
    explained_variance_by_position,
    pit_histogram,
    pit_ks,
    state_metrics,
)
from rllib_distrl.maths.laws import Law
from rllib_distrl.maths.quantiles import midpoints
from rllib_distrl.maths.rank_correlation import (
    ignorance_metrics,
    partial_rank_correlation,
    rank_correlation,
)

COUNT, N = 4000, 16


def row(tensor):
    return tensor.unsqueeze(0)


def normal_case(scale=1.0, shift=0.0):
    """A critic that says N(shift, scale²) of returns that are N(0, 1)."""
    u = (torch.arange(COUNT, dtype=torch.float64) + 0.5) / COUNT
    returns = torch.special.ndtri(u)
    theta = shift + scale * torch.special.ndtri(midpoints(N, dtype=torch.float64))
    return Law(row(theta.expand(COUNT, N))), row(returns), torch.ones(1, COUNT, dtype=torch.bool)


@pytest.mark.parametrize("level", [0.5, 0.9])
def test_a_calibrated_critic_covers_what_it_says(level):
    assert central_coverage(*normal_case(), level) == pytest.approx(level, abs=0.01)


def test_an_overconfident_critic_covers_less():
    # Central 50 % of N(0, .25) is ±.337: holds 26.4 % of N(0, 1).
    assert central_coverage(*normal_case(scale=0.5), 0.5) == pytest.approx(0.264, abs=0.02)


@pytest.mark.parametrize("p", [0.25, 0.8125])
@pytest.mark.parametrize("short", [0.0, 0.03])
def test_calibrated_bernoulli_returns(p, short):
    # Quantiles that stop short of 0 and 1 by less than the tie width count as 0 and 1.
    theta = torch.full((N,), short, dtype=torch.float64)
    theta[N - round(p * N) :] = 1.0 - short
    returns = (torch.arange(COUNT) < p * COUNT).double()
    arguments = (
        Law(row(theta.expand(COUNT, N))),
        row(returns),
        torch.ones(1, COUNT, dtype=torch.bool),
    )
    assert central_coverage(*arguments, 0.5, tie_width=0.05) == pytest.approx(0.5)
    histogram = pit_histogram(*arguments, tie_width=0.05)
    assert torch.allclose(histogram, torch.full((10,), 0.1).double())
    if short:
        assert pit_histogram(*arguments)[0].item() > 0.15


def bernoulli_critic(spread):
    """Of Bernoulli(p) returns, p = 3/16 … 13/16: their law, shrunk to its mean."""
    wins = torch.arange(3, N - 2)
    atoms = (torch.arange(N) >= N - wins[:, None]).double()
    mean = atoms.mean(-1, keepdim=True)
    theta = mean + spread * (atoms - mean)
    outcomes = torch.arange(N)  # of 16 returns of each p, so many are 1
    returns = (outcomes < wins[:, None]).double()
    law = Law(theta[:, None].expand(-1, N, N))
    return law, returns, torch.ones_like(returns, dtype=torch.bool)


def test_the_pit_is_uniform_for_the_true_law_and_for_no_narrower_one():
    true = bernoulli_critic(spread=1.0)
    assert pit_ks(*true, tie_width=0.05) == pytest.approx(0.0, abs=1e-12)
    for level in (0.5, 0.9):
        assert central_coverage(*true, level, tie_width=0.05) == pytest.approx(level)
    # Of half the spread, no atom is near an outcome: each falls beyond one end of the law.
    # U is uniform in [0, 1/32] or [31/32, 1]: half of it is below 1/32, all else at the top.
    narrow = bernoulli_critic(spread=0.5)
    assert central_coverage(*narrow, 0.9, tie_width=0.05) == pytest.approx(0.0)
    assert pit_ks(*narrow, tie_width=0.05) == pytest.approx(0.5 - 1 / 32)


def test_pit_ks_of_a_shifted_law():
    # sup |Phi(x) - Phi(x - .5)| is at x = .25: 2 Phi(.25) - 1 = .1974.
    assert pit_ks(*normal_case(shift=0.5)) == pytest.approx(0.1974, abs=0.01)
    assert pit_ks(*normal_case()) < 0.01


def test_pit_histogram_shows_the_direction_of_a_bias():
    flat = pit_histogram(*normal_case())
    assert torch.allclose(flat, torch.full((10,), 0.1, dtype=torch.float64), atol=0.02)
    low = pit_histogram(*normal_case(shift=-1.0))
    assert low.sum().item() == pytest.approx(1.0)
    # F says N(-1, 1): P(y > its 90 % point) = P(N(0, 1) > .2816) = .389
    assert low[-1].item() == pytest.approx(0.389, abs=0.03)
    assert low[0].item() < 0.03


def test_crps_is_that_of_the_atoms():
    theta = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
    y = 0.8
    apart = (theta[:, None] - theta[None, :]).abs().mean().item()
    expected = (theta - y).abs().mean().item() - 0.5 * apart
    mask = torch.ones(1, 1, dtype=torch.bool)
    found = crps(Law(theta.view(1, 1, 3)), torch.tensor([[y]], dtype=torch.float64), mask)
    assert found == pytest.approx(expected)
    assert crps(Law(torch.tensor([[[3.0]]])), torch.tensor([[1.0]]), mask) == pytest.approx(2.0)


def test_explained_variance_by_hand():
    mask = torch.tensor([[True, True, True, False]])
    returns = torch.tensor([[0.0, 1.0, 2.0, math.nan]])
    values = torch.tensor([[0.0, 1.0, 1.0, math.nan]])
    # Var(y) = 2/3; errors 0, 0, 1: variance 2/9.
    assert explained_variance(values, returns, mask) == pytest.approx(2 / 3)
    assert math.isnan(explained_variance(values, torch.ones(1, 4), mask))


def test_explained_variance_by_position():
    returns = torch.tensor([[0.0] * 3, [1.0] * 3, [1.0] * 3])
    values = torch.tensor([[0.5, 0.0, 9.0], [0.5, 1.0, 9.0], [0.5, 1.0, 9.0]])
    mask = torch.tensor([[True, True, True], [True, True, False], [True, True, False]])
    found = explained_variance_by_position(values, returns, mask)
    assert found == {
        "quantile_explained_variance_at_0": pytest.approx(0.0),
        "quantile_explained_variance_at_1": pytest.approx(1.0),
    }


def test_crossing_rate_by_hand():
    theta = torch.tensor([[[0.0, 2.0, 1.0], [0.0, 0.0, 1.0], [9.0, 8.0, 7.0]]])
    assert crossing_rate(theta, torch.tensor([[True, True, False]])) == pytest.approx(0.25)
    assert crossing_rate(theta[..., :1], torch.tensor([[True, True, False]])) == 0.0


def test_metrics_are_finite_and_ignore_padding():
    law, returns, mask = normal_case()
    mask = mask.clone()
    mask[0, 3000:] = False
    clean = calibration_metrics(law, returns, mask)
    dirty = calibration_metrics(
        Law(torch.where(mask[..., None], law.atoms, math.nan)),
        torch.where(mask, returns, math.nan),
        mask,
    )
    assert clean == dirty
    assert all(math.isfinite(value) for value in clean.values())
    assert {"quantile_coverage_50", "quantile_crps", "quantile_pit_9"} <= set(clean)
    assert calibration_metrics(law, returns, torch.zeros_like(mask)) == {}


def test_rank_correlation_with_ties_by_hand():
    # Ranks 4, 1, 4, 2, 4 and 1, 2, 3, 4, 5: sums of products 1, of squares 8 and 10.
    x, y = torch.tensor([3.0, 1.0, 3.0, 2.0, 3.0]), torch.arange(5.0)
    assert rank_correlation(x, y) == pytest.approx(1 / 80**0.5)
    assert math.isnan(rank_correlation(x, torch.ones(5)))


def test_spread_that_only_knows_the_value_has_no_partial_correlation():
    # Errors are wide where V(1 - V) is; the spread is √(V(1 - V)) and knows nothing else.
    generator = torch.Generator().manual_seed(1)
    values = torch.rand(3000, generator=generator, dtype=torch.float64)
    spread = (values * (1 - values)).sqrt()
    noise = torch.randn(3000, generator=generator, dtype=torch.float64)
    positions = torch.randint(0, 24, (3000,), generator=generator)
    metrics = ignorance_metrics(spread, values, values + 0.2 * spread * noise, positions)
    assert metrics["quantile_spread_error_correlation"] > 0.25
    # A smooth function of V is what is left of the spread; it must not pass for knowledge.
    assert abs(metrics["quantile_spread_error_partial_correlation"]) < 0.06
    # A spread that knows the error keeps its correlation.
    knowing = spread * noise.abs()
    assert partial_rank_correlation(knowing, (spread * noise).abs(), values) > 0.9


def test_spread_that_only_knows_value_and_position_has_nothing_left_given_both():
    # Errors fall with the position, as do the spreads; V is another matter.
    generator = torch.Generator().manual_seed(2)
    values = torch.rand(3000, generator=generator, dtype=torch.float64)
    positions = torch.randint(0, 24, (3000,), generator=generator)
    spread = (values * (1 - values)).sqrt() + (24 - positions) / 24
    noise = torch.randn(3000, generator=generator, dtype=torch.float64)
    metrics = ignorance_metrics(spread, values, values + 0.2 * spread * noise, positions)
    assert metrics["quantile_spread_error_partial_correlation"] > 0.25
    assert abs(metrics["quantile_spread_error_partial_correlation_given_position"]) < 0.06


def test_partial_correlation_given_two_is_that_of_regression_residuals():
    generator = torch.Generator().manual_seed(3)
    x, y, a, b = torch.rand(4, 40, generator=generator, dtype=torch.float64)
    design = np.column_stack(
        [np.ones(40)]
        + [((rank - 20.5) / 20) ** d for rank in (ranks(a), ranks(b)) for d in range(1, 5)]
    )
    hat = design @ np.linalg.pinv(design)
    left_x, left_y = (ranks(one) - hat @ ranks(one) for one in (x, y))
    wanted = np.corrcoef(left_x, left_y)[0, 1]
    assert partial_rank_correlation(x, y, a, b) == pytest.approx(wanted, abs=1e-9)


def ranks(values):
    return np.argsort(np.argsort(values.numpy())) + 1.0


def test_states_by_hand() -> None:
    # V − y is 0 and −1: its variance is 1/4, that of y is 1.
    found = state_metrics(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 2.0]))
    assert found["quantile_state_rmse"] == pytest.approx(0.5**0.5)
    assert found["quantile_state_explained_variance"] == pytest.approx(0.75)
    alike = state_metrics(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 2.0]))
    assert "quantile_state_explained_variance" not in alike
