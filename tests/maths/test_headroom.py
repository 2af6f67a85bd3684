import numpy as np
import pytest

from benchmarks.headroom import blackjack_headroom
from rllib_distrl.maths.headroom import headroom, sampled_headroom


def test_by_hand():
    """Within each mean the values are 1 off their centre; the variance of all is 1.25."""
    assert headroom([0, 0, 1, 1], [0, 2, 1, 3], [1, 1, 1, 1], bins=2) == pytest.approx(0.8)
    # Weights 3 and 1 in the first group: centre .5, within 3 · .25 + 2.25 = 3, and 2 in the second;
    # the mean of all is 1, their squares sum to 3 + 1 + 0 + 4 = 8.
    assert headroom([0, 0, 1, 1], [0, 2, 1, 3], [3, 1, 1, 1], bins=2) == pytest.approx(5 / 8)


def test_a_function_of_the_mean_leaves_nothing_and_noise_everything():
    rng = np.random.default_rng(0)
    means = rng.integers(0, 10, 5_000) / 10
    assert headroom(means, np.sqrt(means * (1 - means)) + means, np.ones(5_000)) < 1e-12
    assert (
        headroom(means + rng.normal(0, 1e-3, 5_000), rng.normal(size=5_000), np.ones(5_000)) > 0.98
    )


def test_states_of_no_weight_and_scale_do_not_matter():
    args = [0, 0, 1, 1, 5], [0, 2, 1, 3, 99], [1, 1, 1, 1, 0]
    assert headroom(*args, bins=2) == pytest.approx(0.8)
    scaled = headroom(args[0], 7.0 * np.array(args[1]) - 2, 0.1 * np.array(args[2]), bins=2)
    assert scaled == pytest.approx(0.8)


def test_what_does_not_vary_is_refused():
    with pytest.raises(ValueError, match=r"functional 2\.0 in all 3 states"):
        headroom([0, 1, 2], [2, 2, 2], [1, 1, 1])


def test_from_samples_by_hand():
    """Pairs tell the deviations 1, 3, 1, 3 and 2, 4, 0, 2 of four states; their means two groups.

    Products of their deviations are 1 each within the groups, and 0, 2, 2, 0 over all.
    """
    returns = [
        [0, 2, 0, 4, 0, 0],
        [0, 6, 0, 8, 0, 0],
        [0, 2, 0, 0, 1, 1],
        [0, 6, 0, 4, 1, 1],
    ]
    assert sampled_headroom(returns, lambda x: x.std(axis=1), bins=2) == pytest.approx(1.0)
    less = [[0, 2, 0, 4, 0, 0], [0, 4, 0, 4, 0, 0], [0, 6, 0, 8, 1, 1], [0, 8, 0, 8, 1, 1]]
    # Deviations 1, 2, 3, 4 and 2, 2, 4, 4: none within the groups of the second one.
    assert sampled_headroom(less, lambda x: x.std(axis=1), bins=2) == pytest.approx(0.0)


def test_from_samples_noise_is_no_headroom_and_a_free_spread_is():
    rng = np.random.default_rng(0)
    chances = rng.uniform(size=(2_000, 1))
    of_mean = rng.uniform(size=(2_000, 300)) < chances
    assert abs(sampled_headroom(of_mean, lambda x: x.std(axis=1))) < 0.12
    spread = rng.uniform(0.5, 1.5, size=(2_000, 1))
    free = chances + spread * rng.normal(size=(2_000, 60))
    assert sampled_headroom(free, lambda x: x.std(axis=1)) == pytest.approx(1.0, abs=0.05)
    with pytest.raises(ValueError, match="5 returns of each state"):
        sampled_headroom(free[:, :5], lambda x: x.std(axis=1))


def test_in_blackjack_the_law_knows_more_than_its_mean():
    found = blackjack_headroom()
    assert found["best"]["std"] == pytest.approx(0.71, abs=0.01)
    assert found["uniform"]["std"] == pytest.approx(0.09, abs=0.01)
    assert min(found["best"].values()) > 0.1
