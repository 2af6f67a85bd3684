"""DistRL that remembers of every batch what it was made of, and helpers to disturb it."""

import os
import signal
import time

from ray.rllib.utils.metrics import WEIGHTS_SEQ_NO

from rllib_distrl.algorithm.distrl import DistRL
from tests.helpers import distrl_config


class RecordedDistRL(DistRL):
    """Checks every batch that is trained on, and remembers it and who contributed to it."""

    def setup(self, config):
        self.keys = set()
        self.learned = {}
        self.contributors = []
        super().setup(config)

    def sample_groups(self):
        batch = super().sample_groups()
        self.contributors.append(batch.episodes_per_runner)
        return batch

    def update_learners(self, groups):
        rollout = self.config.rollout_settings
        segments = rollout.segment_tokens
        assert len(groups) == rollout.prompts_per_iteration or segments
        for group in groups:
            first = [episode.infos[0] for episode in group]
            assert len({(info["row"], info["visit"]) for info in first}) == 1
            assert [info["sample"] for info in first] == list(range(rollout.num_generations))
            for episode, info in zip(group, first, strict=True):
                stamps = episode.extra_model_outputs[WEIGHTS_SEQ_NO].data.tolist()
                assert stamps[-1] <= self.fleet.weights[0] and stamps == sorted(stamps)
                lag = self.fleet.weights[0] - stamps[0]
                assert lag <= rollout.max_staleness or segments
                assert len(set(stamps)) == 1 or segments
                key = (info["row"], info["visit"], info["sample"])
                assert key not in self.keys, f"{key} is used twice"
                self.keys.add(key)
                replies = episode.infos[0].get("replies", ())
                self.learned[key] = (episode.actions.data.tolist(), replies, stamps)
        return super().update_learners(groups)


def recorded(runners, lr=1e-3, **settings):
    """A small configuration with so many remote runners that share two cores."""
    config = distrl_config(prompts=6, generations=2, lr=lr)
    config.algo_class = RecordedDistRL
    config.reporting(metrics_num_episodes_for_smoothing=12)
    return config.env_runners(
        num_env_runners=runners, num_cpus_per_env_runner=0.25, **settings
    ).rollout(max_env_runners=4)


def pid_of(algo, number):
    """Process id of a runner that serves."""
    return int(algo.fleet.name(number).partition("pid ")[2].split()[0])


def kill(pid, signum=signal.SIGKILL):
    os.kill(pid, signum)


def train_until(algo, serving, seconds=120):
    """Trains until so many runners serve; returns all results."""
    give_up, results = time.monotonic() + seconds, []
    while len(algo.fleet.serving()) != serving:
        assert time.monotonic() < give_up, f"{algo.fleet.serving()} serve, wanted {serving}"
        results.append(algo.train())
        time.sleep(0.2)  # leaves the cores to the processes that are starting
    return results


def runner_metric(results, name):
    """Sum over results of a metric of the env runners."""
    return sum(int(result["env_runners"][name]) for result in results)


def held_weights(algo):
    """{runner: version and hash of what its engine holds now, hashed now}."""
    numbers = algo.fleet.serving()
    answers = algo.env_runner_group.foreach_env_runner(
        lambda runner: (runner.engine.version, runner.engine.weights_hash()),
        local_env_runner=False,
        remote_worker_ids=numbers,
    )
    return dict(zip(numbers, answers, strict=True))
