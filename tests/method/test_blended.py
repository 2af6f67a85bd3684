from typing import Any

import pytest
import torch

from rllib_distrl.maths.advantages import critic_weight
from rllib_distrl.method.batch import SequenceBatch
from rllib_distrl.method.pipeline import Method
from rllib_distrl.method.registry import resolve
from tests.helpers import distrl_config
from tests.maths.several_learners import on_learners

D = torch.float64
MASK = torch.tensor([[True, True], [True, False], [True, True], [True, False]])
RETURNS = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=D)
NAN = float("nan")


def batch(values, filler=0.0, quantiles=None):
    """Two groups of two; each has a right completion of two tokens and a wrong one of one."""
    rewards = torch.tensor([[0.0, 1.0], [0.0, filler], [0.0, 1.0], [0.0, filler]], dtype=D)
    return SequenceBatch(
        rewards=rewards, loss_mask=MASK, action_logp=torch.zeros(4, 2, dtype=D),
        group=torch.tensor([0, 0, 1, 1]), values=torch.tensor(values, dtype=D), quantiles=quantiles,
    )  # fmt: skip


def blended(data, **settings):
    return resolve("advantage", {"name": "blended", **settings})(data)


def rloo(data):
    return resolve("advantage", "rloo")(data)


def test_by_hand():
    # At the six tokens four returns to go are 1 and two 0; the errors in their place, .25 and
    # -.25, are half as wide: a quarter of the variance is left.
    v = [[0.75, 0.75], [0.25, NAN], [0.75, 0.75], [0.25, NAN]]
    data = batch(v, filler=NAN)
    found = blended(data, lambda_=1.0)
    assert data.metrics["blended_critic_weight"] == pytest.approx(0.75)
    right, wrong = 0.25 * 1.0 + 0.75 * 0.25, -0.25 * 1.0 - 0.75 * 0.25
    expected = [[right, right], [wrong, 0.0]] * 2
    assert torch.allclose(found, torch.tensor(expected, dtype=D), atol=1e-12)


def test_lambda_is_that_of_the_critics_part():
    v = [[0.6, 0.9], [0.2, 0.0], [0.6, 0.9], [0.2, 0.0]]
    data = batch(v)
    found = blended(data, lambda_=0.5)
    w = data.metrics["blended_critic_weight"]
    assert 0 < w < 1
    # GAE: .1 at the end, .3 + .5 * .1 before.
    assert found[0].tolist() == pytest.approx([1 - w + w * 0.35, 1 - w + w * 0.1], abs=1e-12)


CRITICS_THAT_EXPLAIN_NOTHING = [
    [[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [1.0, 0.0]],  # the wrong way round
    [[0.3, 0.3], [0.3, 0.3], [0.3, 0.3], [0.3, 0.3]],  # a constant
    [[9.0, -9.0], [9.0, 0.0], [-9.0, 9.0], [-9.0, 0.0]],  # noise
]


@pytest.mark.parametrize("values", CRITICS_THAT_EXPLAIN_NOTHING)
def test_a_critic_that_explains_nothing_leaves_exactly_the_critic_free_method(values):
    data = batch(values)
    found = blended(data)
    assert data.metrics["blended_critic_weight"] == 0.0
    assert torch.equal(found, rloo(data))


@pytest.mark.parametrize("values", CRITICS_THAT_EXPLAIN_NOTHING)
def test_the_whole_method_is_then_the_critic_free_one(values):
    """Whitening and all, with a critic against without one."""
    quantiles = torch.tensor(values, dtype=D).unsqueeze(-1).expand(-1, -1, 16)
    advantages = []
    blending: dict[str, Any] = {"advantage": {"name": "blended"}}
    free: dict[str, Any] = {"advantage": {"name": "rloo"}, "critic": "none"}
    for settings in (blending, free):
        config = distrl_config(generations=2, bonus_coeff=0.0, **settings)
        config.validate()
        with_critic = settings.get("critic") != "none"
        data = batch(values, quantiles=quantiles if with_critic else None)
        Method.from_config(config).prepare(data)
        advantages.append(data.advantages)
    assert torch.equal(*advantages)


def test_returns_that_do_not_vary_trust_no_critic():
    data = batch([[0.5, 0.5]] * 4)
    data.rewards = torch.zeros_like(data.rewards)
    assert (blended(data) == 0).all()


def test_the_weight_is_that_of_all_learners():
    values = torch.tensor([[0.7, 0.9], [0.2, 0.0], [0.1, 0.5], [0.4, 0.0]], dtype=D)
    to_go = batch([[0.0] * 2] * 4).at_tokens(RETURNS)
    whole = float(critic_weight(values, to_go, MASK))
    assert 0 < whole < 1

    def own(rank, all_reduce):
        rows = slice(0, 1) if rank == 0 else slice(1, 4)
        return float(critic_weight(values[rows], to_go[rows], MASK[rows], all_reduce))

    assert on_learners(2, own) == pytest.approx([whole, whole], abs=1e-12)
    assert float(critic_weight(values[1:], to_go[1:], MASK[1:])) != pytest.approx(whole, abs=0.01)


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ({"generations": 1}, "num_generations is 1"),
        ({"critic": "none"}, "reads the critic"),
        ({"gamma": 0.9}, "not discounted.*gamma = 1.0"),
    ],
)
def test_what_makes_no_sense_is_refused(training, words):
    settings = {"generations": 2, "advantage": {"name": "blended"}, "bonus_coeff": 0.0}
    with pytest.raises(ValueError, match=f"(?s){words}"):
        distrl_config(**{**settings, **training}).validate()
