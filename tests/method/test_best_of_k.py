import pytest
import torch

from rllib_distrl.method.batch import SequenceBatch
from rllib_distrl.method.registry import resolve

D = torch.float64
N = 4
LENGTHS = torch.tensor([3, 2, 3, 1])
MASK = torch.arange(3) < LENGTHS.unsqueeze(1)
GROUP = torch.tensor([0, 0, 1, 1])
RETURNS = torch.tensor([1.0, 0.25, 0.5, 0.0], dtype=D)
NAN = float("nan")


def batch(group=GROUP, quantiles=None, filler=NAN):
    rewards = torch.zeros(4, 3, dtype=D)
    rewards[torch.arange(4), LENGTHS - 1] = RETURNS
    if quantiles is None:
        g = torch.Generator().manual_seed(0)
        quantiles = torch.rand(4, 3, N, generator=g, dtype=D).sort(-1).values
    return SequenceBatch(
        rewards=torch.where(MASK, rewards, filler),
        loss_mask=MASK,
        action_logp=torch.zeros(4, 3, dtype=D),
        group=group,
        quantiles=torch.where(MASK.unsqueeze(-1), quantiles, filler),
        values=torch.where(MASK, quantiles.mean(-1), filler),
    )


def advantage(data, **settings):
    return resolve("advantage", {"name": "best_of_k", **settings})(data)


def test_without_calibration_it_is_worked_out_by_hand():
    """Atoms 0, 0, .5, 1 at the prompt, .5, .5, 1, 1 at the second token; k = 2."""
    quantiles = torch.zeros(4, 3, N, dtype=D)
    quantiles[1, 0] = torch.tensor([0.0, 0.0, 0.5, 1.0])
    quantiles[1, 1] = torch.tensor([0.5, 0.5, 1.0, 1.0])
    found = advantage(batch(quantiles=quantiles), k=2, calibrate=False)
    # u(x) = mean over the atoms at the prompt of (x - z)+: u(.25) = .125, u(.5) = .25,
    # u(1) = (1 + 1 + .5)/4 = .625.
    assert found[1, 0].item() == pytest.approx(0.125 - (0 + 0 + 0.25 + 0.625) / 4, abs=1e-12)
    assert found[1, 1].item() == pytest.approx(0.125 - (0.25 + 0.625) / 2, abs=1e-12)


def test_best_of_one_without_calibration_is_the_usual_advantage():
    data = batch()
    usual = resolve("advantage", {"name": "gae", "gamma": 1.0, "lambda_": 0.9})(data)
    found = advantage(data, k=1, calibrate=False, lambda_=0.9)
    assert torch.allclose(found, usual, atol=1e-12)


def test_the_baseline_takes_nothing_from_the_row_itself():
    """A row's own return must not move its baseline: that would bias the gradient."""
    for source in ("quantiles", "values"):
        data, changed = batch(), batch()
        changed.rewards[0, 2] = 0.75  # the row's own
        before = advantage(data, k=3, source=source, lambda_=1.0)
        after = advantage(changed, k=3, source=source, lambda_=1.0)
        if source == "quantiles":
            # A = u(R) - V at every token, so that only u(R) may have moved, by one number.
            moved = (after - before)[0]
            assert moved[0] != 0 and torch.allclose(moved, moved[0].expand(3), atol=1e-12)
        # What the other row of the group gets does move.
        assert not torch.allclose(after[1, 0], before[1, 0])


def test_without_a_critic_and_for_0_or_1_returns_it_is_a_weighted_leave_one_out():
    """k = 2, three of four fail: u(1) = 1 - post, its value post (1 - post)."""
    returns = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=D)
    data = batch(group=torch.zeros(4, dtype=torch.int64))
    data.rewards[torch.arange(4), LENGTHS - 1] = returns
    found = advantage(data, k=2, source="returns", prior_weight=2.0)
    first = (2 * 0.25 + 0) / 5
    others = (2 * 0.25 + 1) / 5
    assert found[0].tolist() == pytest.approx([(1 - first) * (1 - first)] * 3, abs=1e-9)
    assert found[1, :2].tolist() == pytest.approx([-(1 - others) * others] * 2, abs=1e-9)


def test_a_scalar_critic_of_0_or_1_returns_is_a_bernoulli_law():
    data = batch(group=torch.tensor([0, 1, 2, 3]))
    returns = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=D)
    data.rewards[torch.arange(4), LENGTHS - 1] = returns
    found = advantage(data, k=3, source="values", calibrate=False)
    v = data.values
    expected = (returns[0] - v[0]) * (1 - v[0, 0]) ** 2
    assert torch.allclose(found[0], expected, atol=1e-9)


@pytest.mark.parametrize("source", ["quantiles", "values", "returns"])
def test_padding_does_not_matter_and_rewards_on_the_way_count_once(source):
    clean = advantage(batch(filler=0.0), source=source)
    dirty = advantage(batch(filler=NAN), source=source)
    assert torch.equal(clean, dirty)
    assert (clean[~MASK] == 0).all()
    # The same return paid earlier, with a critic that knows what is still to come.
    early = batch(filler=0.0)
    early.rewards[0] = torch.tensor([0.6, 0.0, 0.4])
    early.quantiles[0, 1:] -= 0.6
    early.values[0, 1:] -= 0.6
    assert torch.allclose(advantage(early, source=source), clean, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"k": 0}, "k >= 1"),
        ({"source": "logits"}, "source"),
        ({"prior_weight": 0.0}, "prior_weight"),
    ],
)
def test_bad_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        resolve("advantage", {"name": "best_of_k", **settings})
