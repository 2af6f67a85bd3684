import math

import pytest
import torch

from rllib_distrl.maths import credit
from rllib_distrl.maths.advantages import gae

MASK = torch.tensor([[True] * 5, [True, True, True, False, False]])
VALUES = torch.tensor([[0.1, 0.3, 0.2, 0.4, 0.5], [0.6, 0.2, 0.1, 9.0, 9.0]]).double()
REWARDS = torch.tensor([[0.0, 0.0, 0.1, 0.0, 1.0], [0.0, 0.0, 0.6, 9.0, 9.0]]).double()


def test_macro_gae_of_single_tokens_is_gae():
    found = credit.macro_gae(VALUES, REWARDS, MASK, span=1, gamma=0.9, lambda_=0.8)
    torch.testing.assert_close(found, gae(VALUES, REWARDS, MASK, 0.9, 0.8))


def test_macro_gae_by_hand():
    # Spans of 2: V = .2, .3, .5 and .4, .1; r = 0, .05, 1 and 0, .6.
    d = [0.3 - 0.2, 0.05 + 0.5 - 0.3, 1.0 - 0.5]
    a = [d[0] + 0.5 * (d[1] + 0.5 * d[2]), d[1] + 0.5 * d[2], d[2]]
    e = [0.1 - 0.4, 0.6 - 0.1]
    b = [e[0] + 0.5 * e[1], e[1]]
    expected = [[a[0], a[0], a[1], a[1], a[2]], [b[0], b[0], b[1], 0, 0]]
    found = credit.macro_gae(VALUES, REWARDS, MASK, span=2, gamma=1.0, lambda_=0.5)
    torch.testing.assert_close(found, torch.tensor(expected).double())
    with pytest.raises(ValueError, match="span must be at least 1"):
        credit.macro_gae(VALUES, REWARDS, MASK, span=0)


def test_a_step_is_compared_with_those_that_still_run():
    x = torch.tensor([[1.0, 2.0, 3.0], [3.0, 9.0, 9.0], [7.0, 7.0, 7.0]])
    mask = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])
    found = credit.step_relative(x, torch.tensor([5, 5, 2]), mask)
    assert found.tolist() == [[-1, 0, 0], [1, 0, 0], [0, 0, 0]]


def test_the_most_varied_are_the_best_of_all_subsets():
    from itertools import combinations

    g = torch.Generator().manual_seed(3)
    advantages = torch.randn(14, generator=g, dtype=torch.float64)
    group = torch.tensor([0] * 6 + [1] * 8)
    kept = credit.most_varied(advantages, group, 0.5)
    for number, count in ((0, 3), (1, 4)):
        own = advantages[group == number]
        best = max(own[list(c)].var(correction=0) for c in combinations(range(len(own)), count))
        chosen = own[kept[group == number]]
        assert len(chosen) == count
        torch.testing.assert_close(chosen.var(correction=0), best)
    assert credit.most_varied(advantages, group, 1.0).all()


def test_the_largest_share_of_what_is_allowed():
    score = torch.tensor([[5.0, 1.0, 4.0], [3.0, 9.0, 2.0]])
    allowed = torch.tensor([[True, True, True], [True, False, True]])
    found = credit.largest_share(score, allowed, 0.5)  # ⌈2.5⌉ = 3 of 5
    assert found.tolist() == [[True, False, True], [True, False, False]]


def test_perplexity_and_position_by_hand():
    mask = torch.tensor([[True, True], [True, False]])
    logp = torch.tensor([[-1.0, -3.0], [-4.0, 9.0]]).double()  # ln PPL 2 and 4: z = −1, 1
    advantages = torch.tensor([[1.0, -2.0], [0.5, 9.0]]).double()
    found = credit.perplexity_and_position(
        advantages, logp, mask, perplexity_weight=0.1, position_weight=0.2, position_slope=2.0
    )

    def late(place):
        return 0.2 / (1 + math.exp(-2.0 * place))

    expected = [[1.1 + late(0), -2.2 - late(0.5)], [0.45 + late(0), 0.0]]
    torch.testing.assert_close(found, torch.tensor(expected).double())
    same = credit.perplexity_and_position(
        advantages, logp, mask, perplexity_weight=0.0, position_weight=0.0
    )
    torch.testing.assert_close(same, torch.where(mask, advantages, 0.0))


def test_lowest_confidence_by_hand():
    logp = torch.tensor([[-1.0, -5.0, -2.0, -3.0, -0.5, -0.1], [-2.0, -4.0, 9.0, 9.0, 9.0, 9.0]])
    mask = torch.tensor([[True] * 6, [True, True, False, False, False, False]])
    # 20 % of 6 is 1.2: the two least likely, −5 and −3; of 2 it is one, −4.
    found = credit.lowest_confidence(logp, mask)
    assert found.tolist() == pytest.approx([math.exp(-4), math.exp(-4)])
    assert credit.lowest_confidence(logp, mask, 1.0)[1].item() == pytest.approx(math.exp(-3))
