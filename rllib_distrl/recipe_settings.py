"""The tables `[run]` and `[eval]` of a recipe."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from rllib_distrl.trackers import check_trackers


@dataclass(frozen=True)
class RunSettings:
    """The `[run]` table.

    Attributes:
        algorithm: A registered algorithm ("DistRL") or one of RLlib's own ("PPO").
        model: A Hugging Face id, a folder, or "builtin:countdown".
        name: Names the default output folder; the recipe's file name without ending if empty.
        iterations: Training iterations, where there is no budget of tokens.
        budget_tokens: Training ends with the first iteration by which so many completion tokens
            have been generated, those that were dropped or only trained the critic included and
            evaluations not; 0 means that `iterations` ends it.
        seed: Seeds sampling, initialisation and shuffling.
        checkpoint_interval: Iterations between checkpoints; 0 means only at the end.
        keep_checkpoints: How many of the newest checkpoints stay on disk.
        checkpoint_metric: A key of `progress.jsonl` such as
            "evaluation/env_runners/episode_return_mean": a checkpoint is also written whenever it
            is better than ever, and the best one stays; "" means none.
        checkpoint_mode: Whether the best has the highest ("max") or the lowest ("min") value.
        storage: A folder on another file system, such as "s3://bucket/folder" or
            "file:///mnt/disk": the run is copied below it with every checkpoint, and resumed from
            there where its folder is gone; "" means none.
        log_interval: Iterations between printed lines where there is no terminal.
        trackers: Experiment trackers, `{name = "wandb" | "mlflow", ...}` each; what follows the
            name goes to Ray's callback (`project`, `group`; `tracking_uri`, `experiment_name`).
    """

    algorithm: str = "DistRL"
    model: str = "builtin:countdown"
    name: str = ""
    iterations: int = 200
    budget_tokens: int = 0
    seed: int = 0
    checkpoint_interval: int = 50
    keep_checkpoints: int = 2
    checkpoint_metric: str = ""
    checkpoint_mode: Literal["max", "min"] = "max"
    storage: str = ""
    log_interval: int = 10
    trackers: tuple[dict[str, Any], ...] = ()

    def validate(self) -> None:
        """Raises ValueError for numbers outside their bounds."""
        _at_least("run", self, 1, "iterations", "keep_checkpoints", "log_interval")
        _at_least("run", self, 0, "seed", "budget_tokens", "checkpoint_interval")
        check_trackers(self.trackers)
        for key in ("algorithm", "model"):
            if not getattr(self, key).strip():
                raise ValueError(f"run.{key} is empty. Name one.")
        if self.name and not re.fullmatch(r"[\w][\w.+-]*", self.name):
            raise ValueError(
                f"run.name: {self.name!r} cannot name a folder. Use letters, digits, '-', '_', '.'."
            )


@dataclass(frozen=True)
class EvalSettings:
    """The `[eval]` table.

    Attributes:
        problems: Distinct problems of the evaluation before and after training.
        n: Completions per problem.
        k: The k of pass@k; each at most n.
        before: Whether the model is evaluated before training too.
        split: Which problems the evaluation before and after training uses.
        temperature: Sampling temperature of evaluation.
        top_p: Nucleus of evaluation.
        interval: Iterations between validations while training (RLlib's evaluation); 0 means none.
        validation_problems: Problems of one validation, the same every time, each completed
            `rollout.evaluation_generations` times.
        critic_prefixes: Held-out completions that are cut at a random token, to see whether the
            critic is right there, after training and in `distrl eval`; 0 means none.
        critic_continuations: Completions from each such prefix.
        token_problems: Validation problems whose completions, one group each, are stored with what
            the critic thought at every token once training ends (`distrl view`); 0 means none.
    """

    problems: int = 200
    n: int = 64
    k: tuple[int, ...] = (1, 8)
    before: bool = True
    split: Literal["train", "validation", "test"] = "test"
    temperature: float = 1.0
    top_p: float = 1.0
    interval: int = 0
    validation_problems: int = 100
    critic_prefixes: int = 200
    critic_continuations: int = 32
    token_problems: int = 64

    def validate(self) -> None:
        """Raises ValueError for numbers outside their bounds."""
        _at_least("eval", self, 1, "problems", "n", "validation_problems", "critic_continuations")
        _at_least("eval", self, 0, "interval", "token_problems", "critic_prefixes")
        if not self.k:
            raise ValueError("eval.k is empty. List at least one k, for example k = [1, 8].")
        for k in self.k:
            if not 1 <= k <= self.n:
                raise ValueError(
                    f"eval.k: pass@{k} needs 1 <= k <= n and eval.n is {self.n}. "
                    "Raise eval.n or lower k."
                )
        if self.temperature <= 0:
            raise ValueError(f"eval.temperature: wanted more than 0, got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"eval.top_p: wanted 0 < top_p <= 1, got {self.top_p}.")


def _at_least(table: str, settings: Any, bound: int, *keys: str) -> None:
    for key in keys:
        value = getattr(settings, key)
        if value < bound:
            raise ValueError(f"{table}.{key}: wanted at least {bound}, got {value}.")
