"""What several test modules build and start."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from rllib_distrl.algorithm.distrl import DistRLConfig
from rllib_distrl.model.loading import load_model, load_tokenizer
from rllib_distrl.rllib_traps import given_model_config

COUNTDOWN = "distrl_envs:distrl/Countdown-v0"
TINY = "builtin:countdown-tiny"


def distrl_config(model=TINY, prompts=4, generations=2, **training):
    """A configuration small enough for tests."""
    return (
        DistRLConfig()
        .environment(COUNTDOWN)
        .rl_module(model_config={"model": model})
        .rollout(
            prompts_per_iteration=prompts, num_generations=generations, max_completion_tokens=24
        )
        .training(**{"lr": 1e-3, **training})
        .debugging(seed=1)
    )


def save_untied(path):
    """The tiny model, whose embedding is its head, with a head of its own, as a folder."""
    model = load_model(TINY)
    model.config.tie_word_embeddings = False
    head = model.get_output_embeddings()
    noise = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(0))
    head.weight = torch.nn.Parameter(head.weight.detach() + 0.02 * noise)
    model.save_pretrained(path)
    load_tokenizer(TINY).save_pretrained(path)
    return str(path)


def start_python(
    *arguments: str | Path, cwd: Path | None = None, **pipes: Any
) -> subprocess.Popen[str]:
    """Python in a session of its own, which finds the modules that this process finds."""
    path = os.pathsep.join(map(os.path.abspath, sys.path))
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path},
        text=True,
        start_new_session=True,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **pipes},
    )


def local_learner(algo):
    """The learner of an algorithm that learns in this process."""
    (result,) = algo.learner_group.foreach_learner(lambda learner: learner)
    return result.get()


def with_model_config(config, **settings):
    """Adds to what `rl_module(model_config=...)` was given."""
    return config.rl_module(model_config={**given_model_config(config), **settings})
