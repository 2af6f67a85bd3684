import itertools

import pytest
import torch

from rllib_distrl.maths.laws import gain_over_best, law_of_batch

D = torch.float64


def law(probabilities):
    """Edges (1, N + 1) of a law over N atoms."""
    p = torch.tensor(probabilities, dtype=D)
    return torch.cat([torch.zeros(1, dtype=D), p.cumsum(0)]).clamp(max=1.0).unsqueeze(0)


def expected_best(values, p, k):
    """E[max] over all k-tuples, one by one."""
    total = 0.0
    for chosen in itertools.product(range(len(values)), repeat=k):
        weight = 1.0
        for i in chosen:
            weight = weight * p[i]
        total = total + weight * max(values[i] for i in chosen)
    return total


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_it_is_the_gradient_of_the_expected_best_of_k(k):
    values = [0.0, 0.2, 0.7, 1.0]
    logits = torch.tensor([0.3, 1.0, -0.5, 0.1], dtype=D, requires_grad=True)
    p = logits.softmax(0)
    expected_best(values, p, k).backward()
    atoms = torch.tensor([values], dtype=D)
    u = gain_over_best(atoms, atoms, law(p.tolist()), k)[0]
    # The policy gradient of a softmax: k p_a (u_a - E[u]).
    found = k * p.detach() * (u - (p.detach() * u).sum())
    assert torch.allclose(found, logits.grad, atol=1e-12)


def test_a_bernoulli_return_counts_where_all_others_fail():
    atoms = torch.tensor([[0.0, 1.0]], dtype=D)
    found = gain_over_best(torch.tensor([[0.0, 1.0, 0.5]], dtype=D), atoms, law([0.7, 0.3]), 4)
    assert torch.allclose(found, torch.tensor([[0.0, 0.7**3, 0.5 * 0.7**3]], dtype=D))


def test_by_hand():
    # The other one gets 0 or .5: it lifts the best by (1 + .5)/2, (.25 + 0)/2.
    atoms = torch.tensor([[0.0, 0.5]], dtype=D)
    found = gain_over_best(torch.tensor([[1.0, 0.25]], dtype=D), atoms, law([0.5, 0.5]), 2)
    assert found.tolist() == [[0.75, 0.125]]


def test_the_batch_law_keeps_the_mean():
    returns = torch.tensor([0.0, 1.0, 1.0, 0.333, 0.21], dtype=D)
    atoms, edges = law_of_batch(returns)
    assert float((atoms * edges.diff()).sum()) == pytest.approx(float(returns.mean()), abs=1e-12)
    assert edges[0] == 0.0 and edges[-1] == 1.0
    assert edges.diff()[-1] == pytest.approx(0.4)


def test_the_batch_law_is_that_of_all_learners():
    one, other = torch.tensor([0.0, 0.5], dtype=D), torch.tensor([1.0, 0.1], dtype=D)
    counts = {}
    law_of_batch(other, lambda tensor: counts.setdefault("other", tensor))
    found = law_of_batch(one, lambda tensor: tensor + counts["other"])
    expected = law_of_batch(torch.cat([one, other]))
    assert all(torch.allclose(a, b, atol=1e-15) for a, b in zip(found, expected, strict=True))


def test_returns_outside_0_and_1_are_refused():
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        law_of_batch(torch.tensor([0.5, 1.5]))
