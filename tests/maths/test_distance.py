import pytest
import torch

from rllib_distrl.maths.optimism import elliptical_distance, second_moment


def test_distance_by_hand():
    # M / n = diag(4, 1) + .0 off the diagonal, D = 2: (2, 0) is at √(4/4/2), (0, 3) at √(9/2).
    seen = torch.tensor([[2.0, 1.0], [-2.0, 1.0]])
    assert second_moment(seen).tolist() == [[8.0, 0.0], [0.0, 2.0]]
    features = torch.tensor([[[2.0, 0.0]], [[0.0, 3.0]]])
    found = elliptical_distance(features, second_moment(seen), 2.0, 1e-12)
    assert found.shape == (2, 1)
    assert found.flatten().tolist() == pytest.approx([0.5**0.5, 4.5**0.5])


def test_a_ridge_by_hand_and_correlated_features():
    # M / n + I = [[2, 1], [1, 2]]; its inverse [[2, -1], [-1, 2]] / 3; (1, -1): 6 / 3 / 2.
    moment = torch.tensor([[3.0, 3.0], [3.0, 3.0]], dtype=torch.float64)
    found = elliptical_distance(torch.tensor([[1.0, -1.0], [1.0, 1.0]]), moment, 3.0, 1.0)
    assert found.tolist() == pytest.approx([1.0, (2 / 3 / 2) ** 0.5])


def test_mean_square_over_what_was_seen_is_one():
    seen = torch.randn(500, 7, generator=torch.Generator().manual_seed(0)) @ torch.randn(7, 7)
    found = elliptical_distance(seen, second_moment(seen), 500, 1e-9)
    assert found.square().mean().item() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize(("count", "ridge"), [(0.0, 1.0), (1.0, 0.0), (1.0, -1.0)])
def test_refusals(count, ridge):
    with pytest.raises(ValueError, match="need ridge > 0 and count > 0"):
        elliptical_distance(torch.ones(1, 2), torch.eye(2).double(), count, ridge)
