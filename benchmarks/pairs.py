"""Two runners, and two bare loops, in processes of their own."""

import time
from pathlib import Path
from typing import Any

import ray
import torch

from benchmarks.rollouts import VISITS, Rollouts, make_config
from benchmarks.workload import GENERATIONS, PROMPTS, Stopwatch
from rllib_distrl.method.prompt_samplers import PromptRequest
from rllib_distrl.rollout.completion_env_runner import CompletionEnvRunner


@ray.remote
class LoopActor:
    """A bare decode loop in a process of its own."""

    def __init__(self, models: Path):
        torch.set_num_threads(1)
        self.rollouts = Rollouts(models)

    def run(self, n: int) -> tuple[int, float]:
        started = time.process_time()
        tokens = sum(self.rollouts.run_loop()["tokens"] for _ in range(n))
        return tokens, time.process_time() - started


@ray.remote
class RunnerActor(CompletionEnvRunner):
    """An env runner in a process of its own, as RLlib makes them."""

    def run(self, visits: list[int]) -> tuple[list[Any], float]:
        started, reports = time.process_time(), []
        for visit in visits:
            prompts = [PromptRequest(row, visit) for row in range(PROMPTS)]
            reports.append(self.sample_prompts(prompts, GENERATIONS))
        return reports, time.process_time() - started


class Pairs:
    """Two processes side by side; wall time until both have answered with what they made."""

    BATCHES = 3

    def __init__(self, models: Path):
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
        self.loops = [LoopActor.remote(models) for _ in range(2)]
        config = make_config(models, "fixed")
        self.runners = [
            RunnerActor.remote(config=config, worker_index=index + 1) for index in range(2)
        ]
        self.run_loops(), self.run_runners()

    def run_loops(self) -> dict:
        watch = Stopwatch()
        with watch.running():
            answers = ray.get([actor.run.remote(self.BATCHES) for actor in self.loops])
        watch.cpu += sum(cpu for _, cpu in answers)
        return watch.measured(sum(tokens for tokens, _ in answers))

    def run_runners(self) -> dict:
        watch = Stopwatch()
        visits = [[next(VISITS) for _ in range(self.BATCHES)] for _ in self.runners]
        with watch.running():
            answers = ray.get(
                [actor.run.remote(own) for actor, own in zip(self.runners, visits, strict=True)]
            )
        watch.cpu += sum(cpu for _, cpu in answers)
        reports = [report for reports, _ in answers for report in reports]
        return watch.measured(sum(len(e) for report in reports for e in report.episodes))
