"""Dynamic sampling (DAPO): groups whose returns are all equal are sampled anew."""

from collections import Counter
from collections.abc import Callable, Sequence

from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from rllib_distrl.algorithm.sampling import SampledGroups

NUM_SAMPLING_ROUNDS = "num_sampling_rounds"
NUM_DROPPED_GROUPS = "num_dropped_groups"


def is_informative(group: Sequence[SingleAgentEpisode]) -> bool:
    """Says whether a group's returns differ: where they do not, group advantages are zero."""
    returns = [episode.get_return() for episode in group]
    return max(returns) > min(returns)


def sample_informative(
    sample: Callable[[int], SampledGroups], n_groups: int, max_rounds: int
) -> tuple[SampledGroups, dict[str, int]]:
    """Samples fresh prompts in place of uninformative groups until the batch is full.

    Yu et al. 2025 (arXiv 2503.14476, section 3.2), with the task's returns. Each round asks for
    as many groups as are missing (our choice; the paper oversamples). What ``max_rounds`` leave
    open is filled with uninformative groups, so that batches have one size.

    Args:
        sample: completes so many fresh prompts.
        n_groups: groups of a batch.
        max_rounds: bound on the rounds; 1 keeps every group.

    Returns:
        The batch, with the groups that it leaves out as ``dropped``, and counts to log.
    """
    kept: list[list[SingleAgentEpisode]] = []
    dull: list[list[SingleAgentEpisode]] = []
    metrics, per_runner, rounds = [], Counter[int](), 0
    while len(kept) < n_groups and rounds < max_rounds:
        batch = sample(n_groups - len(kept))
        rounds += 1
        for group in batch.groups:
            (kept if max_rounds == 1 or is_informative(group) else dull).append(group)
        metrics.extend(batch.metrics)
        per_runner.update(batch.episodes_per_runner)
    missing = n_groups - len(kept)
    whole = SampledGroups(kept + dull[:missing], metrics, dict(per_runner), tuple(dull[missing:]))
    return whole, {NUM_SAMPLING_ROUNDS: rounds, NUM_DROPPED_GROUPS: len(whole.dropped)}
