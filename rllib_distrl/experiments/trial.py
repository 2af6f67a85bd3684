"""One trial of a sweep: a recipe with some settings replaced, as a Tune trainable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ray.tune import PlacementGroupFactory, Stopper, Trainable

from rllib_distrl.experiments.space import ITERATIONS, TOKENS, with_settings
from rllib_distrl.experiments.training import Row, RunLength, Training
from rllib_distrl.recipe import Recipe
from rllib_distrl.runs.log import tokens_generated

MISSING_METRIC = "missing_metric"
_REPORT = "report.json"


class RecipeTrial(Trainable):
    """Trains a recipe's algorithm; reports after every validation, or after every iteration.

    Its config holds `recipe` (tables), `name`, `metric` and `space` ({"table.key": value}).
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Builds the algorithm."""
        self._recipe = trial_recipe(config)
        self._report: dict[str, Any] = {ITERATIONS: 0, "done": False}
        algo = self._recipe.build_config().build_algo()
        self._training = Training(algo, RunLength.of(self._recipe.run))

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Becomes another trial in the same process, which saves the imports."""
        self._training.algo.stop()
        self.setup(new_config)
        return True

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> Any:
        """What the algorithm asks for, so that no more trials run than fit."""
        try:
            algorithm_config: Any = trial_recipe(config).build_config()
        except ValueError:  # `setup` raises it again, where it fails one trial and not the sweep
            return PlacementGroupFactory([{"CPU": 1}])
        return algorithm_config.algo_class.default_resource_request(algorithm_config)

    def step(self) -> dict[str, Any]:
        """Trains up to the next validation, or to the end and validates there.

        A trial that was over when it was saved trains no more; it reports the same again.
        """
        if self._report["done"]:
            return self._report
        training = self._training
        for _ in range(self._recipe.eval.interval or 1):
            training.step()
            if training.over:
                break
        row = training.validate() if self._recipe.eval.interval else training.row
        self._report = self._reported(row, over=training.over)
        return self._report

    def _reported(self, row: Row, *, over: bool) -> dict[str, Any]:
        tokens = tokens_generated(row) or 0
        kept: Row = {key: value for key, value in row.items() if value is not None}
        iterations = kept.pop("iteration")
        for name in ("done", "training_iteration", "pid", "timestamp"):
            kept.pop(name, None)  # Tune's own
        missing = self.config["metric"] not in kept
        if missing:
            kept[MISSING_METRIC] = ", ".join(sorted(kept))
            kept[self.config["metric"]] = float("nan")
        return {**kept, ITERATIONS: iterations, TOKENS: tokens, "done": over or missing}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Writes the algorithm's state and what it reported last."""
        self._training.algo.save_to_path(str(Path(checkpoint_dir).resolve() / "algorithm"))
        (Path(checkpoint_dir) / _REPORT).write_text(json.dumps(self._report), encoding="utf-8")

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Continues from there."""
        folder = Path(checkpoint)
        self._training.algo.restore_from_path(str((folder / "algorithm").resolve()))
        self._report = json.loads((folder / _REPORT).read_text(encoding="utf-8"))
        self._training.row = {"iteration": self._report[ITERATIONS]}

    def cleanup(self) -> None:
        """Stops the algorithm's actors."""
        self._training.algo.stop()


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
