"""A control for critics that are told the verifier's state: that of another problem."""

from collections.abc import Sequence

from distrl_envs.task import Problem, Turn
from distrl_envs.tasks.countdown import CountdownTask


class Placebo(CountdownTask):
    """Countdown, whose critic is told how the same answer would stand to the next problem.

    Its name is Countdown's, of which its problems are drawn.
    """

    def critic_observation(
        self, problem: Problem, turns: Sequence[Turn], texts: Sequence[str]
    ) -> list[tuple[float, ...]]:
        """As Countdown's, of the row behind this one."""
        return super().critic_observation(self.problem(problem.row + 1), turns, texts)
