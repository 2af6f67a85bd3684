"""Controllers: small objects with state that move a coefficient between iterations."""

from collections.abc import Sequence
from typing import Any

from rllib_distrl.maths.statistics import masked_mean
from rllib_distrl.method.batch import SequenceBatch
from rllib_distrl.method.registry import Stage, register


@register("controller", "adaptive_entropy", needs=("entropy",))
class AdaptiveEntropy:
    """Keeps the entropy near a target by the entropy bonus's coefficient (Skywork-OR1).

    Before each update c moves by ± `step`, up where H < `target`; the bonus acts only there.

    Attributes:
        setting: What it moves.
    """

    setting = "entropy_coeff"

    def __init__(
        self, *, target: float = 0.2, step: float = 1e-4, maximum: float = 5e-3, start: float = 0.0
    ):
        if not 0.0 <= start <= maximum or step <= 0.0:
            raise ValueError(
                f"adaptive_entropy needs 0 <= start <= maximum and step > 0, got start={start}, "
                f"maximum={maximum}, step={step}"
            )
        self._target, self._step, self._maximum = target, step, maximum
        self._coeff = start

    def update(self, entropy: float) -> float:
        """Takes the entropy before an update and gives the coefficient to use in it.

        Args:
            entropy: Mean token entropy of the iteration's batch, in nats.

        Returns:
            `entropy_coeff` ≥ 0.
        """
        below = entropy < self._target
        moved = self._coeff + (self._step if below else -self._step)
        self._coeff = min(max(moved, 0.0), self._maximum)
        return self._coeff if below else 0.0

    def get_state(self) -> dict[str, float]:
        """What a checkpoint must hold."""
        return {"coeff": self._coeff}

    def set_state(self, state: dict[str, float]) -> None:
        """Restores `get_state()`'s result."""
        self._coeff = state["coeff"]


class Controllers:
    """The controllers of a method at work; each moves one setting of `[training]`."""

    def __init__(self, stages: Sequence[Stage]):
        """Starts them.

        Raises:
            ValueError: for a setting out of bounds.
        """
        self._stages = stages
        self._controllers = {stage.name: stage() for stage in stages}

    def update(self, batch: SequenceBatch) -> dict[str, float]:
        """Shows them an iteration's batch, over all learners.

        Args:
            batch: with ``entropy``, where there is a controller.

        Returns:
            Setting to the value that holds in this iteration.
        """
        if not self._controllers:
            return {}
        for stage in self._stages:
            stage.prepare(batch)
        entropy = float(masked_mean(batch.column("entropy"), batch.loss_mask, batch.all_reduce))
        return {each.setting: each.update(entropy) for each in self._controllers.values()}

    def get_state(self) -> dict[str, Any]:
        """What a checkpoint must hold, by name."""
        return {name: each.get_state() for name, each in self._controllers.items()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from ``state``; a controller that is not in it starts afresh."""
        for name, each in self._controllers.items():
            if name in state:
                each.set_state(state[name])
