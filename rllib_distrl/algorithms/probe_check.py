"""Comparing what the engines of runners compute with what the learner computes."""

from collections.abc import Mapping
from typing import Any

from rllib_distrl.engines.handshake import Probe, check_probe
from rllib_distrl.learners.probes import score_probes


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
