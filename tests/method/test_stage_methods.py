import itertools
import math

import pytest
import torch

from rllib_distrl.maths import advantages as critic_maths
from rllib_distrl.maths import group_advantages, losses, optimism
from rllib_distrl.maths.laws import Law
from rllib_distrl.method.batch import SequenceBatch
from rllib_distrl.method.registry import logp_at, names, resolve

GROUP = torch.tensor([4, 4, 4, 4, 1, 1, 1, 1])
LOGPS_AT = (0.5, 0.8, 1.0, 1.2)
RETURNS = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
LENGTHS = torch.tensor([3, 5, 1, 2, 4, 2, 2, 5])
MASK = torch.arange(5) < LENGTHS.unsqueeze(1)


def batch(filler=0.0, dtype=torch.float64):
    """Two groups of four, ragged; the return arrives at the last token."""
    g = torch.Generator().manual_seed(0)
    rewards = torch.zeros(8, 5, dtype=dtype)
    rewards[torch.arange(8), LENGTHS - 1] = RETURNS

    def column(*shape):
        values = torch.randn(8, 5, *shape, generator=g, dtype=dtype)
        mask = MASK.unsqueeze(-1) if shape else MASK
        return torch.where(mask, values, filler)

    quantiles = 0.5 + 0.1 * column(6)
    quantiles = torch.where(MASK.unsqueeze(-1), quantiles.sort(-1).values, filler)
    return SequenceBatch(
        rewards=torch.where(MASK, rewards, filler),
        loss_mask=MASK,
        action_logp=column(),
        group=GROUP,
        quantiles=quantiles,
        values=quantiles.mean(-1),
        advantages=column(),
        entropy=column().abs(),
        ref_logp=column(),
        prompt_logp=torch.full((8, 3), -0.5, dtype=dtype),
        width=5,
        generator=torch.Generator().manual_seed(9),
        prompt=10 * GROUP,
        head_gradient=torch.randn(8, 7, generator=g, dtype=dtype),
        reward_parts=torch.randn(8, 2, generator=g, dtype=dtype),
        extras={logp_at(factor): column() for factor in LOGPS_AT},
    )


def at_tokens(per_row):
    return torch.where(MASK, per_row.unsqueeze(1), 0.0)


def test_grpo_by_hand():
    found = resolve("advantage", "grpo")(batch())
    # Mean .25, sample std .5; mean .75, sample std .5.
    expected = [1.5, -0.5, -0.5, -0.5, 0.5, 0.5, -1.5, 0.5]
    assert torch.allclose(found, at_tokens(torch.tensor(expected).double()), atol=1e-5)


def test_groups_of_one_get_nothing():
    returns, group = torch.tensor([0.7, 1.0, 1.0]), torch.tensor([0, 1, 1])
    assert group_advantages.grpo(returns, group).tolist() == [0, 0, 0]
    assert group_advantages.leave_one_out(returns, group).tolist() == [0, 0, 0]


GROUP_ESTIMATORS = {
    "grpo": {}, "dr_grpo": {}, "rloo": {}, "opo": {}, "bnpo": {}, "maxk": {"k": 2}, "gdpo": {},
    "optimal_token_baseline": {},
}  # fmt: skip


def equal_groups(size, values, dtype):
    """One group of each value, shuffled among one another; lengths from 1 to 7."""
    g = torch.Generator().manual_seed(size)
    order = torch.randperm(size * len(values), generator=g)
    returns = torch.tensor(values, dtype=dtype).repeat_interleave(size)[order]
    lengths = torch.randint(1, 8, (len(returns),), generator=g)
    mask = torch.arange(7) < lengths.unsqueeze(1)
    rewards = torch.zeros(len(returns), 7, dtype=dtype)
    rewards[torch.arange(len(returns)), lengths - 1] = returns
    group = torch.arange(len(values)).repeat_interleave(size)[order]
    logp = torch.randn(mask.shape, generator=g, dtype=dtype)
    return SequenceBatch(
        rewards=rewards, loss_mask=mask, action_logp=logp, group=group,
        extras={logp_at(factor): -logp.abs() / factor for factor in LOGPS_AT},
    )  # fmt: skip


def test_every_group_estimator_is_tried_at_equal_returns():
    critic = {"quantiles", "values"}
    more = {"noise_forward": {"false_negative_rate": 0.1}}
    needs = {
        name: resolve(
            "advantage", {"name": name, **{**GROUP_ESTIMATORS, **more}.get(name, {})}
        ).needs
        for name in names("advantage")
    }
    # SPRO adds the policy's own process reward and AAPO what was gained since a prompt's first
    # visit, and entropy credit tells equal ones apart: these are there at equal returns too.
    without_critic = {n for n, need in needs.items() if "groups" in need and not need & critic}
    without_critic -= {"spro", "aapo", "entropy_credit_token", "entropy_credit_seq"}
    assert without_critic == set(GROUP_ESTIMATORS)


@pytest.mark.parametrize("name", GROUP_ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_returns_get_exactly_nothing_at_any_size(name, dtype):
    values = [0.7, 0.1 + 0.2, 1 / 3, 0.0, 1.0, 0.9999]
    for size in range(2, 65):
        data = equal_groups(size, values, dtype)
        data.advantages = resolve("advantage", {"name": name, **GROUP_ESTIMATORS[name]})(data)
        assert (data.advantages == 0).all(), size
    for loss, settings in LOSSES_OF_GROUPS:  # at 64 a group
        logp = data.action_logp.clone().requires_grad_()
        resolve("policy_loss", {"name": loss, **settings})(logp, data).sum().backward()
        assert (logp.grad == 0).all(), (loss, settings)


LOSSES_OF_GROUPS = [
    ("clip", {}), ("clip", {"dual_clip": 3.0}), ("gspo", {}),
    *(("lad", {"divergence": d}) for d in losses.LAD_DIVERGENCES),
]  # fmt: skip


def test_one_unequal_group_is_still_seen_among_equal_ones():
    data = equal_groups(8, [0.7, 0.3], torch.float32)
    data.rewards[0] *= 0.5  # its group no longer is equal
    advantages = resolve("advantage", "grpo")(data)
    own = data.group == data.group[0]
    assert (advantages[~own] == 0).all()
    # The mean of the other seven is theirs; 7/8 and 1/8 of the difference over its sample std.
    assert advantages[0, 0].item() == pytest.approx(-7 / 8 / math.sqrt(1 / 8), rel=1e-3)


def test_equal_returns_of_a_whole_batch_whiten_to_nothing():
    for value in (0.7, 0.1 + 0.2, 1e3):
        data = equal_groups(8, [value, value], torch.float32)
        steps = torch.full_like(data.rewards, value)
        assert (critic_maths.whiten(steps, data.loss_mask) == 0).all()


def test_dr_grpo_and_rloo_by_hand():
    found = resolve("advantage", "dr_grpo")(batch())
    expected = torch.tensor([0.75, -0.25, -0.25, -0.25, 0.25, 0.25, -0.75, 0.25]).double()
    assert torch.allclose(found, at_tokens(expected))
    assert torch.allclose(resolve("advantage", "rloo")(batch()), at_tokens(expected * 4 / 3))


def test_opo_by_hand():
    # Group 4: lengths 3 5 1 2, return 1 at length 3: baseline 3/11. Group 1: (4 + 2 + 5)/13.
    baseline = torch.tensor([3 / 11] * 4 + [11 / 13] * 4, dtype=torch.float64)
    assert torch.allclose(resolve("advantage", "opo")(batch()), at_tokens(RETURNS - baseline))


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_maxk_is_the_leave_one_out_weight_of_the_best_of_k(k):
    returns = torch.tensor([0.3, 0.9, 0.1, 0.9, 0.5], dtype=torch.float64)
    found = group_advantages.maxk(returns, torch.zeros(5, dtype=torch.long), k=k)
    subsets = list(itertools.combinations(range(5), k))
    values = returns.tolist()
    for i in range(5):
        others = [j for j in range(5) if j != i]
        s = sum(max(values[j] for j in c) for c in subsets if i in c) / len(subsets)
        smaller = list(itertools.combinations(others, max(k - 1, 1)))
        best = sum(max(values[j] for j in c) for c in smaller) / len(smaller)
        assert found[i].item() == pytest.approx(s - k / 5 * best)


def test_maxk_of_binary_returns():
    found = group_advantages.maxk(RETURNS, GROUP, k=2)
    # C(n - c, k - 1)/C(n, k): c = 1: 3/6; c = 3: 1/6.
    assert found.tolist() == pytest.approx([0.5, 0, 0, 0, 1 / 6, 1 / 6, 0, 1 / 6])
    with pytest.raises(ValueError, match="num_generations"):
        group_advantages.maxk(RETURNS, GROUP, k=5)


def test_bnpo_equals_its_formula():
    stats = pytest.importorskip("scipy.stats")
    found = resolve("advantage", "bnpo")(batch())
    m, v = 0.5, 0.0625
    a = b = (m * (1 - m) / v - 1) * m
    pdf = [stats.beta.pdf(p, 1 + a / 3, 1 + b / 3) for p in (0.25, 0.75)]
    expected = torch.cat([(RETURNS[:4] - 0.25) / pdf[0], (RETURNS[4:] - 0.75) / pdf[1]])
    assert torch.allclose(found, at_tokens(expected))
    with pytest.raises(ValueError, match="return_min"):
        resolve("advantage", {"name": "bnpo", "return_max": 0.5})(batch())


def test_reinforce_pp_whitens_the_reward_to_go():
    found = resolve("advantage", "reinforce_pp")(batch())[MASK]
    flat = at_tokens(RETURNS)[MASK]
    assert torch.allclose(found, (flat - flat.mean()) / flat.std(correction=0))


@pytest.mark.parametrize("name", ["grpo", "rloo", "dr_grpo", "opo", "reinforce_pp"])
def test_group_advantages_do_not_look_at_the_critic(name):
    other = batch()
    other.values = other.quantiles = None
    assert torch.equal(resolve("advantage", name)(batch()), resolve("advantage", name)(other))


def test_gae_stage_is_the_maths():
    b = batch()
    stage = resolve("advantage", {"name": "gae", "gamma": 0.9, "lambda_": 0.8})
    assert torch.equal(stage(b), critic_maths.gae(b.values, b.rewards, MASK, 0.9, 0.8))


def test_dltv_stage_is_the_maths_and_logs():
    b = batch()
    b.k = 5
    stage = resolve("shaper", {"name": "dltv", "bonus_coeff": 2.0})
    expected, metrics = optimism.optimistic_advantages(
        b.advantages, optimism.bonus_statistic(b.quantiles), MASK, k=5, bonus_coeff=2.0
    )
    assert torch.equal(stage(b, b.advantages), expected)
    assert b.metrics == metrics
    b.extras["ensemble"] = b.entropy
    stage = resolve("shaper", {"name": "dltv", "bonus_stat": "ensemble"})
    expected, _ = optimism.optimistic_advantages(b.advantages, b.entropy, MASK, k=5)
    assert torch.equal(stage(b, b.advantages), expected)


def test_entropy_shaped_by_hand():
    b = batch()
    b.entropy = torch.full_like(b.entropy, 1.0)
    advantages = torch.full_like(b.advantages, -0.5)
    advantages[0] = 3.0
    found = resolve("shaper", "entropy_shaped")(b, advantages)
    assert found[0, 0].item() == pytest.approx(3.4)  # alpha H = .4 < 3 / 2
    assert found[1, 0].item() == pytest.approx(-0.25)  # |A| / kappa = .25 < .4: keeps the sign
    with pytest.raises(ValueError, match="kappa"):
        resolve("shaper", {"name": "entropy_shaped", "kappa": 1.0})(b, advantages)


def test_length_power_by_hand():
    found = resolve("shaper", "length_power")(batch(), at_tokens(torch.ones(8).double()))
    inverse = 1 / LENGTHS.double()
    expected = torch.cat([inverse[:4] / inverse[:4].mean(), inverse[4:] / inverse[4:].mean()])
    assert torch.allclose(found, at_tokens(expected))
    b = batch()
    off = resolve("shaper", {"name": "length_power", "alpha": 0.0})(b, b.advantages)
    assert torch.allclose(off, at_tokens(torch.ones(8).double()) * b.advantages)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_pass_at_k_weight_of_a_critic_and_without_one(k):
    b = batch()
    ones = torch.ones(8, 5, dtype=torch.float64)
    p = 0.5
    b.quantiles = torch.tensor([0.0, 0, 0, 1, 1, 1], dtype=torch.float64).expand(8, 5, 6)
    b.values = torch.full((8, 5), p, dtype=torch.float64)
    others = torch.tensor([0.0, 1, 1, 1, 2, 2, 3, 2], dtype=torch.float64)
    expected = (1 - (2 * p + others) / 5) ** (k - 1)
    for source in ("quantiles", "values", "returns"):  # the mean return is .5 as well
        stage = resolve("shaper", {"name": "pass_at_k", "k": k, "source": source})
        assert torch.allclose(stage(b, ones)[:, 0], expected), source
    plain = resolve("shaper", {"name": "pass_at_k", "k": k, "calibrate": False})
    assert torch.allclose(plain(b, ones)[:, 0], torch.full((8,), 0.5 ** (k - 1)).double())


@pytest.mark.parametrize("source", ["quantiles", "values", "returns"])
@pytest.mark.parametrize("returns", [[-0.2, 0.5], [0.5, 2.0]])
def test_weights_of_probabilities_refuse_other_returns(source, returns):
    data = batch()
    data.rewards[:2] = 0.0
    data.rewards[torch.arange(2), LENGTHS[:2] - 1] = torch.tensor(returns, dtype=torch.float64)
    for kind, name in (("shaper", "pass_at_k"), ("advantage", "best_of_k")):
        stage = resolve(kind, {"name": name, "source": source})
        with pytest.raises(ValueError, match=rf"{name}.*needs returns in \[0, 1\] and got"):
            stage(data, data.advantages) if kind == "shaper" else stage(data)
    unread = {"name": "pass_at_k", "source": "values", "calibrate": False}
    resolve("shaper", unread)(data, data.advantages)


def test_pass_at_k_weight_follows_the_gradient_of_pass_at_k():
    # One prompt, one logit, exact: E[(R - p)(1 - p)^(k-1) d logp] = d pass@k / k.
    logit = torch.tensor(-0.8, dtype=torch.float64, requires_grad=True)
    p, k = torch.sigmoid(logit), 4
    (gradient,) = torch.autograd.grad(1 - (1 - p) ** k, logit, retain_graph=True)
    b = SequenceBatch(
        rewards=torch.tensor([[1.0], [0.0]], dtype=torch.float64),
        loss_mask=torch.ones(2, 1, dtype=torch.bool),
        action_logp=torch.zeros(2, 1),
        group=torch.zeros(2, dtype=torch.long),
        values=p.detach().expand(2, 1),
    )
    stage = resolve("shaper", {"name": "pass_at_k", "k": k, "source": "values", "calibrate": False})
    weights = stage(b, (b.returns - p.detach()).unsqueeze(1)).squeeze(1)
    logps = torch.stack([p.log(), (1 - p).log()])
    surrogate = (logps.detach().exp() * weights * logps).sum()
    (found,) = torch.autograd.grad(surrogate, logit)
    assert found.item() == pytest.approx(gradient.item() / k)


def test_policy_loss_stages_are_the_maths():
    b = batch()
    logp = b.action_logp + 0.1 * b.entropy
    arguments = logp, b.action_logp, b.advantages
    cases = {
        "clip": losses.clipped_surrogate(*arguments, loss_mask=MASK),
        "gspo": losses.gspo(*arguments, loss_mask=MASK),
        "lad": losses.lad(*arguments, loss_mask=MASK),
    }
    for name, expected in cases.items():
        assert torch.equal(resolve("policy_loss", name)(logp, b), expected)


@pytest.mark.parametrize("name", ["clip", "gspo", "lad", "clip_cov", "kl_cov"])
def test_policy_losses_do_not_depend_on_how_the_batch_is_cut(name):
    b = batch()
    stage = resolve("policy_loss", name)
    stage.prepare(b)
    logp = b.action_logp + 0.1 * b.entropy
    parts = [stage(logp[rows], b[rows]) for rows in (slice(0, 3), slice(3, 8))]
    assert torch.allclose(torch.cat(parts), stage(logp, b))


def test_clip_cov_drops_random_tokens_of_the_band():
    b = batch()
    stage = resolve(
        "policy_loss", {"name": "clip_cov", "token_share": 0.1, "cov_low": 0.2, "cov_high": 2.0}
    )
    stage.prepare(b)
    dropped = b.extras["clip_cov"]
    advantages, logp = b.advantages[MASK], b.action_logp[MASK]
    cov = torch.zeros(8, 5, dtype=torch.float64)
    cov[MASK] = (advantages - advantages.mean()) * (logp - logp.mean())
    assert dropped.sum() == 2  # a tenth of 24 tokens
    assert ((cov[dropped] > 0.2) & (cov[dropped] < 2.0)).all()
    plain = resolve("policy_loss", "clip")(b.action_logp, b)
    assert torch.equal(stage(b.action_logp, b), torch.where(dropped, 0.0, plain))
    chosen = set()
    for seed in range(20):
        b.generator = torch.Generator().manual_seed(seed)
        stage.prepare(b)
        chosen.add(tuple(b.extras["clip_cov"].flatten().nonzero().flatten().tolist()))
    assert len(chosen) > 3


def test_kl_cov_holds_the_top_tokens_back():
    b = batch()
    stage = resolve("policy_loss", {"name": "kl_cov", "token_share": 0.1, "penalty": 0.5})
    stage.prepare(b)
    held = b.extras["kl_cov"]
    advantages, logp = b.advantages[MASK], b.action_logp[MASK]
    cov = torch.full((8, 5), -math.inf, dtype=torch.float64)
    cov[MASK] = (advantages - advantages.mean()) * (logp - logp.mean())
    assert set(cov.flatten().topk(2).indices.tolist()) == set(
        held.flatten().nonzero().flatten().tolist()
    )
    loss = stage(b.action_logp + 0.3, b)
    expected = -b.advantages * math.exp(0.3) + 0.15 * held
    assert torch.allclose(loss, torch.where(MASK, expected, 0.0))


def test_kl_regulariser_and_penalty():
    b = batch()
    logp = b.action_logp + 0.2
    found = resolve("regulariser", {"name": "kl", "coeff": 0.5, "estimator": "k2"})(logp, b)
    expected = torch.where(MASK, 0.25 * (b.ref_logp - logp).square(), 0.0)
    assert torch.allclose(found, expected)
    found = resolve("reward", {"name": "kl_penalty", "coeff": 0.5})(b)
    expected = torch.where(MASK, b.rewards - 0.5 * (b.action_logp - b.ref_logp), 0.0)
    assert torch.allclose(found, expected)


def test_overlong_by_hand():
    stage = resolve("reward", {"name": "overlong", "cache_tokens": 3})
    found = stage(batch()).sum(1) - RETURNS
    # Lengths 3 5 1 2 4 2 2 5: from 0 at 2 tokens to -1 at 5, at the last token.
    assert found.tolist() == pytest.approx([-1 / 3, -1, 0, 0, -2 / 3, 0, 0, -1])
    assert stage(batch())[0].tolist() == pytest.approx([0, 0, 1 - 1 / 3, 0, 0])


def test_noise_backward_is_unbiased():
    rates = {"false_positive_rate": 0.1, "false_negative_rate": 0.3}
    corrected = resolve("reward", {"name": "noise_backward", **rates})(batch()).sum(1)
    when_right, when_wrong = corrected[0].item(), corrected[1].item()
    assert 0.7 * when_right + 0.3 * when_wrong == pytest.approx(1.0)
    assert 0.1 * when_right + 0.9 * when_wrong == pytest.approx(0.0)


def _run(kind, name, filler):
    b = batch(filler)
    settings = {
        "maxk": {"k": 2},
        "overlong": {"cache_tokens": 3},
        "noise_backward": {"false_positive_rate": 0.1, "false_negative_rate": 0.1},
        "noise_forward": {"false_negative_rate": 0.1},
    }.get(name, {})
    stage = resolve(kind, {"name": name, **settings})
    stage.prepare(b)
    if kind in ("reward", "advantage"):
        return stage(b), None
    if kind == "shaper":
        return stage(b, b.advantages), None
    logp = (b.action_logp + 0.1).requires_grad_()
    result = stage(logp, b)
    result[MASK].sum().backward()
    return result.detach(), logp.grad


STAGES = [
    (kind, name)
    for kind in ("reward", "advantage", "shaper", "policy_loss", "regulariser")
    for name in names(kind)
]


@pytest.mark.parametrize(("kind", "name"), STAGES)
@pytest.mark.parametrize("filler", [math.nan, 1e9])
def test_padding_moves_nothing(kind, name, filler):
    clean, gradient = _run(kind, name, 0.0)
    dirty, dirty_gradient = _run(kind, name, filler)
    assert torch.allclose(clean[MASK], dirty[MASK], rtol=1e-9)
    if gradient is not None:
        assert torch.allclose(gradient[MASK], dirty_gradient[MASK], rtol=1e-9)
        assert (dirty_gradient[~MASK] == 0).all()


def test_read_outs_are_registered():
    theta = Law(torch.tensor([0.0, 0.0, 1.0, 1.0]))
    assert resolve("read_out", {"name": "upper_cvar", "level": 0.5})(theta).item() == 1.0
    assert resolve("read_out", "mean")(theta).item() == 0.5
