"""How an iteration's completions are shared out, and groups of unequal size."""

import itertools
import math

import pytest
import torch

from rllib_distrl.method.allocators import warn_of_rows_seen_once
from rllib_distrl.method.batch import SequenceBatch
from rllib_distrl.method.prompt_samplers import PromptRequest, PromptResult
from rllib_distrl.method.registry import logp_at, names, resolve
from tests.helpers import distrl_config

PROMPTS = [PromptRequest(row, 0) for row in range(4)]
VARIED = [each for each in names("allocator") if each not in ("equal", "explore_filter_replay")]


def made(name, num_generations=4, seed=0, **settings):
    return resolve("allocator", {"name": name, **settings})(num_generations, seed)


def result(row, right, wrong):
    statuses = ("correct",) * right + ("wrong",) * wrong
    return PromptResult(PromptRequest(row, 0), (1.0,) * right + (0.0,) * wrong, statuses)


def test_the_hardest_get_most():
    allocator = made("rank_budget", n_min=2, n_max=9)
    assert allocator.allocate(PROMPTS) == [4, 4, 4, 4]  # nothing is known
    allocator.update([result(0, 3, 1), result(1, 0, 4), result(2, 2, 2)])
    # Ranks ½, 0, 1 and 0 of the unknown one, in the order 1, 2, 0: 8 to share by 0, ⌊8/1.5⌋ = 5,
    # ⌊4/1.5⌋ = 2, 0; one is left, for the hardest.
    assert allocator.allocate(PROMPTS) == [2, 8, 4, 2]
    capped = made("rank_budget", n_min=2, n_max=6)
    capped.set_state(allocator.get_state())
    assert capped.allocate(PROMPTS) == [2, 6, 6, 2]
    allocator.update([result(1, 4, 0)] * 3)  # cumulative: 12 of 16
    assert allocator.allocate(PROMPTS)[1:3] == [2, 9]


def test_counts_have_the_least_variance_of_all():
    allocator = made("sqrt_variance", num_generations=4, n_min=1, n_max=7, epsilon=0.01)
    allocator.update([result(0, 20, 0), result(1, 2, 2), result(2, 1, 3)])
    rates = [21 / 22, 1 / 2, 1 / 3]
    variances = [p * (1 - p) + 0.01 for p in rates] + [0.26]
    assert [allocator.variance(prompt) for prompt in PROMPTS] == pytest.approx(variances)
    found = allocator.allocate(PROMPTS)

    def total(counts):
        return sum(v / n for v, n in zip(variances, counts, strict=True))

    every = (c for c in itertools.product(range(1, 8), repeat=4) if sum(c) == 16)
    assert total(found) == pytest.approx(min(map(total, every)))
    assert found[0] < found[2] <= found[1]
    allocator.update([result(0, 0, 4)])  # older counts are halved: 10 of 10 + 0 of 4
    assert allocator.variance(PROMPTS[0]) == pytest.approx(11 / 16 * 5 / 16 + 0.01)


def test_bins_pay_for_completions():
    settings = {"n_min": 2, "n_max": 6, "price_step": 0.5, "learning_rate": 1.0}
    allocator = made("shadow_price", exploration=0.5, **settings)
    unknown = 7
    assert allocator.probabilities(unknown) == pytest.approx([0.2] * 5)
    n = allocator.drawn()[unknown]
    assert allocator.allocate(PROMPTS) == [4] * 4  # one bin, whatever it draws
    allocator.update([result(0, 4, 0), result(1, 2, 2)])
    # The mean variance is 1/8: the gain is ½ (½ − 1/n)/(⅓), over the probability of 1/5.
    score = 5 * 1.5 * (0.5 - 1 / n)
    raised = [math.exp(score if arm == n else 0.0) for arm in range(2, 7)]
    expected = [0.5 * x / sum(raised) + 0.1 for x in raised]
    assert allocator.probabilities(unknown) == pytest.approx(expected)
    assert allocator.price == pytest.approx(max(0.5 * (n - 4), 0.0))
    # Rows 0 and 1 are now in the bins of 1 and ½, the others still unknown.
    drawn = allocator.drawn()
    wanted = [drawn[6], drawn[3], drawn[7], drawn[7]]
    found = allocator.allocate(PROMPTS)
    assert sum(found) == 16 and found[2] == pytest.approx(found[3], abs=1)
    for (one, more), (other, fewer) in itertools.permutations(zip(found, wanted, strict=True), 2):
        assert more < fewer or one >= other - 1


def test_a_dear_completion_is_drawn_less():
    settings = {"n_min": 1, "n_max": 8, "learning_rate": 0.5, "price_step": 0.0}
    dear = made("shadow_price", **settings)
    dear.price = 1.0
    for _ in range(40):
        dear.update([result(row, 0, 4) for row in range(4)])  # no variance: only the price
    probabilities = dear.probabilities(0)
    assert probabilities[0] > 0.5 > 0.2 > probabilities[-1]


@pytest.mark.parametrize("name", VARIED)
def test_the_total_and_the_bounds_hold_and_a_state_continues_in_the_middle(name):
    one, other = (made(name, num_generations=4, seed=5, n_min=2, n_max=7) for _ in range(2))
    rng = torch.Generator().manual_seed(3)
    seen = set()
    for step in range(12):
        counts = one.allocate(PROMPTS)
        assert sum(counts) == 16 and min(counts) >= 2 and max(counts) <= 7
        assert counts == one.allocate(PROMPTS)
        rights = torch.randint(0, 3, (4,), generator=rng).tolist()
        results = [
            result(row, min(right * row, n), n - min(right * row, n))
            for row, (right, n) in enumerate(zip(rights, counts, strict=True))
        ]
        if step == 6:
            other.set_state(one.get_state())
        if step >= 6:
            assert other.allocate(PROMPTS) == counts
            other.update(results)
        one.update(results)
        seen.add(tuple(counts))
    assert len(seen) > 1


@pytest.mark.parametrize("name", VARIED)
def test_bounds_without_a_choice_are_refused(name):
    for bounds in ({"n_min": 4}, {"n_min": 2, "n_max": 4}):
        with pytest.raises(ValueError, match="n_min < num_generations < n_max"):
            made(name, num_generations=4, **bounds)
    with pytest.raises(ValueError, match="arms"):
        made("shadow_price", n_max=9).set_state(made("shadow_price").get_state())


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"advantage": {"name": "grpo"}, "n_min": 1}, "the allocator's n_min is 1"),
        ({"advantage": {"name": "maxk", "k": 3}, "whiten_advantages": False},
         "a group has 2 completions at the least"),
        ({"max_sampling_rounds": 2}, "groups of one size"),
        ({"n_min": 4}, "n_min < num_generations"),
        ({"minibatch_size": 8, "policy_loss": {"name": "pairwise_bt"},
          "advantage": {"name": "zero"}, "bonus_coeff": 0.0}, "Leave minibatch_size out"),
    ],
)  # fmt: skip
def test_what_takes_equal_groups_is_refused(more, words):
    more = dict(more)
    allocator = {"name": "sqrt_variance", "n_min": more.pop("n_min", 2)}
    with pytest.raises(ValueError, match=words):
        distrl_config(generations=4, allocator=allocator, **more).validate()
    with pytest.raises(ValueError, match="num_learners=2"):
        distrl_config(generations=4, allocator={"name": "rank_budget"}).learners(
            num_learners=2
        ).validate()


LENGTHS = torch.tensor([3, 1, 2, 4, 2, 3, 1, 4, 2])
MASK = torch.arange(4) < LENGTHS.unsqueeze(1)
GROUP = torch.tensor([0, 0, 1, 1, 1, 1, 2, 2, 2])


def unequal(rows=slice(None)):
    """Groups of two, four and three."""
    generator = torch.Generator().manual_seed(0)
    logp = -torch.rand(9, 4, generator=generator)
    rewards = torch.zeros(9, 4)
    rewards[torch.arange(9), LENGTHS - 1] = torch.tensor([1.0, 0, 0, 0.5, 1, 1, 0, 0.25, 1])
    return SequenceBatch(
        rewards=rewards, loss_mask=MASK, action_logp=logp, group=GROUP, prompt=10 + GROUP,
        ref_logp=logp - 0.1 * torch.rand(9, 4, generator=generator),
        prompt_logp=-torch.rand(9, 3, generator=generator),
        head_gradient=torch.randn(9, 5, generator=generator),
        entropy=torch.rand(9, 4, generator=generator), width=4,
        extras={logp_at(1.0): logp, logp_at(0.5): 2 * logp - 0.2},
    )[rows]  # fmt: skip


OF_GROUPS = [
    *(("advantage", each) for each in (
        "grpo", "dr_grpo", "rloo", "opo", "maxk", "spro", "optimal_token_baseline", "aapo")),
    *(("shaper", each) for each in ("length_power", "confidence_reweight")),
    *(("reward", each) for each in ("gradient_novelty", "length_budget")),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), OF_GROUPS)
def test_groups_of_unequal_size_are_what_each_is_alone(kind, name):
    stage = resolve(kind, {"name": name, **({"k": 2} if name == "maxk" else {})})

    def of(batch):
        more = [torch.ones_like(batch.rewards)] if kind == "shaper" else []
        found = stage.of_whole(batch, *more)
        return torch.where(batch.loss_mask, found, 0.0)

    alone = [of(unequal(group == GROUP)) for group in range(3)]
    torch.testing.assert_close(of(unequal()), torch.cat(alone))


@pytest.mark.parametrize("name", names("group_loss"))
def test_losses_weigh_groups_by_their_completions(name):
    stage, logp = resolve("policy_loss", name), unequal().action_logp + 0.05

    def of(rows):
        batch = unequal(rows)
        stage.prepare(batch)
        return stage(logp[rows], batch)

    alone = [of(group == GROUP) for group in range(3)]
    torch.testing.assert_close(of(slice(None)).sum(), torch.cat(alone).sum())


class Told:
    """What a replay asks of an episode."""

    def __init__(self, earned):
        self.earned = earned

    def get_return(self):
        return self.earned


def told(*returns):
    return [Told(each) for each in returns]


def test_prompts_without_a_correct_completion_are_explored():
    allocator = resolve("allocator", {"name": "explore_filter_replay", "generations": 6})(4, 0)
    prompts = [PromptRequest(7, 2), PromptRequest(8, 2)]
    assert allocator.allocate(prompts) == [4, 4]
    results = [
        PromptResult(prompts[0], (0.5, 0.0, 0.0, 0.0), ("wrong",) * 4),
        PromptResult(prompts[1], (0.0, 0.0, 1.0, 0.0), ("wrong", "wrong", "correct", "wrong")),
    ]
    (again,) = allocator.unsolved(results)
    assert again.row == 7 and again.visit > 10**9
    assert allocator.growth == 1 + 6 / 4 + 2


def test_groups_with_a_large_advantage_are_useful_by_hand():
    allocator = resolve("allocator", "explore_filter_replay")(4, 0)
    assert allocator.is_useful([1, 0, 0, 0])  # A = .75 / .5
    assert not allocator.is_useful([1, 1, 0, 0])  # .5 / .577
    assert not allocator.is_useful([1, 1, 1, 1])
    assert not allocator.is_useful([1])


def test_useful_groups_come_back_and_a_state_goes_on_with_them():
    spec = {"name": "explore_filter_replay", "every": 2, "capacity": 2.0}
    allocator = resolve("allocator", spec)(4, 0)
    one, two, three = (told(1, 0, 0, 0) for _ in range(3))
    dull = told(1, 1, 0, 0)
    assert allocator.replay([one, dull], 8) == []
    assert allocator.replay([two], 8) == []  # due, but less than a batch is kept
    restored = resolve("allocator", spec)(4, 0)
    restored.set_state(allocator.get_state())
    for each in (allocator, restored):
        assert each.replay([three, told(0, 1, 1, 1)], 8) == []
        assert each.replay([], 8)[:3] == [one, two, three]
    big = [told(1, *[0] * 7), told(1, *[0] * 7)]
    allocator.replay(big, 8)
    assert allocator.replay([], 8) == big  # 16 completions are two batches; what is older is gone
    never = resolve("allocator", {**spec, "every": 0})(4, 0)
    assert [never.replay([told(1, 0, 0, 0)] * 9, 8) for _ in range(4)] == [[]] * 4
    assert never.get_state()["kept"] == []


EFRAME = {
    "allocator": {"name": "explore_filter_replay"}, "importance_correction": "truncated",
    "critic": "none", "advantage": {"name": "grpo"}, "bonus_coeff": 0.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "rollout", "words"),
    [
        ({"importance_correction": "none"}, {}, "of temperature 1.2 and of older weights. Set imp"),
        ({"critic": "separate"}, {}, "critic is 'separate'. Set critic = 'none'"),
        ({}, {"max_staleness": 1}, "max_staleness = 1 the next batch is under way"),
        ({"max_sampling_rounds": 2}, {}, "fills a batch with groups of one size"),
        ({"allocator": {"name": "explore_filter_replay", "generations": 1}}, {}, "generations is"),
    ],
)
def test_what_exploring_makes_no_sense_with(changed, rollout, words):
    config = distrl_config(**{**EFRAME, **changed}).rollout(**rollout)
    if rollout:
        config.env_runners(num_env_runners=1)
    with pytest.raises(ValueError, match=words):
        config.validate()


def test_prompts_that_no_allocator_meets_again_are_said(caplog):
    def said(allocator, sampler, rows):
        caplog.clear()
        stages = resolve("allocator", allocator), resolve("prompt_sampler", sampler)
        warn_of_rows_seen_once(*stages, rows)
        return caplog.text

    once, pool = "without_replacement", {"name": "variance_mix", "pool": 1000}
    assert "and 100,001 are served one after" in said("rank_budget", once, 100_001)
    assert not said("rank_budget", once, 100_000)
    assert not said("rank_budget", pool, 10**9)
    assert not said("equal", once, 10**9)


def test_a_curve_of_pass_rates_counts_groups_and_not_completions():
    data = unequal()
    data.rewards = torch.where(data.rewards >= 0.5, 1.0, 0.0)  # rates ½, ¾, ⅓
    found = resolve("shaper", "curve_weight")(data, torch.ones(9, 4))
    # Bins of a fifth: ⅓ in the first, ½ in the second, ¾ in the third; each holds one group.
    expected = torch.tensor([1 / 2] * 2 + [1 / 3] * 4 + [1.0] * 3).unsqueeze(1)
    torch.testing.assert_close(found, torch.where(MASK, expected, 0.0))
