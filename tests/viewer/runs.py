"""Run folders made up for the tests, as `distrl train` leaves them."""

import json

import numpy as np
import pandas as pd

from rllib_distrl.recipe import recipe_from_tables
from rllib_distrl.runs.folder import create_run
from tests.viewer.tables import make_table

RECIPE = {
    "run": {"model": "builtin:countdown-tiny", "iterations": 4},
    "environment": {"env": "distrl_envs:distrl/Countdown-v0"},
}


def make_run(path, returns=(0.1, 0.2, 0.3, 0.4), lr=1e-3, tokens=True):
    run = create_run(path, recipe_from_tables({**RECIPE, "training": {"lr": lr}}, "tiny"), ["x"])
    rows = [
        {
            "iteration": i + 1,
            "env_runners/episode_return_mean": value,
            "env_runners/grade_status/correct": i,
            "env_runners/grade_status/wrong": 4 - i,
            "timers/env_runner_sampling_timer": 1.0,
            "timers/learner_update_timer": 2.0,
            "learners/default_policy/logp_mismatch_max": None if i == 1 else 1.5,
            "learners/default_policy/quantile_coverage_50": 0.5,
            **{f"learners/default_policy/quantile_pit_{b}": 0.1 for b in range(10)},
        }
        for i, value in enumerate(returns)
    ]
    run.progress_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run.write_eval({"before": {"avg@4": 0.25}, "after": {"avg@4": 0.5}})
    run.samples.mkdir()
    for when, correct in (("before", 1), ("after", 2)):
        frame = pd.DataFrame(
            {
                "problem": np.repeat(np.arange(3), 4),
                "sample": np.tile(np.arange(4), 3),
                "score": np.tile([1.0] * correct + [0.0] * (4 - correct), 3),
                "status": np.tile(["correct"] * correct + ["wrong"] * (4 - correct), 3),
                "finish_reason": "stop",
                "answer": "1",
                "prompt": "p",
                "completion": "c",
            }
        )
        frame.to_parquet(run.samples / f"{when}.parquet")
    if tokens:
        make_table(completions=12, generations=4).to_parquet(run.tokens_file)
    return path
