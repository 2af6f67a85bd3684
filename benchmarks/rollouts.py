"""Engine, runner, environment and bare decode loop on the workload."""

from collections.abc import Sequence
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bare import DecodeLoop
from benchmarks.workload import GENERATIONS, LR, PROMPTS, WORKLOADS, Stopwatch, Workload
from rllib_distrl import DistRLConfig
from rllib_distrl.engine import Request, RolloutEngine, SamplingParams
from rllib_distrl.method.prompt_samplers import PromptRequest
from rllib_distrl.model.loading import load_model
from rllib_distrl.rollout.completion_env_runner import CompletionEnvRunner

FIXED = WORKLOADS["fixed"].max_tokens
VISITS = count()


def make_config(models: Path, workload: str, dense: bool = False, **training: Any) -> DistRLConfig:
    """DistRL's defaults on the workload: 64 sequences, one optimiser step."""
    config = DistRLConfig()
    config.environment(
        "distrl_envs:distrl/Custom-v0",
        env_config={"task": "benchmarks.task:WordTask", "task_config": {"dense": dense}},
    )
    config.rl_module(model_config={"model": str(models / workload)})
    config.rollout(
        prompts_per_iteration=PROMPTS,
        num_generations=GENERATIONS,
        max_completion_tokens=WORKLOADS[workload].max_tokens,
    )
    config.env_runners(num_env_runners=0)
    config.training(lr=LR, **training)
    config.debugging(seed=0, log_level="ERROR")
    config.validate()
    return config


def fresh_prompts() -> list[PromptRequest]:
    visit = next(VISITS)
    return [PromptRequest(row, visit) for row in range(PROMPTS)]


def generate(engine: RolloutEngine, prompts: Sequence[Sequence[int]], workload: Workload) -> dict:
    """Samples completions of all prompts."""
    visit, watch = next(VISITS), Stopwatch()
    requests = [
        Request(ids, (0, row, sample, visit))
        for row, ids in enumerate(prompts)
        for sample in range(workload.generations)
    ]
    with watch.running():
        done = engine.generate(requests, SamplingParams(workload.max_tokens))
    return watch.measured(sum(len(completion.tokens) for completion in done))


class Rollouts:
    """Engine, runner and the bare decode loop."""

    def __init__(self, models: Path):
        self.models = models
        self.runners = {
            (name, dense): CompletionEnvRunner(config=make_config(models, name, dense))
            for name, dense in (("fixed", False), ("natural", False), ("fixed", True))
        }
        env = self.runners["fixed", False].token_env
        self.prompts = [env.reset(options={"row": row})[1]["prompt_ids"] for row in range(PROMPTS)]

    def generate(self, workload: str) -> dict:
        engine = self.runners[workload, False].engine
        return generate(engine, self.prompts, WORKLOADS[workload])

    def run_runner(self) -> dict:
        watch = Stopwatch()
        with watch.running():
            report = self.runners["fixed", False].sample_prompts(fresh_prompts(), GENERATIONS)
        return watch.measured(sum(map(len, report.episodes)))

    @cached_property
    def loop(self) -> DecodeLoop:
        return DecodeLoop(load_model(str(self.models / "fixed")))

    def run_loop(self) -> dict:
        watch = Stopwatch()
        with watch.running():
            tokens = self.loop.run(self.prompts, GENERATIONS, FIXED)
        return watch.measured(tokens)

    def token_rewards(self) -> dict:
        """`env.step` on every token of a batch, a reward at each; reset and grading included."""
        env, watch, rewards = self.runners["fixed", True].token_env, Stopwatch(), 0.0
        tokens = np.random.default_rng(0).integers(2, 64, (GENERATIONS * PROMPTS, FIXED))
        with watch.running():
            for number, completion in enumerate(tokens.tolist()):
                env.reset(options={"row": number // GENERATIONS})
                for token in completion:
                    rewards += env.step(token)[1]
        assert rewards > 0
        return watch.measured(tokens.size)
