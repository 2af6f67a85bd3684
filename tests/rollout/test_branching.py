"""Completions that branch off from one another at replies."""

import numpy as np
import pytest
import torch

from distrl_envs.token_env import TokenEnv
from rllib_distrl.algorithm.validation import check_branching_fits
from rllib_distrl.learner.connector import SequencesFromEpisodes
from rllib_distrl.method.registry import resolve
from rllib_distrl.rollout.branching import sample_branching
from rllib_distrl.rollout.completion_env_runner import BRANCHED_METRIC
from tests.helpers import distrl_config
from tests.rollout.test_turns import PROMPTS, make_runner, talking

SIZE = 6
ALWAYS = {"name": "arpo", "probability": 1.0, "initial_share": 0.5}
NEVER = {"name": "arpo", "probability": 0.0, "entropy_weight": 0.0}


@pytest.fixture(scope="module")
def runner():
    return make_runner(temperature=1.5)


def sampled(runner, branching):
    """Rows and what they share with another, of two groups."""
    requests = runner.requests(PROMPTS[:2], SIZE)
    method, env = resolve("branching", branching)(), runner.token_env.unwrapped
    params = runner.sampling_params(True)
    return sample_branching(runner.engine, requests, params, env, [SIZE, SIZE], method)


def test_where_nothing_branches_completions_are_those_of_the_prompt(runner):
    plain = runner.sample_prompts(PROMPTS[:2], SIZE).episodes
    for branching in (NEVER, {**ALWAYS, "initial_share": 1.0}):
        rows, shared = sampled(runner, branching)
        assert shared == [0] * 2 * SIZE
        for row, episode in zip(rows, plain, strict=True):
            assert row.tokens.tolist() == episode.actions.data.tolist()
            np.testing.assert_allclose(
                row.logps, episode.extra_model_outputs["action_logp"].data, atol=2e-5
            )


def test_a_branch_has_the_beginning_of_another_up_to_a_reply_and_an_end_of_its_own(runner):
    rows, shared = sampled(runner, ALWAYS)
    for start in (0, SIZE):
        group = rows[start : start + SIZE]
        # Half are from the prompt; each of them has at least one reply, and that is enough.
        assert [common > 0 for common in shared[start : start + SIZE]] == [False] * 3 + [True] * 3
        for place in range(3):
            source, branch, common = group[place], group[3 + place], shared[start + 3 + place]
            assert common == source.replies[0].at
            assert branch.replies[0] == source.replies[0]
            assert branch.tokens[:common].tolist() == source.tokens[:common].tolist()
            np.testing.assert_array_equal(branch.logps[:common], source.logps[:common])
        ends = [tuple(row.tokens.tolist()) for row in group]
        assert len(set(ends)) == SIZE


def test_its_law_behind_the_beginning_is_the_policys(runner):
    """The logps that a branch reports are those of its tokens, whoever has begun it."""
    rows, shared = sampled(runner, ALWAYS)
    plain = runner.sample_prompts(PROMPTS[:1], SIZE).episodes
    assert max(shared) > 0
    runner.branching = resolve("branching", ALWAYS)()
    try:
        report = runner.sample_prompts(PROMPTS[:2], SIZE)
    finally:
        runner.branching = None
    assert report.error is None, report.error
    assert report.metrics[BRANCHED_METRIC].peek() == 0.5
    assert len(report.episodes) == 2 * SIZE and len(plain) == SIZE
    for row, episode in zip(rows, report.episodes, strict=True):
        assert row.tokens.tolist() == episode.actions.data.tolist()
    batch = {}
    SequencesFromEpisodes()(rl_module=None, batch=batch, episodes=report.episodes)
    columns = batch["default_policy"]
    mask = columns["loss_mask"]
    found = runner.module.compute_logps(columns)
    torch.testing.assert_close(found[mask], columns["action_logp"][mask], atol=1e-4, rtol=0)
    assert columns["groups"].bincount().tolist() == [SIZE, SIZE]


def test_the_rule_by_hand():
    rule = resolve("branching", {"name": "arpo", "initial_share": 0.4, "entropy_weight": 0.5})()
    assert [rule.initial(size) for size in (1, 2, 5, 8)] == [1, 1, 2, 4]
    # .5 + .5 (.8 − .6) = .6
    assert rule.takes(0.8, 0.6, 0.59) and not rule.takes(0.8, 0.6, 0.61)
    assert rule.takes(0.2, 0.6, 0.29) and not rule.takes(0.2, 0.6, 0.31)
    with pytest.raises(ValueError, match=r"initial_share 1.5; it must be in"):
        resolve("branching", {"name": "arpo", "initial_share": 1.5})()


@pytest.mark.parametrize(
    ("rollout", "words"),
    [
        ({"segment_tokens": 5}, "no completion is whole when others branch off"),
        ({"num_generations": 1}, "a group of one has nothing to branch from"),
    ],
)
def test_refusals(rollout, words):
    config = talking(distrl_config(branching="arpo", advantage={"name": "reinforce_pp"}))
    with pytest.raises(ValueError, match=f"branching is 'arpo'.*{words}"):
        config.rollout(**rollout).validate()


def test_a_task_that_never_replies_is_refused_by_name(runner):
    config = distrl_config(branching="arpo")
    check_branching_fits(config, runner.token_env.unwrapped)
    with pytest.raises(ValueError, match="'countdown' never replies"):
        check_branching_fits(config, TokenEnv("countdown"))
