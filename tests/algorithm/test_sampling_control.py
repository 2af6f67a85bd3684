"""What is sampled follows what was learned: temperature, and completions per prompt."""

import pytest

from rllib_distrl.algorithm.export import policy_state
from tests.algorithm.test_distrl import assert_same_weights, learner_metrics
from tests.helpers import distrl_config

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]


def watch(algo):
    """Per iteration: the groups' sizes and the temperatures of what is learned from."""
    update, seen = algo.update_learners, []

    def watched(groups):
        sampled = {one.infos[0]["sampling"]["temperature"] for group in groups for one in group}
        samples = [[one.infos[0]["sample"] for one in group] for group in groups]
        assert samples == [list(range(len(group))) for group in groups]
        seen.append((sorted(map(len, groups)), sampled))
        return update(groups)

    algo.update_learners = watched
    return seen


def test_groups_and_temperature_vary_and_a_checkpoint_continues_both(build, tmp_path):
    config = distrl_config(
        prompts=4,
        generations=4,
        minibatch_size=8,
        advantage={"name": "rloo"},
        prompt_sampler={"name": "beta_counts", "pool": 6},
        allocator={"name": "sqrt_variance", "n_min": 2, "decay": 1.0},
        controllers=[{"name": "entropy_temperature", "target": 0.6}],
    )
    algo = build(config.copy(copy_frozen=False))
    seen, temperature = watch(algo), 1.0
    for _ in range(3):
        metrics = learner_metrics(algo.train())
        assert metrics["num_module_steps_trained"] > 0
        # The learner's distribution is the sampler's at every temperature.
        assert metrics["logp_mismatch_max"] == pytest.approx(1.0, abs=1e-4)
        sizes, sampled = seen[-1]
        assert sum(sizes) == 16 and sizes[0] >= 2
        assert sampled == {temperature}
        temperature = metrics["sampling_temperature"]
        assert temperature != 1.0
    assert seen[0][0] == [4, 4, 4, 4] and len({tuple(sizes) for sizes, _ in seen}) > 1
    path = algo.save_to_path(str(tmp_path / "checkpoint"))
    algo.train()
    resumed = build(config.copy(copy_frozen=False))
    resumed.restore_from_path(path)
    again = watch(resumed)
    resumed.train()
    assert again == seen[-1:]
    assert_same_weights(policy_state(resumed), policy_state(algo))
    module = resumed.learner_group.foreach_learner(lambda one: one.policy_module.temperature)
    assert next(result.get() for result in module) == 1.0
