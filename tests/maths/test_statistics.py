import math

import pytest
import torch

from rllib_distrl.maths.losses import token_weights, weighted_sum
from rllib_distrl.maths.statistics import (
    importance_weights,
    logp_mismatch,
    masked_mean,
    masked_mean_and_std,
    row_mean,
)
from tests.maths.several_learners import on_learners

MASK = torch.tensor([[True, True, True, True], [True, False, False, False], [False] * 4])
LOSS = torch.tensor([[1.0, 2.0, 3.0, 6.0], [10.0, 7.0, 7.0, 7.0], [5.0] * 4])


def test_masked_mean_and_std_by_hand():
    mean, std = masked_mean_and_std(LOSS, MASK)
    assert mean.item() == pytest.approx(22 / 5)
    # (11.56 + 5.76 + 1.96 + 2.56 + 31.36) / 5 = 10.64
    assert std.item() == pytest.approx(math.sqrt(10.64))
    assert masked_mean(torch.full((1, 2), math.nan), torch.zeros(1, 2, dtype=torch.bool)) == 0


def test_row_mean_by_hand():
    dirty = torch.where(MASK, LOSS, math.nan)
    assert row_mean(dirty, MASK).tolist() == [3.0, 10.0, 0.0]


@pytest.mark.parametrize(
    ("aggregation", "divisor", "expected"),
    [
        ("token_mean", None, 22 / 5),
        ("sequence_mean", None, (3.0 + 10.0) / 2),
        ("sequence_sum", None, (12.0 + 10.0) / 2),
        ("constant", 8, (12.0 / 8 + 10.0 / 8) / 2),
    ],
)
def test_aggregations_by_hand(aggregation, divisor, expected):
    weights = token_weights(MASK, aggregation, divisor=divisor)
    assert weighted_sum(LOSS, weights).item() == pytest.approx(expected)
    dirty = torch.where(MASK, LOSS, math.nan).requires_grad_()
    total = weighted_sum(dirty, weights)
    total.backward()
    assert total.item() == pytest.approx(expected)
    assert torch.equal(dirty.grad, weights)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "sequence_sum", "constant"])
def test_micro_batches_and_learners_add_up(aggregation):
    whole = weighted_sum(LOSS, token_weights(MASK, aggregation, divisor=8))

    def learner(rank, all_reduce):
        rows = slice(rank, None, 2)
        weights = token_weights(MASK[rows], aggregation, divisor=8, all_reduce=all_reduce)
        pieces = zip(LOSS[rows].split(1), weights.split(1), strict=True)
        return sum(weighted_sum(loss, weight) for loss, weight in pieces)

    assert torch.allclose(sum(on_learners(2, learner)), whole)


def test_refusals():
    with pytest.raises(ValueError, match="aggregation"):
        token_weights(MASK, "mean")
    with pytest.raises(ValueError, match="divisor"):
        token_weights(MASK, "constant")
    with pytest.raises(ValueError, match="cap"):
        importance_weights(LOSS, LOSS, MASK, cap=1.0)
    with pytest.raises(ValueError, match="mode"):
        importance_weights(LOSS, LOSS, MASK, mode="clip")


def test_logp_mismatch_by_hand():
    old = torch.zeros(1, 5)
    new = torch.tensor([[0.0, 0.0, math.log(1.1), math.log(0.5), math.nan]])
    mask = torch.tensor([[True, True, True, True, False]])
    metrics = logp_mismatch(new, old, mask)
    for band, share in (((0.55, None), 0.0), ((0.05, None), 0.5), ((0.05, 0.15), 0.25)):
        assert logp_mismatch(new, old, mask, *band)["logp_mismatch_outside_clip"] == share
    assert metrics["logp_mismatch_p50"] == pytest.approx(1.0)
    assert metrics["logp_mismatch_p95"] == pytest.approx(2.0)
    assert metrics["logp_mismatch_max"] == pytest.approx(2.0)
    assert metrics["logp_mismatch_outside_clip"] == pytest.approx(0.25)
    assert metrics["logp_mismatch_ess"] == pytest.approx(3.6**2 / (4 * (2 + 1.21 + 0.25)), rel=1e-6)


def test_importance_weights_by_hand():
    new = torch.tensor([[3.0, 1.5, 0.4, math.nan]]).log()
    mask = torch.tensor([[True, True, True, False]])
    old = torch.zeros(1, 4)
    assert importance_weights(new, old, mask)[0].tolist() == pytest.approx([2.0, 1.5, 0.4, 0])
    masked = importance_weights(new, old, mask, mode="mask")[0].tolist()
    assert masked == pytest.approx([0.0, 1.5, 0.0, 0.0])
