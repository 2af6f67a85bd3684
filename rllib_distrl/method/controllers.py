"""Controllers: small objects with state that move a coefficient between iterations."""

from rllib_distrl.method.registry import register


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
