"""A random actor dies every few seconds, and the books agree at the end."""

import os
import random
import threading
import time

import pytest

from tests.algorithm.recorded_distrl import (
    held_weights,
    kill,
    pid_of,
    recorded,
    runner_metric,
    train_until,
)

pytestmark = [
    pytest.mark.usefixtures("ray_session"),
    pytest.mark.slow,
    pytest.mark.timeout(600),
]

ITERATIONS, DEATHS, EVALUATORS, EVERY_S = 12, 3, 1, 3.0


class Chaos(threading.Thread):
    """Kills a random process of a runner every few seconds, each process once."""

    def __init__(self, algo):
        super().__init__(daemon=True)
        self.algo, self.random, self.enough = algo, random.Random(0), threading.Event()
        self.killed, self.evaluators = set(), set()

    def run(self):
        while not self.enough.wait(EVERY_S):
            victims = {pid_of(self.algo, number) for number in self.algo.fleet.serving()}
            evaluators = self.algo.eval_env_runner_group.foreach_env_runner(
                lambda runner: os.getpid(),
                local_env_runner=False,
                timeout_seconds=0.5,
            )
            if len(self.evaluators) < EVALUATORS:
                victims |= set(evaluators)
            alive = sorted(victims - self.killed)
            if not alive:
                continue
            victim = self.random.choice(alive)
            kill(victim)
            (self.evaluators if victim in evaluators else self.killed).add(victim)


def test_chaos():
    config = recorded(3).evaluation(
        evaluation_num_env_runners=1,
        evaluation_interval=4,
        evaluation_duration=4,
        evaluation_duration_unit="episodes",
    )
    algo = config.build_algo()
    chaos = Chaos(algo)
    try:
        results = [algo.train()]
        chaos.start()
        while len(results) < ITERATIONS or len(chaos.killed) < DEATHS:
            results.append(algo.train())
            time.sleep(0.3)
        chaos.enough.set()
        chaos.join()
        results += [algo.train(), *train_until(algo, serving=3), algo.train()]

        assert runner_metric(results, "num_failed_env_runners") == len(chaos.killed)
        assert runner_metric(results, "num_hung_env_runners") == 0
        assert results[-1]["fault_tolerance"]["num_remote_worker_restarts"] == len(chaos.killed)
        assert len(algo.keys) == 12 * len(results)
        assert results[-1]["env_runners"]["num_episodes_lifetime"] == 12 * len(results)
        assert sum(sum(share.values()) for share in algo.contributors) == 12 * len(results)
        held = held_weights(algo)
        assert len(held) == 3
        assert set(held.values()) == {algo.fleet.weights}
        assert algo.contributors[-1] == dict.fromkeys(held, 4)
    finally:
        chaos.enough.set()
        algo.stop()
