import itertools

import pytest
import torch

from rllib_distrl.maths.group_advantages import grpo
from rllib_distrl.maths.laws import Law, rank, standardised, utility

D = torch.float64
# Two prompts: atoms 0, 0, .5, 1 of a quarter each; -1, 2 and 4 of .5, .2 and .3, and a fourth of 0.
LAW = Law(
    torch.tensor([[0.0, 0.0, 0.5, 1.0], [-1.0, 2.0, 4.0, 9.0]], dtype=D),
    torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.5, 0.2, 0.3, 0.0]], dtype=D),
)


def close(found, expected):
    assert found.dtype == D
    assert torch.allclose(found, torch.tensor(expected, dtype=D), atol=1e-12)


def test_moments_and_edges_by_hand():
    close(LAW.mean, [0.375, 1.1])
    # (2 * .375² + .125² + .625²)/4 = .171875; .5 * 2.1² + .2 * .9² + .3 * 2.9² = 4.89.
    close(LAW.std.square(), [0.171875, 4.89])
    close(LAW.edges, [[0.0, 0.25, 0.5, 0.75, 1.0], [0.0, 0.5, 0.7, 1.0, 1.0]])
    close(LAW.moved(torch.tensor([1.0, -1.0], dtype=D)).mean, [1.375, 0.1])


def test_rank_by_hand():
    x = torch.tensor([[0.0, 0.25, 0.5, 7.0, -3.0], [2.0, 0.0, 4.0, 5.0, -2.0]], dtype=D)
    # 0 ties with two atoms, nothing is below and two are above: -2/4. .5: (2 - 1)/4.
    # 2 in the other law: .5 below, .3 above; 0: .5 below, .5 above; 4: .7 below.
    close(rank(x, LAW), [[-0.5, 0.0, 0.25, 1.0, -1.0], [0.2, 0.0, 0.7, 1.0, -1.0]])


def test_near_atoms_tie():
    law = Law(torch.tensor([[0.01, 0.02, 0.04, 0.97]], dtype=D))
    x = torch.tensor([[1.0, 0.0]], dtype=D)
    close(rank(x, law), [[1.0, -1.0]])
    # What a Bernoulli(1/4) law gives: 1 - p and -p.
    close(rank(x, law, 0.05), [[0.75, -0.25]])


def test_rank_is_the_same_at_any_scale_and_shift():
    x = torch.tensor([[0.3, 0.5], [2.0, 3.0]], dtype=D)
    moved = Law(LAW.atoms * 64 - 8, LAW.probs)
    assert torch.equal(rank(x * 64 - 8, moved, 6.4), rank(x, LAW, 0.1))


def test_standardised_by_hand():
    x = torch.tensor([[1.0], [-1.0]], dtype=D)
    close(standardised(x, LAW), [[0.625 / 0.171875**0.5], [-2.1 / 4.89**0.5]])
    close(standardised(x, LAW, 2.0), [[0.625 / 2.0], [-2.1 / 4.89**0.5]])


def test_the_law_of_a_group_gives_the_group_advantage():
    returns = torch.tensor([1.0, 0.0, 0.25, 0.0, 2.0], dtype=D)
    group = torch.zeros(5, dtype=torch.int64)
    law = Law(returns.sort().values.expand(5, -1))
    # GRPO divides by the sample's std.
    expected = grpo(returns, group, std_epsilon=0.0) * (5 / 4) ** 0.5
    assert torch.allclose(standardised(returns, law), expected, atol=1e-12)


def integral(law, row, x, k):
    """k times the integral of F^(k - 1) up to x, over the steps of F."""
    atoms, probs = law.atoms[row].tolist(), law.probs[row].tolist()
    ends = [*[z for z in atoms if z < x], x]
    total = 0.0
    for low, high in itertools.pairwise(ends):
        below = sum(p for z, p in zip(atoms, probs, strict=True) if z <= low)
        total += (high - low) * below ** (k - 1)
    return k * total


@pytest.mark.parametrize("k", [2, 3, 7])
def test_utility_is_the_integral_of_powers_of_the_law(k):
    x = torch.tensor([[0.0, 0.2, 0.5, 0.9, 3.0], [-2.0, -1.0, 1.0, 3.0, 8.0]], dtype=D)
    expected = [[integral(LAW, row, float(y), k) for y in x[row]] for row in range(2)]
    close(utility(x, LAW, k), expected)


def test_utility_of_one_is_the_return():
    x = torch.tensor([[0.4], [-3.0]], dtype=D)
    assert torch.equal(utility(x, LAW, 1), x)


def test_against_its_own_law_a_return_is_worth_nothing_on_average():
    for worth in (rank(LAW.atoms, LAW, 0.6), standardised(LAW.atoms, LAW)):
        close(LAW.expectation(worth), [0.0, 0.0])
