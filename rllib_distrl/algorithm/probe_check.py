"""Comparing what the engines of runners compute with what the learner computes."""

import logging
from collections.abc import Mapping
from typing import Any

from rllib_distrl.engine.weight_proof import Probe, check_probe
from rllib_distrl.learner.token_table import score_probes

logger = logging.getLogger(__name__)


# The 95th percentile of the ratio between sampler and learner that is usual, by the coarser type.
# Our choice, from mean |logp differences| of engines (see `PROBE_TOLERANCE`), not from runs.
_USUAL_RATIO = {"float32": 1.05, "bfloat16": 1.5}


class MismatchWarning:
    """Says once that what samples is not what learns, where nothing explains it.

    Args:
        config: Of the algorithm.
    """

    def __init__(self, config: Any):
        rollout = config.rollout_settings
        # Older weights and cut distributions differ by design.
        exact = not rollout.max_staleness and rollout.top_p == 1 and rollout.top_k == 0
        low = "bfloat16" in (rollout.dtype, {"bf16": "bfloat16"}.get(config.precision))
        self._dtype = "bfloat16" if low else "float32"
        self._said = not exact

    def __call__(self, ratio: float) -> None:
        """Warns if a ratio, `logp_mismatch_p95`, is far outside its usual range."""
        usual = _USUAL_RATIO[self._dtype]
        if self._said or ratio <= usual:
            return
        self._said = True
        logger.warning(
            "WHAT SAMPLES IS NOT WHAT LEARNS: before the first step probabilities differ by a "
            "factor of %.3g at one token in twenty; in %s at most %g is usual. Every gradient is "
            "biased by it. Look at logp_mismatch_p95; [rollout] dtype = 'float32' and another "
            "engine tell whether rounding is the cause, importance_correction = 'truncated' "
            "corrects for it.",
            ratio,
            self._dtype,
            usual,
        )


class ProbeCheck:
    """Lets a learner score the probes of runners that have loaded its weights.

    Attributes:
        error: mean |logp difference| of the worst probe of the last check.

    Args:
        learner_group: the algorithm's.
        model_config: of its module: the types in which engines and learners compute, the coarser
            one of which decides what is tolerated.
        timeout_s: how long the learners may take.
    """

    def __init__(self, learner_group: Any, model_config: Mapping[str, Any], timeout_s: float):
        self._learner_group, self._timeout_s = learner_group, timeout_s
        low = model_config.get("precision") == "bf16"
        self._dtype = "bfloat16" if low else model_config["rollout"]["dtype"]
        self.error = 0.0

    def __call__(self, probes: Mapping[str, Probe]) -> None:
        """Checks the probe of each runner, by its name.

        Raises:
            RuntimeError: a runner's logps are not the learner's.
            TimeoutError: no learner has answered.
        """
        if not probes:
            return
        results = self._learner_group.foreach_learner(
            score_probes, probes=list(probes.values()), timeout_seconds=self._timeout_s
        )
        scored = [result.get() for result in results.ignore_errors()]
        if not scored:
            raise TimeoutError(f"No learner has scored the probes within {self._timeout_s:g} s.")
        self.error = max(
            check_probe(name, probe, logps, self._dtype)
            for (name, probe), logps in zip(probes.items(), scored[0], strict=True)
        )
