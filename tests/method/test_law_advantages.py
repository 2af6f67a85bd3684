import pytest
import torch

from rllib_distrl.method.batch import SequenceBatch
from rllib_distrl.method.registry import resolve
from tests.helpers import distrl_config

D = torch.float64
LENGTHS = torch.tensor([2, 1])
MASK = torch.arange(3) < LENGTHS.unsqueeze(1)
NAN = float("nan")
NAMES = ("rank", "standardised", "utility")


def batch(filler=NAN):
    """Returns .5 and 0; the first row's law is 0, 0, .5, 1, and .5, .5, 1, 1 after a token."""
    rewards = torch.tensor([[0.0, 0.5, filler], [0.0, filler, filler]], dtype=D)
    quantiles = torch.full((2, 3, 4), filler, dtype=D)
    quantiles[0, 0] = torch.tensor([0.0, 0.0, 0.5, 1.0])
    quantiles[0, 1] = torch.tensor([0.5, 0.5, 1.0, 1.0])
    quantiles[1, 0] = torch.tensor([0.0, 1.0, 1.0, 2.0])
    return SequenceBatch(
        rewards=rewards, loss_mask=MASK, action_logp=torch.zeros(2, 3, dtype=D),
        group=torch.arange(2), quantiles=quantiles,
    )  # fmt: skip


def advantage(name, data=None, **settings):
    return resolve("advantage", {"name": name, **settings})(data or batch())


def close(found, expected):
    assert torch.allclose(found, torch.tensor(expected, dtype=D), atol=1e-12)


def test_rank_by_hand():
    # Of .5 two atoms of four are below, one above; of 0 none is below, three above.
    close(advantage("rank"), [[0.25, 0.25, 0.0], [-0.75, 0.0, 0.0]])
    # At the second token the four atoms have the ranks .25, .25, .75, .75 in the prompt's law.
    close(advantage("rank", per_token=True), [[0.25, 0.25 - 0.5, 0.0], [-0.75, 0.0, 0.0]])


def test_standardised_by_hand():
    std, other = 0.171875**0.5, 0.5**0.5
    close(advantage("standardised"), [[0.125 / std, 0.125 / std, 0.0], [-1 / other, 0.0, 0.0]])
    found = advantage("standardised", per_token=True)
    close(found, [[0.125 / std, (0.5 - 0.75) / std, 0.0], [-1 / other, 0.0, 0.0]])
    close(advantage("standardised", min_std=5.0)[0, :1], [0.125 / 5])


def test_utility_by_hand():
    # 2 E[(x - Z)+] at the prompt: .5 for x = .5, 1.25 for 1, 0 for 0; on average (.5 + 1.25)/4.
    first = 0.5 - 1.75 / 4
    # The other law: 0 for 0, .5 for 1, (2 + 1 + 1)/2 = 2 for 2; on average 3/4.
    close(advantage("utility", k=2), [[first, first, 0.0], [-0.75, 0.0, 0.0]])
    found = advantage("utility", k=2, per_token=True)
    close(found[0], [first, 0.5 - (0.5 + 0.5 + 1.25 + 1.25) / 4, 0.0])


def test_utility_is_best_of_k_times_k():
    data = batch(0.0)
    plain = {"k": 3, "per_token": True, "lambda_": 0.5}
    ours = {"k": 3, "calibrate": False, "lambda_": 0.5}
    data.quantiles = data.quantiles / 2  # type: ignore[operator]
    expected = 3 * advantage("best_of_k", data, **ours)
    assert torch.allclose(advantage("utility", data, **plain), expected, atol=1e-12)


def test_lambda_below_1_is_worked_out_backwards():
    whole = advantage("rank", per_token=True)
    found = advantage("rank", per_token=True, lambda_=0.5)
    # E[g] is 0 at the prompt and .5 at the second token: .5 there, then half of the rest.
    close(found[0, :2], [0.5 + 0.5 * float(whole[0, 1]), float(whole[0, 1])])


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_padding_does_not_matter_and_rewards_on_the_way_count_once(name, per_token):
    clean = advantage(name, batch(0.0), per_token=per_token)
    assert torch.equal(clean, advantage(name, batch(NAN), per_token=per_token))
    early = batch(0.0)
    early.rewards[0] = torch.tensor([0.25, 0.25, 0.0])
    assert early.quantiles is not None
    early.quantiles[0, 1] -= 0.25  # a critic that knows what is still to come
    assert torch.equal(advantage(name, early, per_token=per_token), clean)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("training", "words"),
    [
        ({"critic": "none"}, "reads the critic"),
        ({"n_quantiles": 1}, "n_quantiles is 1, a value alone. Set n_quantiles >= 2"),
        ({"gamma": 0.9}, "defined with gamma = 1.0; got 0.9"),
        ({"lambda_": 0.9}, "lambda_ is 0.9, but nothing"),
        ({"read_out": {"name": "cvar"}}, "read_out is .* nothing that is chosen reads it"),
    ],
)
def test_what_makes_no_sense_is_refused(name, training, words):
    settings = {"advantage": {"name": name}, "bonus_coeff": 0.0, **training}
    with pytest.raises(ValueError, match=words):
        distrl_config(**settings).validate()


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"name": "rank", "tie_width": -0.1}, "tie_width is -0.1; it must be >= 0"),
        ({"name": "standardised", "min_std": 0.0}, "min_std is 0.0; it must be above 0"),
        ({"name": "utility", "k": 0}, "k is 0; it must be >= 1"),
        ({"name": "utility", "lambda_": 1.5}, "lambda_ is 1.5; it must be in"),
    ],
)
def test_bad_settings_are_refused(spec, words):
    with pytest.raises(ValueError, match=words):
        resolve("advantage", spec)


def test_a_bernoulli_law_gives_what_a_large_group_would():
    """0/1 returns, p = 1/4: 1 - p and -p, and by the std of the law what GRPO divides by."""
    data = batch(0.0)
    data.quantiles = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=D).expand(2, 3, 4)
    data.rewards = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]], dtype=D)
    close(advantage("rank", data)[:, 0], [0.75, -0.25])
    std = (0.25 * 0.75) ** 0.5
    close(advantage("standardised", data)[:, 0], [0.75 / std, -0.25 / std])
    # k (1 - p)^(k - 1) (R - p), the gradient of pass@k.
    close(advantage("utility", data, k=3)[:, 0], [3 * 0.75**2 * 0.75, -3 * 0.75**2 * 0.25])
