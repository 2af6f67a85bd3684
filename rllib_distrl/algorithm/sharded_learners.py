"""A group of learners of which none has the whole state."""

from typing import Any

from ray.rllib.core import COMPONENT_LEARNER
from ray.rllib.core.learner.learner_group import LearnerGroup


class ShardedLearnerGroup(LearnerGroup):
    """Asks all learners at once for what RLlib's own group (Ray 2.60) asks the first one for."""

    _worker_manager: Any

    def get_state(
        self, components: Any = None, *, not_components: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """RLlib's state, put together by all learners.

        Raises:
            RuntimeError: where a learner is lost.
        """
        if not self._check_component(COMPONENT_LEARNER, components, not_components):
            return {}
        if lost := len(self) - self._worker_manager.num_healthy_actors():
            raise RuntimeError(
                f"{lost} of {len(self)} learners are lost, and with them their shares of the "
                "weights. Go on from the last checkpoint."
            )
        wanted = self._get_subcomponents(COMPONENT_LEARNER, components)
        unwanted = self._get_subcomponents(COMPONENT_LEARNER, not_components)

        def answer(learner: Any, _: Any = None) -> Any:
            return learner.get_state(wanted, not_components=unwanted, **kwargs)

        states = self._get_results(self.foreach_learner(answer))
        return {COMPONENT_LEARNER: next(filter(None, states))}

    def save_to_path(self, path: Any = None, *, state: Any = None, **kwargs: Any) -> str:
        """Writes what `get_state` gives; the first learner alone could not."""
        return super().save_to_path(path, state=state or self.get_state(), **kwargs)
