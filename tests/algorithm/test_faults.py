"""Runners and engines die, hang and fail; training goes on, and nothing is lost or doubled."""

import logging
import os
import signal
import time

import pytest
import ray

from rllib_distrl.algorithm.export import policy_state
from rllib_distrl.rllib_traps import actor_manager
from rllib_distrl.rollout.completion_env_runner import CompletionEnvRunner
from rllib_distrl.rollout.groups import RunnersLostError
from tests.algorithm.recorded_distrl import (
    held_weights,
    kill,
    pid_of,
    recorded,
    runner_metric,
    train_until,
)
from tests.algorithm.test_distrl import assert_same_update
from tests.rollout.test_turns import talking

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.slow]

DEADLINE_S = 8


class Pair:
    """An algorithm that is disturbed, and one that sees the same prompts in peace."""

    def __init__(self, config):
        self.peaceful = recorded(0).build_algo()
        self.algo = config.build_algo()

    def train(self, n=1):
        return [self.algo.train() for _ in range(n)]

    def both_serve(self):
        return train_until(self.algo, serving=2)

    def assert_nothing_was_lost(self):
        while self.peaceful.iteration < self.algo.iteration:
            self.peaceful.train()
        assert self.algo.keys == self.peaceful.keys
        assert set(held_weights(self.algo).values()) == {self.algo.fleet.weights}

    def assert_same_weights(self):
        """Only early on: float noise of other batch sizes grows with every iteration."""
        self.assert_nothing_was_lost()
        assert_same_update(policy_state(self.peaceful), policy_state(self.algo))

    def stop(self):
        self.algo.stop()
        self.peaceful.stop()


@pytest.fixture(scope="module")
def pair(ray_session):
    pair = Pair(recorded(2, sample_timeout_s=DEADLINE_S))
    yield pair
    pair.stop()


def restarts(results):
    return results[-1]["fault_tolerance"]["num_remote_worker_restarts"]


def test_a_killed_runner_is_replaced_and_its_prompts_are_completed(pair):
    before = restarts(pair.train())
    kill(pid_of(pair.algo, 1))
    results = pair.train()
    assert runner_metric(results, "num_failed_env_runners") == 1
    assert runner_metric(results, "num_lost_prompts") == 3
    assert runner_metric(results, "num_env_runners") == 1
    pair.assert_same_weights()
    results = pair.both_serve() + pair.train()
    assert restarts(results) == before + 1
    assert set(pair.algo.contributors[-1].values()) == {6}
    pair.assert_nothing_was_lost()


def test_a_hung_runner_counts_as_dead_after_the_deadline(pair, caplog):
    pair.both_serve()
    name = pair.algo.fleet.name(2)
    kill(pid_of(pair.algo, 2), signal.SIGSTOP)
    started = time.monotonic()
    with caplog.at_level(logging.WARNING, "rllib_distrl"):
        results = pair.train()
    assert time.monotonic() - started >= DEADLINE_S
    assert f"Waiting for {name} since 4 s" in caplog.text
    assert f"{name} has not answered in {DEADLINE_S} s; it is restarted" in caplog.text
    assert runner_metric(results, "num_hung_env_runners") == 1
    assert runner_metric(results, "num_failed_env_runners") == 1
    assert runner_metric(results, "num_lost_prompts") == 3
    pair.both_serve()
    pair.assert_nothing_was_lost()


def test_a_runner_that_was_restarted_unnoticed_does_not_sample_before_it_is_told_the_weights(pair):
    pair.both_serve()
    actor = actor_manager(pair.algo.env_runner_group).actors()[1]
    kill(pid_of(pair.algo, 1))
    give_up = time.monotonic() + 60
    while time.monotonic() < give_up:
        try:
            assert ray.get(actor.ping.remote()) == "pong"
            break
        except ray.exceptions.RayActorError:
            time.sleep(0.2)
    results = pair.train()
    assert runner_metric(results, "num_failed_env_runners") == 1
    assert runner_metric(results, "num_lost_prompts") == 3
    pair.both_serve()
    pair.assert_nothing_was_lost()


def test_a_runner_that_ray_will_not_restart_is_replaced_by_another(pair):
    pair.both_serve()
    numbers = pair.algo.fleet.serving()
    ray.kill(actor_manager(pair.algo.env_runner_group).actors()[numbers[0]])
    results = pair.train() + pair.train() + pair.both_serve()
    assert runner_metric(results, "num_failed_env_runners") == 1
    assert pair.algo.fleet.serving() == [numbers[1], max(numbers) + 1]
    pair.assert_nothing_was_lost()


def test_a_runner_killed_in_the_middle_of_episodes_loses_and_repeats_nothing(tmp_path):
    # With such steps no weight moves: whoever samples the rest, and when, it is the same episode.
    def talker(runners, **rollout):
        return talking(recorded(runners, lr=1e-30)).rollout(**rollout).build_algo()

    whole, resumed = talker(0), talker(0, segment_tokens=7)
    algo = talker(2, segment_tokens=7, max_staleness=1)
    try:
        results = [algo.train()]
        assert runner_metric(results, "num_open_prompts") > 0
        kill(pid_of(algo, 1))
        results += [algo.train()]
        algo.scale_env_runners(1)
        results += [algo.train()]
        assert runner_metric(results, "num_failed_env_runners") == 1
        path, before = algo.save_to_path(str(tmp_path / "kept")), set(algo.keys)
        results += [algo.train()]
        resumed.restore_from_path(path)
        resumed.train()
        assert resumed.keys == algo.keys - before
        rounds = runner_metric(results, "num_sampling_rounds")
        for _ in range(rounds):
            whole.train()
        # Each is learned from once (`RecordedDistRL`), but for those that go on.
        assert runner_metric(results[-1:], "num_open_prompts") == 6 * rounds - len(algo.keys) // 2
        for one in (algo, resumed):
            assert all(row[:2] == whole.learned[key][:2] for key, row in one.learned.items())
    finally:
        for one in (algo, resumed, whole):
            one.stop()


@ray.remote(num_cpus=0)
class Breakages:
    """How many more engines are to break, when they start or in the middle of a batch."""

    def __init__(self):
        self.left = {"start": 0, "batch": 0}

    def plan(self, **left):
        self.left |= left

    def next(self, when):
        self.left[when] -= 1
        return self.left[when] >= 0


class BreakingRunner(CompletionEnvRunner):
    """Its engine breaks as planned: when it starts, or in a batch."""

    up = False  # what is sampled before, to check the engine, is no batch

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.up = True

    def make_engine(self):
        breakages = ray.get_actor("breakages")
        if ray.get(breakages.next.remote("start")):
            raise RuntimeError("the engine cannot start")
        engine = super().make_engine()
        stream = engine.stream

        def stream_or_break(requests, params):
            if self.up and len(requests) > 1 and ray.get(breakages.next.remote("batch")):
                raise RuntimeError("the engine has broken")
            return stream(requests, params)

        engine.stream = stream_or_break
        return engine


def test_a_broken_engine_is_replaced_and_an_error_that_stays_ends_training(caplog):
    breakages = Breakages.options(name="breakages").remote()
    pair = Pair(recorded(2, env_runner_cls=BreakingRunner))
    try:
        ray.get(breakages.plan.remote(batch=1))
        results = pair.train(2)
        assert runner_metric(results, "num_failed_env_runners") == 1
        assert runner_metric(results, "num_lost_prompts") == 3
        pair.assert_same_weights()
        pair.both_serve()
        ray.get(breakages.plan.remote(start=1))
        pair.algo.scale_env_runners(3)
        give_up = time.monotonic() + 120
        while pair.algo.fleet.present() > 2:
            assert time.monotonic() < give_up
            time.sleep(0.2)
            pair.train()
        assert "Env runner 3 cannot start and is not replaced" in caplog.text
        assert "the engine cannot start" in caplog.text

        ray.get(breakages.plan.remote(batch=100))
        with pytest.raises(RuntimeError, match=r"pid \d+ on .*RuntimeError: the engine has broken"):
            pair.train()
    finally:
        pair.stop()
        ray.kill(breakages)


def test_without_runners_training_stops_after_the_set_tries_and_may_go_on(tmp_path):
    config = recorded(1).fault_tolerance(
        num_consecutive_env_runner_failures_tolerance=2, env_runner_health_probe_timeout_s=0.5
    )
    pair = Pair(config)
    try:
        pair.train()
        kill(pid_of(pair.algo, 1))
        with pytest.raises(RunnersLostError, match=r"6 of 6 prompts .* 2 tries in a row"):
            pair.train()
        path = pair.algo.save_to_path(str(tmp_path / "kept"))
        assert pair.algo.fleet.wait_for(1, timeout_s=60)
        pair.train()
        pair.assert_same_weights()
        resumed = recorded(0).build_algo()
        resumed.restore_from_path(path)
        while resumed.iteration < pair.algo.iteration:
            resumed.train()
        assert_same_update(policy_state(resumed), policy_state(pair.algo))
        resumed.stop()
    finally:
        pair.stop()


def test_runners_that_may_not_be_restarted_end_training_at_once():
    algo = recorded(1).fault_tolerance(restart_failed_env_runners=False).build_algo()
    try:
        algo.train()
        kill(pid_of(algo, 1))
        with pytest.raises(RunnersLostError, match="0 of 1 env runners are left"):
            algo.train()
    finally:
        algo.stop()


def test_an_evaluation_whose_runner_dies_is_held_again():
    config = recorded(1).evaluation(
        evaluation_num_env_runners=1,
        evaluation_interval=1,
        evaluation_duration=4,
        evaluation_duration_unit="episodes",
        evaluation_config={"metrics_num_episodes_for_smoothing": 4, "explore": False},
    )
    algo = config.build_algo()
    try:
        first = algo.train()["evaluation"]
        (evaluator,) = algo.eval_env_runner_group.foreach_env_runner(
            lambda runner: os.getpid(), local_env_runner=False
        )
        assert evaluator != pid_of(algo, 1)
        kill(evaluator)
        result = algo.train()
        second = result["evaluation"]
        assert second["num_healthy_workers"] == 1
        assert second["num_remote_worker_restarts"] == 1
        assert second["env_runners"]["num_episodes"] == first["env_runners"]["num_episodes"] == 4
        assert second["env_runners"]["weights_seq_no"] == algo.fleet.weights[0]
        assert runner_metric([result], "num_failed_env_runners") == 0
    finally:
        algo.stop()
