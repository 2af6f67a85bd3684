"""Whole episodes in whole groups to one learner or several."""

from typing import Any

import ray
from ray.rllib.env.single_agent_episode import SingleAgentEpisode


def shards_of(groups: list[list[SingleAgentEpisode]], learners: int) -> list[ray.ObjectRef]:
    """One reference per learner: learner r gets the groups r, r + learners, r + 2 learners …."""
    return [
        ray.put([episode for group in groups[rank::learners] for episode in group])
        for rank in range(learners)
    ]


def update_learners(
    learner_group: Any,
    learners: int,
    groups: list[list[SingleAgentEpisode]],
    settings: dict[str, Any],
) -> list[Any]:
    """Lets the learners learn from a batch.

    Args:
        learner_group: RLlib's.
        learners: how many learner actors there are; 0 or 1: all data to one.
        groups: the batch; several learners divide them, so that each gets as many.
        settings: further arguments of `LearnerGroup.update`.

    Returns:
        The learners' metrics.
    """
    if learners <= 1:
        episodes = [episode for group in groups for episode in group]
        return learner_group.update(episodes=episodes, **settings)
    # One reference per learner keeps episodes and groups whole: given episodes, Ray 2.60
    # cuts them in the middle (utils/minibatch_utils.py, ShardEpisodesIterator).
    shards = shards_of(groups, learners)
    return learner_group.update(episodes_refs=shards, **settings)
