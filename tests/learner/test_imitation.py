"""Shown solutions in the learner: who is imitated, by how much, and what they leave alone."""

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax

from rllib_distrl.learner.minibatches import DEMONSTRATIONS, EPISODE, minibatches, row_orders
from tests.learner.rig import gradients, hot_config, make_learner, pass_apart, sample

RIGHT = [[0, 0, 0], [1, 0, 0], [0, 1, 1], [0, 0, 0]]  # of 4 prompts, in groups of 3
PLAIN = {"advantage": {"name": "dr_grpo"}, "whiten_advantages": False, "bonus_coeff": 0.0,
         "grad_clip": None}  # fmt: skip
HPT = {**PLAIN, "policy_loss": {"name": "hpt", "supervised_coeff": 0.7}}
SRFT = {**PLAIN, "advantage": {"name": "zero"}, "policy_loss": {"name": "srft"},
        "critic": "none"}  # fmt: skip


def gate(count):
    return {**HPT, "policy_loss": {**HPT["policy_loss"], "gate": count}}


@pytest.fixture(scope="module")
def episodes():
    found = sample(hot_config(**HPT))
    for episode, right in zip(found, np.ravel(RIGHT), strict=True):
        episode.rewards.data[:] = 0.0
        episode.rewards.data[-1] = right
    return found


def logp_and_entropy(learner, prompt, tokens):
    """Of a completion (T,), from the whole model's logits, at the sampling temperature of 2."""
    ids = torch.tensor([*prompt, *tokens])
    policy = learner.policy_module.policy
    logits = policy(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1]
    law = log_softmax(logits.float() / 2.0, dim=-1)
    return law.gather(1, ids[len(prompt) :, None])[:, 0], -(law.exp() * law).sum(1)


def of_shown(learner, episodes, groups):
    """Logps and entropies of the solutions of some prompts."""
    infos = [episodes[3 * group].infos[0] for group in groups]
    return [logp_and_entropy(learner, i["prompt_ids"], i["demonstration_ids"]) for i in infos]


def autograd(learner, loss):
    learner.policy_module.zero_grad()
    loss.backward()
    named = learner.policy_module.state_dict(keep_vars=True).items()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def assert_same(found, expected):
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert largest > 1e-3
    for name, gradient in expected.items():
        assert float((found[name] - gradient).abs().max()) < 5e-6 * largest, name


def test_where_enough_are_right_hpt_is_the_clipped_surrogate(episodes):
    every = [episodes[i] for i in range(3, 9)]  # a right one in both groups
    _, plain = gradients(make_learner(hot_config(**PLAIN)), every)
    found, hpt = gradients(make_learner(hot_config(**HPT)), every)
    assert found["imitated_share"] == 0.0
    assert plain.keys() == hpt.keys()
    for name in plain:
        assert torch.equal(plain[name], hpt[name]), name


@pytest.mark.parametrize("budget", [16_384, 80])
def test_hpt_imitates_the_others_and_leaves_the_critic_alone(episodes, budget):
    learner = make_learner(hot_config(**HPT))
    shown = of_shown(learner, episodes, [0, 3])
    loss = -0.7 * torch.cat([logp for logp, _ in shown]).mean()
    imitation = autograd(learner, loss)
    # With dr_grpo the prompts of wrong completions alone have no gradient of their own.
    seen, plain = gradients(make_learner(hot_config(**PLAIN)), episodes)
    other = make_learner(hot_config(**HPT, micro_batch_tokens=budget))
    found, hpt = gradients(other, episodes)
    assert found["imitated_share"] == 0.5
    assert found["policy_loss"] == pytest.approx(loss.item() + seen["policy_loss"], rel=1e-5)
    assert_same(hpt, {n: plain[n] + imitation.get(n, 0.0) for n in plain})


def test_behind_the_gate_sampled_completions_teach_the_policy_nothing(episodes):
    learner = make_learner(hot_config(**gate(3)))
    expected = autograd(
        learner, -0.7 * torch.cat([x for x, _ in of_shown(learner, episodes, range(4))]).mean()
    )
    found, hpt = gradients(learner, episodes)
    assert found["imitated_share"] == 1.0
    policy = {name: hpt[name] for name in hpt if name.startswith("policy.")}
    assert_same(policy, {name: expected[name] for name in policy})


@pytest.mark.parametrize("apart", [False, True])
def test_srft_is_the_sum_of_its_three_expectations(episodes, apart):
    learner = make_learner(hot_config(**SRFT))
    sampled = []
    for episode, right in zip(episodes, np.ravel(RIGHT), strict=True):
        prompt, tokens = episode.infos[0]["prompt_ids"], episode.actions.data
        logp, entropy = logp_and_entropy(learner, prompt, tokens)
        weight = 0.1 * entropy.mean().exp().detach() if right else -1.0
        sampled.append(-weight * logp)
    shown = []
    means = [1 / 4, 2 / 4, 3 / 4, 1 / 4]
    for (logp, entropy), mean in zip(of_shown(learner, episodes, range(4)), means, strict=True):
        imitated = -0.5 * torch.exp(-entropy.mean()).detach() * logp
        shown.append(imitated - (1 - mean) * logp.exp() / (logp.exp() + 0.1))
    loss = torch.cat(sampled).mean() + torch.cat(shown).mean()
    expected = autograd(learner, loss)
    other = make_learner(hot_config(**SRFT))
    found, srft = gradients(pass_apart(other) if apart else other, episodes)
    assert found["policy_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert_same(srft, expected)


def test_an_epoch_has_each_demonstration_once_however_groups_are_cut(episodes):
    learner = make_learner(hot_config(**gate(0)))
    columns = learner.columns(episodes)
    rollouts = learner.batch_pass(columns, 1).rollouts
    orders = row_orders(rollouts, 3, seed=0, shuffle=True, whole_groups=False)
    parts = list(minibatches(columns, rollouts, orders, 2, learner.method.aggregation))
    first = [
        part[DEMONSTRATIONS]["rollouts"].column(EPISODE).tolist() if DEMONSTRATIONS in part else []
        for part in parts
    ]
    for epoch in range(3):
        assert sorted(np.concatenate(first[6 * epoch : 6 * epoch + 6])) == [0, 9]
    for part in parts:
        if DEMONSTRATIONS in part:
            assert float(part[DEMONSTRATIONS]["weights"].sum()) == pytest.approx(1.0)


def test_it_learns_what_was_shown(episodes):
    learner = make_learner(hot_config(**gate(0), minibatch_size=6, lr=3e-3))
    before = [logp.sum().item() for logp, _ in of_shown(learner, episodes, [0, 3])]
    learner.update(
        episodes=episodes, timesteps={"training_iteration": 1}, num_epochs=2, minibatch_size=6
    )
    after = [logp.sum().item() for logp, _ in of_shown(learner, episodes, [0, 3])]
    assert after[0] > before[0] + 1 and after[1] > before[1] + 1


def test_episodes_that_show_nothing_are_refused():
    learner = make_learner(hot_config(**HPT))
    with pytest.raises(ValueError, match="'hpt' imitates, but the episodes show no solutions"):
        learner.update(episodes=sample(hot_config(**PLAIN)))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"max_sampling_rounds": 2}, "hpt.*max_sampling_rounds = 1"),
        ({"policy_loss": {"name": "hpt", "gate": -1}}, "gate is -1; it must be >= 0"),
        ({**SRFT, "advantage": {"name": "grpo"}}, "srft.*advantage = {'name': 'zero'}"),
        ({**SRFT, "shapers": [{"name": "truncation_mask"}]}, "srft.*shapers = \\[\\]"),
        ({**SRFT, "policy_loss": {"name": "srft", "shaping": 0.0}}, "shaping is 0.0.* above 0"),
    ],
)
def test_refusals(changed, words):
    with pytest.raises(ValueError, match=words):
        hot_config(**{**HPT, **changed})
