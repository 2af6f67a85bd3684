"""Advantages of groups that look further than at the mean return, by hand."""

import math

import pytest
import torch

from rllib_distrl.method.batch import SequenceBatch
from rllib_distrl.method.pipeline import Method
from rllib_distrl.method.registry import logp_at, resolve
from tests.helpers import distrl_config

MASK = torch.tensor([[True, True, True], [True, True, False], [True, False, False], [True] * 3])
GROUP = torch.tensor([7, 7, 2, 2])


def batch(returns, **columns):
    """Two groups of two; the return arrives at the last token."""
    rewards = torch.zeros(4, 3, dtype=torch.float64)
    rewards[torch.arange(4), MASK.sum(1) - 1] = torch.tensor(returns, dtype=torch.float64)
    return SequenceBatch(
        rewards=rewards, loss_mask=MASK, action_logp=torch.full((4, 3), -0.5).double(),
        group=GROUP, width=3, **columns,
    )  # fmt: skip


def at_tokens(*per_row):
    return torch.where(MASK, torch.tensor(per_row, dtype=torch.float64).unsqueeze(1), 0.0)


def test_aapo_adds_what_is_gained_on_the_prompts_first_visit():
    stage = resolve("advantage", "aapo")
    first = batch([1.0, 0.5, 0.0, 0.0], prompt=torch.tensor([30, 30, 4, 4]))
    grpo = 0.25 / (math.sqrt(0.125) + 1e-6)
    # Against its own mean .75 the first row gains .25, the second loses .25, which counts as .2.
    expected = at_tokens(grpo + 0.25, -grpo - 0.2, 0.0, 0.0)
    torch.testing.assert_close(stage(first), expected)
    assert first.memory["aapo"] == {30: 0.75, 4: 0.0}
    again = batch([1.0, 1.0, 0.0, 0.0], prompt=torch.tensor([4, 4, 9, 9]), memory=first.memory)
    # All equal, but better than once: by 1, which counts as .28.
    torch.testing.assert_close(stage(again), at_tokens(0.28, 0.28, 0.0, 0.0))
    assert again.memory["aapo"] == {30: 0.75, 4: 0.0, 9: 0.0}
    with pytest.raises(ValueError, match="low and high >= 0"):
        resolve("advantage", {"name": "aapo", "low": -0.1})


def test_aapo_without_room_to_move_is_grpo():
    data = batch([1.0, 0.5, 0.3, 0.0], prompt=torch.tensor([1, 1, 2, 2]))
    found = resolve("advantage", {"name": "aapo", "low": 0.0, "high": 0.0})(data)
    assert torch.equal(found, resolve("advantage", "grpo")(data))


def test_gdpo_standardises_each_reward_by_itself():
    config = distrl_config(
        advantage={"name": "gdpo", "weights": [1.0, 0.5]},
        reward_transforms=[{"name": "overlong", "cache_tokens": 2, "penalty": 0.01}],
        critic="none",
        bonus_coeff=0.0,
        whiten_advantages=False,
    )
    data = batch([1.0, 0.0, 0.0, 1.0])
    Method.from_config(config).prepare(data)
    # Lengths 3 2 1 3, limit 3: penalties 1, .5 | 0, 1 hundredths. Two values differ by d, and have
    # the sample std d/√2: each is ∓ d/2 / (d/√2 + 1e-4) from the mean.
    z = {d: d / 2 / (d / math.sqrt(2) + 1e-4) for d in (1.0, 0.005, 0.01)}
    expected = [
        z[1.0] - 0.5 * z[0.005], -z[1.0] + 0.5 * z[0.005],
        -z[1.0] + 0.5 * z[0.01], z[1.0] - 0.5 * z[0.01],
    ]  # fmt: skip
    torch.testing.assert_close(data.advantages, at_tokens(*expected))
    parts = torch.tensor([[1.0, 0.0, 0.0, 1.0], [-0.01, -0.005, 0.0, -0.01]]).double()
    torch.testing.assert_close(data.reward_parts, parts.T, atol=1e-7, rtol=0)


def test_gdpo_of_one_reward_is_grpo_and_refused():
    data = batch([1.0, 0.5, 0.3, 0.0])
    plain = {"name": "grpo", "std_epsilon": 1e-4}
    assert torch.equal(resolve("advantage", "gdpo")(data), resolve("advantage", plain)(data))
    with pytest.raises(ValueError, match="that is advantage 'grpo'"):
        distrl_config(advantage={"name": "gdpo"}, gamma=1.0).validate()
    with pytest.raises(ValueError, match="2 weights for 1 rewards"):
        resolve("advantage", {"name": "gdpo", "weights": [1.0, 1.0]})(data)


def with_probabilities(returns, laws):
    """A vocabulary of two: the sampled token has the given probability."""
    p = torch.tensor(laws, dtype=torch.float64)
    halved = p.square() / (p.square() + (1 - p).square())  # at half of the temperature
    data = batch(returns)
    data.extras |= {logp_at(1.0): p.log(), logp_at(0.5): halved.log()}
    return data


def test_the_optimal_token_baseline_weighs_by_the_squared_score_so_far():
    # With two tokens the score by the logits is (1 − p)(1, −1): its squared length 2 (1 − p)².
    laws = [[0.5, 0.9, 0.5], [0.25, 0.5, 0.5], [0.5] * 3, [0.5] * 3]
    found = resolve("advantage", "optimal_token_baseline")(
        with_probabilities([1.0, 0.0, 0.5, 0.5], laws)
    )
    w = [[0.5, 0.52], [1.125, 1.625]]
    baseline = [w[0][t] / (w[0][t] + w[1][t]) for t in range(2)]
    # The first row is alone at its last token: the baseline that was shared last stays.
    expected = [
        [1 - baseline[0], 1 - baseline[1], 1 - baseline[1]],
        [-baseline[0], -baseline[1], 0.0],
        [0.0] * 3,
        [0.0] * 3,
    ]
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-7
    )


def test_the_optimal_token_baseline_of_equal_scores_is_the_mean_of_those_that_run():
    for p in (0.5, 1.0):  # and of tokens that were certain, without any score
        data = with_probabilities([1.0, 0.0, 0.0, 1.0], [[p] * 3] * 4)
        found = resolve("advantage", "optimal_token_baseline")(data)
        torch.testing.assert_close(found, resolve("advantage", "dr_grpo")(data), atol=1e-7, rtol=0)


def test_the_optimal_token_baseline_has_the_least_variance():
    """Of the gradient's norm, over all outcomes of one token and any constant baseline."""
    p = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)
    returns = torch.tensor([1.0, 0.3, 0.0], dtype=torch.float64)
    energy = (1 - 2 * p + p.square().sum()).unsqueeze(1)
    scores = torch.eye(3, dtype=torch.float64) - p
    torch.testing.assert_close(energy[:, 0], scores.square().sum(1))
    best = (p * returns * energy[:, 0]).sum() / (p * energy[:, 0]).sum()

    def second_moment(baseline):
        return (p * (returns - baseline) ** 2 * scores.square().sum(1)).sum()

    assert all(second_moment(best + d) > second_moment(best) for d in (-0.01, 0.01))
    # A group with these shares of outcomes, 1 : 2 : 7.
    rows = torch.tensor([0] + [1] * 2 + [2] * 7)
    data = SequenceBatch(
        rewards=returns[rows].unsqueeze(1), loss_mask=torch.ones(10, 1, dtype=torch.bool),
        action_logp=p.log()[rows].unsqueeze(1), group=torch.zeros(10, dtype=torch.long),
    )  # fmt: skip
    squared = p.square() / p.square().sum()
    data.extras |= {
        logp_at(1.0): data.action_logp,
        logp_at(0.5): squared.log()[rows].unsqueeze(1),
    }
    found = resolve("advantage", "optimal_token_baseline")(data)
    torch.testing.assert_close(found[:, 0], returns[rows] - best, rtol=1e-6, atol=1e-8)


def standardised(values):
    x = torch.tensor(values, dtype=torch.float64)
    return (x - x.mean()) / (x.std(correction=0) + 1e-6)


def test_entropy_credit_shares_rewards_out_among_those_that_run():
    # Three of a group: two right with 2 and 1 tokens, a wrong one with 2.
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    entropy = torch.tensor([[0.1, 0.24], [0.26, 9.0], [0.9, 0.9]]).double()
    rewards = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]).double()
    data = SequenceBatch(
        rewards=rewards, loss_mask=mask, action_logp=torch.zeros(3, 2).double(),
        group=torch.tensor([5, 5, 5]), entropy=entropy,
    )  # fmt: skip
    found = resolve("advantage", {"name": "entropy_credit_token", "alpha": 0.5})(data)
    # Clipped to [.2, .28]. First step: two right ones with .2 and .26, second: .24 alone.
    right = standardised([1 + 0.5 * 2 * 0.2 / 0.46, 1.5, 1 + 0.5 * 2 * 0.26 / 0.46, 0.0, 0.0])
    wrong = standardised([0.0, 0.0, 0.0, -1.5, -1.5])
    expected = torch.tensor([[right[0], right[1]], [right[2], 0.0], [wrong[3], wrong[4]]])
    torch.testing.assert_close(found, expected.double())
    of_rows = resolve("advantage", {"name": "entropy_credit_seq", "alpha": 0.5})(data)
    # Means .22 and .26 of the right ones.
    right = standardised([1 + 0.5 * 2 * 0.22 / 0.48, 1 + 0.5 * 2 * 0.26 / 0.48, 0.0])
    wrong = standardised([0.0, 0.0, -1.5])
    torch.testing.assert_close(of_rows[:, 0], torch.stack([right[0], right[1], wrong[2]]))
    assert of_rows[1, 1] == 0


def test_more_entropy_is_worth_more_where_right_and_costs_less_where_wrong():
    entropy = torch.tensor([[0.2] * 3, [0.28] * 3, [0.2] * 3, [0.28] * 3]).double()
    data = batch([1.0, 1.0, 0.0, 0.0], entropy=entropy)
    data.group = torch.zeros(4, dtype=torch.long)
    for name in ("entropy_credit_token", "entropy_credit_seq"):
        first = resolve("advantage", name)(data)[:, 0]
        assert first[1] > first[0] > 0 > first[3] > first[2]


def test_no_share_by_entropy_is_the_standardised_return():
    data = batch([1.0, 0.0, 1.0, 1.0], entropy=torch.rand(4, 3).double())
    found = resolve("advantage", {"name": "entropy_credit_seq", "alpha": 0.0})(data)
    # By rows: std ½ of the first group, 0 of the second.
    torch.testing.assert_close(found, at_tokens(1.0, -1.0, 0.0, 0.0), rtol=1e-5, atol=1e-9)
    with pytest.raises(ValueError, match=r"returns of 0 and 1; got 0\.5"):
        resolve("advantage", "entropy_credit_token")(batch([0.5, 0.0, 1.0, 1.0], entropy=MASK))
