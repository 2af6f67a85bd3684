"""One trial of a sweep: a recipe with some settings replaced, as a Tune trainable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ray.tune import PlacementGroupFactory, Stopper, Trainable

from rllib_distrl.recipe import Recipe
from rllib_distrl.run_log import flatten_result, tokens_generated
from rllib_distrl.sweeps.space import with_settings

ITERATIONS = "iterations"
MISSING_METRIC = "missing_metric"
_PROGRESS = "progress.json"


class RecipeTrial(Trainable):
    """Trains a recipe's algorithm; reports after every validation, or after every iteration.

    Its config holds `recipe` (tables), `name`, `metric` and `space` ({"table.key": value}).
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Builds the algorithm."""
        self._recipe = trial_recipe(config)
        self._iterations = 0
        self._algo = self._recipe.build_config().build_algo()

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> Any:
        """What the algorithm asks for, so that no more trials run than fit."""
        try:
            algorithm_config: Any = trial_recipe(config).build_config()
        except ValueError:  # `setup` raises it again, where it fails one trial and not the sweep
            return PlacementGroupFactory([{"CPU": 1}])
        return algorithm_config.algo_class.default_resource_request(algorithm_config)

    def step(self) -> dict[str, Any]:
        """Trains up to the next validation."""
        run, interval = self._recipe.run, self._recipe.eval.interval or 1
        for _ in range(interval):
            result: dict[str, Any] = self._algo.train()
            self._iterations += 1
            row = flatten_result(result)
            tokens = tokens_generated(row) or 0
            over = self._iterations >= run.iterations
            if tokens >= run.budget_tokens if run.budget_tokens else over:
                over = True
                break
        kept: dict[str, Any] = {key: value for key, value in row.items() if value is not None}
        for name in ("done", "training_iteration", "pid", "timestamp"):
            kept.pop(name, None)  # Tune's own
        missing = self.config["metric"] not in kept
        if missing:
            kept[MISSING_METRIC] = ", ".join(sorted(kept))
            kept[self.config["metric"]] = float("nan")
        return {**kept, ITERATIONS: self._iterations, "tokens": tokens, "done": over or missing}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Writes the algorithm's state and how far it is."""
        self._algo.save_to_path(str(Path(checkpoint_dir).resolve() / "algorithm"))
        progress = json.dumps({ITERATIONS: self._iterations})
        (Path(checkpoint_dir) / _PROGRESS).write_text(progress, encoding="utf-8")

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Continues from there."""
        folder = Path(checkpoint)
        self._algo.restore_from_path(str((folder / "algorithm").resolve()))
        progress = json.loads((folder / _PROGRESS).read_text(encoding="utf-8"))
        self._iterations = progress[ITERATIONS]

    def cleanup(self) -> None:
        """Stops the algorithm's actors."""
        self._algo.stop()


class StopWithoutMetric(Stopper):
    """Ends the whole sweep at the first trial that does not report the metric."""

    def __init__(self) -> None:
        self._missing = False

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Looks at a trial's report."""
        self._missing = self._missing or MISSING_METRIC in result
        return self._missing

    def stop_all(self) -> bool:
        """Whether the sweep ends."""
        return self._missing


def trial_recipe(config: dict[str, Any]) -> Recipe:
    """The recipe of a trial's config."""
    return with_settings(config["recipe"], config["space"], config["name"])
