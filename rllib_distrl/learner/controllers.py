"""Controllers at work: coefficients of the loss that move between iterations."""

from typing import Any

from rllib_distrl.maths.statistics import masked_mean
from rllib_distrl.method.batch import SequenceBatch
from rllib_distrl.method.registry import resolve


class Controllers:
    """The controllers that a configuration names; each moves one setting of `[training]`."""

    def __init__(self, specs: list[dict[str, Any]]):
        """Starts them.

        Args:
            specs: `{"name": ..., **settings}` of each.

        Raises:
            ValueError: for an unknown controller, or a setting out of bounds.
        """
        self._controllers = {spec["name"]: resolve("controller", spec)() for spec in specs}

    def update(self, batch: SequenceBatch) -> dict[str, float]:
        """Shows them an iteration's batch, over all learners.

        Args:
            batch: with ``entropy``, where there is a controller.

        Returns:
            Setting to the value that holds in this iteration.
        """
        if not self._controllers:
            return {}
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
