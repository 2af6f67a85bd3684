"""Methods of the field by hand, as a recipe names them."""

import math

import pytest
import torch

from rllib_distrl.maths.group_advantages import gradient_novelty
from rllib_distrl.maths.losses import budget_weights
from rllib_distrl.method.batch import SequenceBatch
from rllib_distrl.method.registry import logp_at, resolve
from tests.helpers import distrl_config

MASK = torch.tensor([[True, True, True], [True, False, False], [True, True, False], [True] * 3])
LOGP = torch.tensor([[-0.001, -1.0, -0.005], [-2.0, 0, 0], [-0.1, -0.3, 0], [-0.2, -0.4, -0.6]])
ENTROPY = torch.tensor([[0.1, 0.3, 0.05], [1.0, 0, 0], [0.2, 0.4, 0], [0.6, 0.6, 0.6]])


def batch(returns, **columns):
    """Two groups of two; the return arrives at the last token."""
    rewards = torch.zeros(4, 3)
    rewards[torch.arange(4), MASK.sum(1) - 1] = torch.tensor(returns)
    return SequenceBatch(
        rewards=rewards, loss_mask=MASK, action_logp=LOGP, group=torch.tensor([0, 0, 1, 1]),
        entropy=ENTROPY, **columns,
    )  # fmt: skip


def test_spro_adds_what_the_policy_gained_since_the_reference():
    reference = torch.where(MASK, LOGP - 0.1 * torch.tensor([[1.0], [3.0], [0.0], [0.0]]), 0.0)
    found = resolve("advantage", {"name": "spro", "beta": 0.5})(
        batch([1.0, 0.0, 1.0, 1.0], ref_logp=reference)
    )
    grpo = 0.5 / (math.sqrt(0.5) + 1e-6)
    # R̃ of the first row .05 at its first token, .15 of the other's: their mean is .1, and from
    # the second token on the first row is alone.
    expected = [[grpo - 0.05, grpo, grpo], [-grpo + 0.05, 0, 0], [0, 0, 0], [0, 0, 0]]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_a_young_critic_is_mixed_with_what_the_prompt_has_returned():
    values = torch.tensor([[0.2, 0.4, 0.8], [0.6, 9.0, 9.0], [0.0, 0.4, 9.0], [0.0, 0.0, 0.0]])
    settings = {"name": "value_mix", "weight": 0.5, "decay": 0.5, "lambda_": 0.0}
    first = batch([1.0, 0.0, 1.0, 1.0], values=values, prompt=torch.tensor([7, 7, 8, 8]))
    found = resolve("advantage", settings)(first)
    # Before any visit the prior is the batch's mean, .75: V is .475, .575, .775 | .675 | …
    assert found[0].tolist() == pytest.approx([0.1, 0.2, 0.225])
    assert found[1].tolist() == pytest.approx([-0.675, 0, 0])
    again = batch([0.0, 0.0, 1.0, 1.0], values=values, prompt=torch.tensor([7, 9, 8, 8]),
                  memory=first.memory, k=2)  # fmt: skip
    found = resolve("advantage", settings)(again)
    # w is 1/4 now, the priors 1/2 (prompt 7), the mean 1/2 (new) and 1 (prompt 8).
    assert again.metrics["value_mix_weight"] == 0.25
    assert found[0, 2].item() == pytest.approx(-(0.75 * 0.8 + 0.25 * 0.5))
    assert found[1, 0].item() == pytest.approx(-(0.75 * 0.6 + 0.25 * 0.5))
    assert found[2, 1].item() == pytest.approx(1 - (0.75 * 0.4 + 0.25 * 1.0))
    assert again.memory["value_mix"][7] == [1.0, 3.0]
    off = resolve("advantage", {**settings, "weight": 0.0})(again)
    torch.testing.assert_close(off, resolve("advantage", {"name": "gae", "lambda_": 0.0})(again))


def test_noise_forward_is_unbiased_up_to_scale_and_baseline():
    rho = 0.25
    weights = resolve("advantage", {"name": "noise_forward", "false_negative_rate": rho})
    passed, failed = weights(batch([1.0, 0.0, 1.0, 0.0]))[:2, 0].tolist()
    assert (1 - rho) * passed + rho * failed == pytest.approx(0.0)  # r* = 1
    assert failed == pytest.approx((1 - rho) * -1.0)  # r* = 0
    with pytest.raises(ValueError, match="0 <= false_negative_rate < 1"):
        resolve("advantage", {"name": "noise_forward", "false_negative_rate": 1.0})(
            batch([0.0, 0.0, 0.0, 0.0])
        )


def test_mastered_tokens_teach_nothing():
    advantages = torch.where(MASK, 1.0, 0.0)
    settings = {"name": "mpt_mask", "probability": 0.99, "entropy_below": 0.2}
    found = resolve("shaper", settings)(batch([1.0, 1.0, 0.0, 1.0]), advantages)
    # The first row is right and sure (.15 nats): two of its tokens have e^−.001 and e^−.005 ≥ .99.
    assert found.tolist() == [[0, 1, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]]
    wrong = resolve("shaper", settings)(batch([0.0, 1.0, 0.0, 1.0]), advantages)
    assert torch.equal(wrong, advantages)


def test_downsampling_keeps_rows_of_spread_and_tokens_of_weight_and_ends():
    advantages = torch.where(MASK, torch.tensor([[1.0], [-3.0], [2.0], [1.0]]), 0.0)
    settings = {"name": "downsample", "completions": 0.5, "tokens": 0.5, "horizon": 10}
    data = batch([1.0, 0.0, 1.0, 0.0])
    # One row of each group of two has no spread: the lowest of them by order of trial, which is
    # the highest advantage. Half of the 5 tokens kept, 3: |A| H = .1 .3 .05 | .4 .8.
    found = resolve("shaper", settings)(data, advantages)
    assert found.tolist() == [[0, 1, 0], [0, 0, 0], [2, 2, 0], [0, 0, 0]]
    data.k = 11
    assert torch.equal(resolve("shaper", settings)(data, advantages), advantages)


def test_confidence_counts_in_groups_that_pass():
    prompt = torch.tensor([[0.0, -1.0, -2.0], [0.0, -1.0, -2.0], [0.0, -1.0, 0], [0.0, -1.0, 0]])
    found = resolve("shaper", {"name": "confidence_reweight", "alpha": 0.5})(
        batch([1.0, 0.0, 0.0, 0.0], prompt_logp=prompt), torch.zeros(4, 3)
    )
    # The least likely token of three counts at 20 %: e^−2 of the prompt, e^−1 and e^−2 of the rows.
    first = 0.5 * (math.exp(-2) - math.exp(-1))
    expected = torch.where(MASK, torch.tensor([[first], [0.0], [0.0], [0.0]]), 0.0)
    torch.testing.assert_close(found, expected)


def test_perturbed_rewards_have_the_scheduled_spread():
    generator = torch.Generator().manual_seed(0)
    settings = {"name": "random_perturb", "sigma_start": 1.0, "sigma_end": 0.2, "horizon": 4}
    stage, gained = resolve("reward", settings), {}
    for k in (1, 3, 50):
        data = batch([0.0, 0.0, 0.0, 0.0], k=k, generator=generator)
        gained[k] = torch.stack([stage(data).sum(1) for _ in range(500)]).std().item()
        last = torch.arange(3) == (MASK.sum(1) - 1).unsqueeze(1)
        assert (stage(data)[~last] == 0).all()
    # 2,000 draws: the standard error of a standard deviation is 1.6 %.
    assert gained == pytest.approx({1: 1.0, 3: 0.6, 50: 0.2}, rel=0.06)
    with pytest.raises(ValueError, match="deviations >= 0"):
        resolve("reward", {**settings, "sigma_end": -1.0})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("neg_entropy", [-0.15, -1.0, -0.3, -0.6]),
        ("em_token", [-0.45, -1.0, -0.6, -1.8]),
        ("em_sequence", [-1.006, -2.0, -0.4, -1.2]),
    ],
)
def test_rewards_without_a_verifier_stand_at_the_last_token(name, expected):
    found = resolve("reward", name)(batch([1.0, 0.0, 1.0, 0.0]))
    assert found.sum(1).tolist() == pytest.approx(expected)
    assert found[torch.arange(4), MASK.sum(1) - 1].tolist() == pytest.approx(expected)


def test_a_budget_of_tokens_holds_where_the_prompt_is_solved():
    settings = {"name": "length_budget", "pass_rate": 1.0, "quantile": 0.0}
    # The first group passes, with 3 and 1 tokens: the budget is 1. The second passes once.
    found = resolve("reward", settings)(batch([1.0, 1.0, 0.0, 1.0])).sum(1)
    assert found.tolist() == [0.0, 1.0, 0.0, 1.0]
    easier = resolve("reward", {**settings, "pass_rate": 0.5, "quantile": 1.0})
    assert easier(batch([1.0, 1.0, 0.0, 1.0])).sum(1).tolist() == [1.0, 1.0, 0.0, 1.0]
    with pytest.raises(ValueError, match="pass_rate in"):
        resolve("reward", {**settings, "pass_rate": 0.0})


def test_right_tokens_pull_towards_another_temperature():
    data = batch([1.0, 0.0, 0.0, 0.0])
    data.extras |= {logp_at(1.0): LOGP, logp_at(1.2): LOGP + 0.3, logp_at(0.8): LOGP - 0.2}
    entropy = (1.006 + 2.0 + 0.4 + 1.2) / 9
    settings = {"name": "virtual_temp", "bound": 0.1}
    advantages = torch.where(MASK, 2.0, 0.0)
    for target, moved in ((entropy + 0.05, 0.3), (entropy - 0.5, -0.2)):
        found = resolve("shaper", {**settings, "target": target})(data, advantages)
        a = min(abs(target - entropy), 0.1) / 0.25
        alpha = a / (1 + a)
        expected = (1 - alpha) * advantages
        expected[0] += alpha * math.exp(moved)
        torch.testing.assert_close(found, torch.where(MASK, expected, 0.0))
    same = resolve("shaper", {**settings, "target": entropy})(data, advantages)
    torch.testing.assert_close(same, advantages)  # at the target
    failed = batch([0.0, 0.0, 0.0, 0.0], extras=data.extras)
    assert torch.equal(resolve("shaper", settings)(failed, advantages), advantages)


def test_no_virtual_temperature_only_mixes_what_is_right_in():
    data = batch([1.0, 1.0, 1.0, 1.0], extras={logp_at(1.0): LOGP})
    settings = {"name": "virtual_temp", "hot": 1.0, "cold": 1.0, "target": 9.0, "bound": 1.0}
    found = resolve("shaper", settings)(data, torch.where(MASK, 3.0, 0.0))
    torch.testing.assert_close(found, torch.where(MASK, 2.0, 0.0))  # α = ½ of 3 and of 1


def test_gradients_that_point_elsewhere_gain():
    # Three right ones, two of them alike, and a wrong one at right angles to all.
    features = torch.tensor([[2.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 1.0]])
    data = batch([1.0, 1.0, 1.0, 0.0], head_gradient=features)
    data.group = torch.zeros(4, dtype=torch.long)
    found = resolve("reward", {"name": "gradient_novelty", "strength": 0.5})(data).sum(1)
    # The two see each other with weight e/(2e + 1/e), which is what sets them below the others.
    torch.testing.assert_close(found, torch.tensor([1.0, 1.0, 1.5, -0.5]))
    off = resolve("reward", {"name": "gradient_novelty", "strength": 0.0})(data).sum(1)
    assert off.tolist() == [1, 1, 1, -1]
    small = resolve("reward", {"name": "gradient_novelty", "cap": 0.8})(data).sum(1)
    torch.testing.assert_close(small, torch.tensor([0.8, 0.8, 0.8, -0.5]))


def test_novelty_weighs_others_by_their_scores():
    features = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]).double()
    scores = torch.tensor([1.0, -1.0, 0.5]).double()
    found = gradient_novelty(features, scores, torch.tensor([3, 3, 3]))
    others = [(1, 2), (0, 2), (0, 1)]
    cos2 = {(0, 1): 0.5, (0, 2): 0.0, (1, 2): 0.5}
    raw = []
    for i, (j, k) in enumerate(others):
        w = [math.exp(scores[j]), math.exp(scores[k])]
        squares = [cos2[min(i, j), max(i, j)], cos2[min(i, k), max(i, k)]]
        raw.append(1 - (w[0] * squares[0] + w[1] * squares[1]) / sum(w))
    expected = [(x - min(raw)) / (max(raw) - min(raw)) for x in raw]
    assert found.tolist() == pytest.approx(expected)
    alone = gradient_novelty(features, scores, torch.tensor([1, 2, 3]))
    assert alone.tolist() == [0, 0, 0]


def test_the_worst_reward_is_the_one_that_counts():
    parts = torch.tensor([[1.0, -0.5], [0.0, -0.5], [1.0, 0.4], [1.0, 0.0]])
    data = batch([0.5, -0.5, 1.4, 1.0], reward_parts=parts)
    found = resolve("reward", "max_min_groups")(data)
    torch.testing.assert_close(found.sum(1), parts[:, 1])
    assert data.metrics["max_min_choice"] == 1.0
    data.reward_parts = parts - torch.tensor([2.0, 0.0])
    torch.testing.assert_close(resolve("reward", "max_min_groups")(data).sum(1), parts[:, 0] - 2.0)
    with pytest.raises(ValueError, match="there is none before it"):
        distrl_config(reward_transforms=[{"name": "max_min_groups"}]).validate()


def test_completions_at_the_limit_teach_nothing():
    advantages = torch.where(MASK, 1.0, 0.0)
    found = resolve("shaper", "truncation_mask")(batch([1.0, 0.0, 1.0, 0.0], width=3), advantages)
    assert found.tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 0, 0]]
    longer = resolve("shaper", "truncation_mask")(batch([1.0, 0, 1, 0], width=4), advantages)
    assert torch.equal(longer, advantages)


def test_small_advantages_and_good_answers_at_the_limit_teach_nothing():
    advantages = torch.where(MASK, torch.tensor([[0.5], [0.05], [-0.06], [-0.7]]), 0.0)
    advantages[2, 0] = 0.0  # a mean of −.03
    found = resolve("shaper", "advantage_filter")(batch([1.0, 0, 1, 0], width=3), advantages)
    assert (found != 0).any(1).tolist() == [False, False, False, True]
    found = resolve("shaper", {"name": "advantage_filter", "least": 0.0})(
        batch([1.0, 0, 1, 0], width=4), advantages
    )
    assert torch.equal(found, advantages)


def test_a_budget_of_tokens_takes_sequences_until_it_is_reached():
    data = batch([0.0] * 4)  # 3, 1, 2 and 3 tokens
    taken = {
        tokens: (resolve("aggregation", {"name": "token_budget", "tokens": tokens})(data) * tokens)
        .sum(1)
        .tolist()
        for tokens in (1, 3, 4, 5, 100)
    }
    assert taken == {
        1: [3, 0, 0, 0], 3: [3, 0, 0, 0], 4: [3, 1, 0, 0], 5: [3, 1, 2, 0], 100: [3, 1, 2, 3],
    }  # fmt: skip
    whole = resolve("aggregation", {"name": "token_budget", "tokens": 9})(data)
    assert torch.equal(whole, resolve("aggregation", "token_mean")(data))
    of_two = budget_weights(MASK, 8, all_reduce=lambda x: 2 * x)
    assert of_two.sum(1).tolist() == [3 / 8, 1 / 8, 0, 0]


def test_the_clip_widens_with_entropy_and_narrows_where_returns_rest():
    settings = {"name": "adaptive_clip", "start": 0.2, "window": 2, "high": 0.27}
    first = resolve("controller", settings)()
    assert first.update(0.0, 0.0) == pytest.approx(0.2)
    assert first.update(0.5, 0.125) == pytest.approx(0.2 * (1 + 0.5 * math.tanh(0.5)))
    assert first.update(9.0, 0.25) == 0.27  # the bound
    assert first.update(0.0, 0.5) == pytest.approx(0.2)  # .25 + .5 is above 0 + .125
    second = resolve("controller", settings)()
    second.set_state(first.get_state())
    for each in (first, second):
        assert each.update(0.0, 0.0) == pytest.approx(0.2)  # .5 + 0 is above .125 + .25
        assert each.update(0.0, 0.125) == pytest.approx(0.2 * 0.7)  # 0 + .125, .25 + .5 before
    assert resolve("controller", {**settings, "low": 0.15})().update(0.0, 0.0) == 0.2
    with pytest.raises(ValueError, match="low <= start <= high"):
        resolve("controller", {"name": "adaptive_clip", "start": 0.5})()


def test_sampling_is_hotter_where_the_entropy_has_fallen():
    first = resolve("controller", "entropy_temperature")()
    assert first.temperature is None
    assert first.update(0.8, 0.0, 1.0, 100) == 1.0  # the target
    # ln 100 + ln ln 100 = 6.1323, ln 2 = .693147: half the entropy is 11.3 % hotter at T = 1.
    assert first.update(0.4, 0.0, 1.0, 100) == pytest.approx(1.113032, abs=1e-5)
    second = resolve("controller", "entropy_temperature")()
    second.set_state(first.get_state())
    for each in (first, second):
        # 1.5 (1 − 1.5 · .693147 / 6.1323)
        assert each.update(1.6, 0.0, 1.5, 100) == pytest.approx(1.245677, abs=1e-5)
        assert each.temperature == pytest.approx(1.245677, abs=1e-5)
    assert first.update(0.0, 0.0, 1.9, 100) == 2.0  # the bound
    fixed = resolve("controller", {"name": "entropy_temperature", "target": 0.3})()
    assert fixed.update(0.3, 0.0, 0.9, 100) == pytest.approx(0.9)
    with pytest.raises(ValueError, match="low < high"):
        resolve("controller", {"name": "entropy_temperature", "low": 2.0})


def test_the_target_of_the_entropy_anneals_over_the_last_part_of_the_horizon():
    settings = {"name": "entropy_temperature", "target": 1.0, "horizon": 10, "annealed_to": 0.5}
    controller = resolve("controller", settings)()
    # At these entropies nothing moves: 6 steps at 1, then half-way down the cosine after 2 more.
    at = {0: 1.0, 6: 1.0, 8: 0.75, 10: 0.5, 11: 0.5}
    for step in range(12):
        moved = controller.update(at.get(step, 1.0), 0.0, 1.0, 50)
        if step in at:
            assert moved == pytest.approx(1.0)
    with pytest.raises(ValueError, match="which its other settings"):
        distrl_config(controllers=[{"name": "entropy_temperature", "annealed_to": 0.5}]).validate()


def test_a_moved_setting_is_the_losses_own():
    data = batch([1.0, 0.0, 0.0, 0.0], advantages=torch.where(MASK, 1.0, 0.0))
    stage = resolve("policy_loss", "clip").moved({"clip_param": 0.3, "entropy_coeff": 0.1})
    narrow = resolve("policy_loss", {"name": "clip", "clip_param": 0.3})
    assert torch.equal(stage(LOGP + 1.0, data), narrow(LOGP + 1.0, data))
    assert not torch.equal(stage(LOGP + 1.0, data), resolve("policy_loss", "clip")(LOGP + 1, data))


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ({"clip_param": 0.3}, "clip_param is set, but a controller moves it"),
        ({"policy_loss": {"name": "clip", "clip_param": 0.2}}, "but a controller moves it"),
        ({"policy_loss": {"name": "kl_cov"}}, "which policy_loss 'kl_cov' does not have"),
    ],
)
def test_a_controller_of_what_nothing_reads_is_refused(training, words):
    with pytest.raises(ValueError, match=words):
        distrl_config(controllers=[{"name": "adaptive_clip"}], **training).validate()
