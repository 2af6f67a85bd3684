"""The learner, alone and inside a whole iteration, and the bare update."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from ray.rllib.core.columns import Columns

from benchmarks.bare import Update
from benchmarks.rollouts import Rollouts, fresh_prompts, make_config
from benchmarks.workload import GENERATIONS, PROMPT_TOKENS, Stopwatch
from rllib_distrl.model.loading import load_model
from tests.helpers import local_learner

N_QUANTILES = 16


def learn(learner: Any, episodes: list[Any]) -> dict:
    """One update from episodes."""
    watch = Stopwatch()
    with watch.running():
        learner.update(episodes=episodes, timesteps={}, num_epochs=1)
    return watch.measured(sum(map(len, episodes)))


def train(algorithm: Any) -> dict:
    """A whole iteration."""
    watch = Stopwatch()
    with watch.running():
        result = algorithm.train()
    return watch.measured(int(result["env_runners"]["num_env_steps_sampled"]))


class Updates:
    """The learner, alone and inside a whole iteration, and the bare update."""

    SETTINGS = {  # noqa: RUF012
        "shared": {"critic": "shared", "n_quantiles": N_QUANTILES},
        "separate": {"critic": "separate", "n_quantiles": N_QUANTILES},
        "scalar": {"critic": "separate", "n_quantiles": 1, "bonus_coeff": 0.0},
        "quantile": {"critic": "separate", "n_quantiles": N_QUANTILES, "bonus_coeff": 0.0},
    }

    def __init__(self, models: Path, rollouts: Rollouts):
        self.algorithms = {
            name: make_config(models, "fixed", **settings).build_algo()
            for name, settings in self.SETTINGS.items()
        }
        report = rollouts.runners["fixed", False].sample_prompts(fresh_prompts(), GENERATIONS)
        self.episodes = report.episodes
        self.bare = Update(load_model(str(models / "fixed")), N_QUANTILES)

    def learn(self, name: str) -> dict:
        return learn(local_learner(self.algorithms[name]), self.episodes)

    def train(self, name: str) -> dict:
        return train(self.algorithms[name])

    def learn_bare(self) -> dict:
        columns = {
            "ids": np.stack([[*e.infos[0]["prompt_ids"], *e.actions.data] for e in self.episodes]),
            "logps": np.stack(
                [e.extra_model_outputs[Columns.ACTION_LOGP].data for e in self.episodes]
            ),
            "rewards": np.stack([e.rewards.data for e in self.episodes]),
        }
        tensors = {name: torch.from_numpy(column) for name, column in columns.items()}
        watch = Stopwatch()
        with watch.running():
            tokens = self.bare.run(**tensors, prompt=PROMPT_TOKENS)
        return watch.measured(tokens)
