"""Batches: sampled beside learning, too late, or anew where a group has equal returns."""

import logging
import time
from types import SimpleNamespace

import numpy as np
import pytest
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.metrics import WEIGHTS_SEQ_NO

from rllib_distrl.algorithm.batches import Batches, sample_informative
from rllib_distrl.method.allocators import Equal
from rllib_distrl.method.prompt_samplers import BetaCounts, PromptResult
from rllib_distrl.rollout.completion_env_runner import CompletionEnvRunner
from rllib_distrl.rollout.groups import SampledGroups, check_weights
from tests.algorithm.recorded_distrl import recorded
from tests.helpers import distrl_config
from tests.rollout.test_turns import talking

pytestmark = pytest.mark.usefixtures("ray_session")


class TimedRunner(CompletionEnvRunner):
    """Takes half a second longer per batch, and remembers when."""

    def sample_prompts(self, *args, **kwargs):
        started = time.time()
        time.sleep(0.5)
        report = super().sample_prompts(*args, **kwargs)
        self.spans = [*getattr(self, "spans", []), (started, time.time())]
        return report


def watch_updates(algo):
    """Spans of the updates, and the versions and rows that they learned from."""
    update, seen = algo.update_learners, []

    def watched(groups):
        started = time.time()
        result = update(groups)
        time.sleep(0.5)
        versions = {
            int(version)
            for group in groups
            for episode in group
            for version in episode.extra_model_outputs[WEIGHTS_SEQ_NO].data
        }
        rows = [group[0].infos[0]["row"] for group in groups]
        seen.append(((started, time.time()), versions, rows))
        return result

    algo.update_learners = watched
    return seen


def overlap(one, other):
    return max(0.0, min(one[1], other[1]) - max(one[0], other[0]))


@pytest.mark.slow
def test_runners_sample_the_next_batch_while_the_learner_learns(build, tmp_path):
    remote = {"num_env_runners": 1, "env_runner_cls": TimedRunner}
    config = distrl_config().env_runners(**remote).rollout(max_staleness=1)
    algo = build(config.copy(copy_frozen=False))
    seen = watch_updates(algo)
    lags = [algo.train()["env_runners"]["weights_version_lag"] for _ in range(3)]
    assert lags == [0, 1, 1]
    assert [versions for _, versions, _ in seen] == [{0}, {0}, {1}]
    # The checkpoint knows nothing of the batch under way; here, training goes on with it.
    path = algo.save_to_path(str(tmp_path / "checkpoint"))
    assert algo.train()["env_runners"]["weights_version_lag"] == 1
    spans = algo.env_runner_group.foreach_env_runner(
        lambda runner: runner.spans, local_env_runner=False
    )[0]
    for (updating, _, _), sampling_next in zip(seen, spans[1:], strict=True):
        assert overlap(updating, sampling_next) > 0.4

    resumed = build(config.copy(copy_frozen=False))
    resumed.restore_from_path(path)
    seen_after = watch_updates(resumed)
    lags = [resumed.train()["env_runners"]["weights_version_lag"] for _ in range(2)]
    assert lags == [0, 1]
    # No prompt is lost, none is served twice.
    assert seen_after[0][2] == seen[3][2]
    assert not set(seen_after[1][2]) & {row for _, _, rows in seen for row in rows}

    # In place, with a batch of another time under way.
    algo.restore_from_path(path)
    algo.train()
    assert seen[4][1:] == ({3}, seen[3][2])


@pytest.mark.slow
def test_batches_sampled_several_iterations_ahead_are_learned_from_in_order(build, tmp_path):
    # With such steps no weight moves: it is the same token, whichever version has sampled it.
    punctual = build(recorded(0, lr=1e-30))
    config = recorded(2, lr=1e-30).rollout(max_staleness=3)
    algo = build(config.copy(copy_frozen=False))
    lags = [algo.train()["env_runners"]["weights_version_lag"] for _ in range(5)]
    assert lags == [0, 1, 2, 3, 3]
    path = algo.save_to_path(str(tmp_path / "checkpoint"))
    lags = [algo.train()["env_runners"]["weights_version_lag"] for _ in range(2)]
    assert lags == [3, 3]
    for _ in range(7):
        punctual.train()

    def learned(algo):
        return [(key, row[:2]) for key, row in algo.learned.items()]

    assert learned(algo) == learned(punctual)
    # The checkpoint knows nothing of what is under way, and loses and repeats no prompt.
    resumed = build(config.copy(copy_frozen=False))
    resumed.restore_from_path(path)
    lags = [resumed.train()["env_runners"]["weights_version_lag"] for _ in range(2)]
    assert lags == [0, 1]
    assert learned(resumed) == learned(punctual)[5 * 12 :]


def test_a_prompt_sampler_keeps_what_it_was_told_while_batches_were_under_way():
    config = distrl_config(prompts=4, generations=2)
    config.rollout(max_staleness=2).env_runners(num_env_runners=1).validate()
    fleet = SimpleNamespace(serving=lambda: [], weights=(0, ""))
    sync = SimpleNamespace(fleet=fleet, local_runner=None, sampling_temperature=lambda: None)
    sampler, expected = (BetaCounts(9, 0, decay=0.5) for _ in range(2))
    batches = Batches(sync, sampler, Equal(2, 0), config)
    results = [PromptResult(p, (1.0, 0.0), ("correct", "wrong")) for p in sampler.next(4)]
    expected.next(4)
    batches.start()
    assert len(set(batches.under_way)) == 8
    for some in (results[:3], results[1:]):
        batches.take_results(some)
        expected.update(some)
        assert_same_state(batches.prompts_learned, expected.get_state())
    assert sampler.get_state()["served"] == 12
    batches.drop()
    assert not batches.under_way
    assert_same_state(sampler.get_state(), expected.get_state())


def assert_same_state(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.slow
def test_without_staleness_nothing_overlaps(build):
    remote = {"num_env_runners": 1, "env_runner_cls": TimedRunner}
    algo = build(distrl_config().env_runners(**remote))
    seen = watch_updates(algo)
    for _ in range(3):
        algo.train()
    assert [versions for _, versions, _ in seen] == [{0}, {1}, {2}]
    spans = algo.env_runner_group.foreach_env_runner(
        lambda runner: runner.spans, local_env_runner=False
    )[0]
    assert not any(overlap(updating, span) for updating, _, _ in seen for span in spans)


@pytest.mark.slow
def test_episodes_of_weights_too_old_are_dropped_counted_and_sampled_again(build, caplog):
    remote = {"num_env_runners": 1}
    algo = build(distrl_config().env_runners(**remote).rollout(max_staleness=1))
    seen = watch_updates(algo)
    update = algo.update_learners
    algo.train()
    algo.update_learners = lambda groups: (update(groups), update(groups))[1]
    assert algo.train()["env_runners"]["weights_version_lag"] == 1
    algo.update_learners = update
    under_way = [prompt.row for prompt in algo.batches.under_way]
    with caplog.at_level(logging.WARNING):
        result = algo.train()["env_runners"]
    assert result["num_stale_episodes_dropped"] == 8
    assert result["weights_version_lag"] == 0
    assert "8 episodes dropped: sampled with weights version 1, the learner has 3" in caplog.text
    assert seen[-1][1] == {3}
    rows = [rows for _, _, rows in seen]
    assert rows[1] == rows[2] and not set(rows[3]) & set(rows[0] + rows[1])
    assert rows[3] == under_way
    assert algo.train()["env_runners"]["num_stale_episodes_dropped"] == 0
    # Scaling waits for the batch under way and keeps it.
    algo.scale_env_runners(2)
    assert len(seen) == 5 and algo.train()["env_runners"]["weights_version_lag"] == 1


@pytest.mark.slow
def test_rows_in_segments_are_learned_from_when_their_group_is_whole(build, tmp_path):
    def train(algo, times):
        return [algo.train()["env_runners"] for _ in range(times)]

    # With such steps no weight moves.
    whole = build(talking(recorded(0, lr=1e-30)))
    train(whole, 6)
    config = talking(recorded(0, lr=1e-30)).rollout(segment_tokens=7)
    algo = build(config.copy(copy_frozen=False))
    results, sizes = [], []
    for _ in range(3):
        before = set(algo.keys)
        results += train(algo, 1)
        new = [algo.learned[key] for key in algo.keys - before]
        stamps = np.concatenate([stamps for *_, stamps in new])
        learner = algo.weight_sync.version - 1
        assert results[-1]["weights_version_lag"] == learner - stamps.min()
        assert results[-1]["weights_version_lag_mean"] == pytest.approx(learner - stamps.mean())
        sizes.append(len(new) // 2)
    assert results[-1]["weights_version_lag"] >= 2
    started = 6 * sum(int(result["num_sampling_rounds"]) for result in results)
    assert results[-1]["num_open_prompts"] == started - sum(sizes) > 0
    path = algo.save_to_path(str(tmp_path / "checkpoint"))
    results += train(algo, 3)
    # Every token counts once, when its group is whole.
    tokens = sum(len(tokens) for tokens, *_ in algo.learned.values())
    assert results[-1]["num_env_steps_sampled_lifetime"] == tokens
    both = algo.keys & whole.keys
    assert len(both) >= 36
    assert [algo.learned[key][:2] for key in both] == [whole.learned[key][:2] for key in both]

    resumed = build(config.copy(copy_frozen=False))
    resumed.restore_from_path(path)
    train(resumed, 3)
    assert resumed.learned == {key: algo.learned[key] for key in resumed.keys}
    assert len(algo.keys) - len(resumed.keys) == 2 * sum(sizes)
    with pytest.raises(ValueError, match="segment_tokens is 0"):
        whole.restore_from_path(path)


@pytest.mark.slow
def test_groups_that_fill_no_minibatch_wait_also_in_a_checkpoint(build, tmp_path):
    config = talking(recorded(0)).rollout(segment_tokens=8).training(minibatch_size=6)
    algo, seen, waited = build(config.copy(copy_frozen=False)), 0, 0
    for _ in range(6):
        waited += algo.train()["env_runners"]["num_open_prompts"] > 0
        groups, seen = (len(algo.keys) - seen) // 2, len(algo.keys)
        assert groups and groups % 3 == 0
    assert waited > 2
    path = algo.save_to_path(str(tmp_path / "checkpoint"))
    algo.train()
    resumed = build(config.copy(copy_frozen=False))
    resumed.restore_from_path(path)
    resumed.train()
    assert resumed.learned == {key: algo.learned[key] for key in resumed.keys}
    assert len(algo.keys) == seen + len(resumed.keys)


def test_the_oldest_weights_of_a_batch_decide_how_old_it_is():
    def sampled_by(version):
        outputs = {WEIGHTS_SEQ_NO: [version]}
        observations, infos = [0, 0], [{}, {}]
        return SingleAgentEpisode(
            observations=observations, actions=[0], rewards=[0.0], infos=infos, terminated=True,
            extra_model_outputs=outputs, len_lookback_buffer=0,
        )  # fmt: skip

    batch = SampledGroups([[sampled_by(4), sampled_by(3)], [sampled_by(5)]], [], {})
    assert batch.oldest_version() == 3


@pytest.mark.parametrize("held", [(3, "another"), (2, "this"), (4, "this")])
def test_weights_are_told_apart_by_version_and_by_hash(held):
    check_weights("It", (3, "this"), (3, "this"))
    with pytest.raises(RuntimeError, match=f"It has .* version {held[0]}, hash {held[1]}; exp"):
        check_weights("It", held, (3, "this"))


@pytest.mark.parametrize(
    "rollout, training, message",
    [
        ({"segment_tokens": 24}, {}, "no completion is longer than max_completion_tokens = 24"),
        ({"max_staleness": 2}, {}, "before it is known which rows go on"),
        ({}, {"max_sampling_rounds": 2}, "fills each batch up with groups"),
        ({}, {"critic_pretraining": {"rollouts": 8}}, "Use critic_pretraining.samples"),
        (
            {},
            {
                "policy_loss": {"name": "lad", "ratio_level": "sequence"},
                "aggregation": "sequence_mean",
                "whiten_advantages": False,
                "entropy_coeff": 0.0,
                "minibatch_size": 8,
            },
            "batches vary in size",
        ),
    ],
)
def test_what_does_not_go_with_segments_is_refused(rollout, training, message):
    config = distrl_config(**training).rollout(**{"segment_tokens": 8, **rollout})
    with pytest.raises(ValueError, match=message):
        config.env_runners(num_env_runners=1).validate()


def test_what_is_under_way_keeps_the_settings_that_it_was_begun_with():
    config = distrl_config().rollout(segment_tokens=8, temperature=0.5)
    config.validate()
    batches = Batches(None, None, None, config)
    then = {**batches.get_state()["settings"], "temperature": 0.7}
    batches.set_state({"open": {}, "waiting": [], "settings": then})
    with pytest.raises(ValueError, match=r"begun with \[rollout\] temperature = 0\.7.*is 0\.5 now"):
        batches.set_state({"open": {(0, 0): []}, "waiting": [], "settings": then})


def test_staleness_is_validated():
    with pytest.raises(ValueError, match="max_staleness is -1"):
        distrl_config().rollout(max_staleness=-1).validate()
    with pytest.raises(ValueError, match=r"max_staleness=2 .* num_env_runners is 0"):
        distrl_config().rollout(max_staleness=2).validate()
    distrl_config().rollout(max_staleness=2).env_runners(num_env_runners=1).validate()


class Finished:
    """An episode of which only the return is read."""

    def __init__(self, total):
        self.total = total

    def get_return(self):
        return self.total


class Rounds:
    """Serves the given rounds of returns, and notes how many groups each was asked for."""

    def __init__(self, *rounds):
        self.rounds, self.asked = list(rounds), []

    def __call__(self, n):
        self.asked.append(n)
        groups = [[Finished(total) for total in returns] for returns in self.rounds.pop(0)]
        assert len(groups) == n
        return SampledGroups(groups, [f"round {len(self.asked)}"], {1: 2 * n})


def returns(groups):
    return [[episode.total for episode in group] for group in groups]


def test_missing_groups_are_sampled_until_the_batch_is_full():
    rounds = Rounds([[0, 0], [1, 0], [1, 1]], [[0, 0], [0, 1]], [[0.5, 0]])
    batch, counts = sample_informative(rounds, 3, max_rounds=10)
    assert rounds.asked == [3, 2, 1]
    assert returns(batch.groups) == [[1, 0], [0, 1], [0.5, 0]]
    assert returns(batch.dropped) == [[0, 0], [1, 1], [0, 0]]
    assert batch.metrics == ["round 1", "round 2", "round 3"]
    assert batch.episodes_per_runner == {1: 12}
    assert counts == {"num_sampling_rounds": 3, "num_dropped_groups": 3}


def test_the_bound_fills_the_batch_with_what_was_dropped():
    rounds = Rounds([[0, 0], [1, 0], [1, 1]], [[0, 0], [0, 0]])
    batch, counts = sample_informative(rounds, 3, max_rounds=2)
    assert returns(batch.groups) == [[1, 0], [0, 0], [1, 1]]
    assert counts == {"num_sampling_rounds": 2, "num_dropped_groups": 2}


def test_one_round_keeps_every_group():
    batch, counts = sample_informative(Rounds([[0, 0], [1, 0]]), 2, max_rounds=1)
    assert returns(batch.groups) == [[0, 0], [1, 0]]
    assert counts == {"num_sampling_rounds": 1, "num_dropped_groups": 0}


def test_real_sampling_counts_every_token_and_serves_fresh_prompts():
    # The tiny model earns nothing: every round is dropped, and the bound ends it.
    config = distrl_config(prompts=4, generations=2, max_sampling_rounds=3)
    algo = config.build_algo()
    try:
        result = algo.train()
        runners = result["env_runners"]
        assert runners["num_sampling_rounds"] == 3
        assert runners["num_dropped_groups"] == 8
        assert runners["num_episodes_lifetime"] == 24
        assert result["learners"]["default_policy"]["advantages_std"] >= 0
    finally:
        algo.stop()


@pytest.mark.parametrize(
    ("rollout", "training", "message"),
    [
        ({}, {"max_sampling_rounds": 0}, "max_sampling_rounds is 0"),
        ({"num_generations": 1}, {"max_sampling_rounds": 2}, "a group of one always has equal"),
        (
            {"max_staleness": 1},
            {"max_sampling_rounds": 2},
            "before it is known what is missing",
        ),
    ],
)
def test_bad_settings_are_refused(rollout, training, message):
    config = distrl_config(**training).rollout(**rollout)
    if rollout.get("max_staleness"):
        config.env_runners(num_env_runners=1)
    with pytest.raises(ValueError, match=message):
        config.validate()
