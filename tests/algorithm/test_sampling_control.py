"""What is sampled follows what was learned: temperature, and completions per prompt."""

import pytest

from rllib_distrl.algorithm.export import policy_state
from rllib_distrl.method.allocators import EXPLORING
from tests.algorithm.test_distrl import assert_same_weights, learner_metrics
from tests.helpers import COUNTDOWN, distrl_config

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


def test_unsolved_prompts_are_explored_and_useful_groups_replayed(build, tmp_path):
    config = distrl_config(
        prompts=4,
        generations=4,
        minibatch_size=8,
        critic="none",
        bonus_coeff=0.0,
        advantage={"name": "grpo"},
        shapers=[{"name": "advantage_filter"}],
        importance_correction="truncated",
        allocator={
            "name": "explore_filter_replay",
            "generations": 18,
            "every": 2,
            "useful_above": 0.8,
        },
    )
    # Wrong ones differ in what they earn: their groups are useful all the same.
    config.environment(
        COUNTDOWN, env_config={"task": "tests.learner.test_critic_observation:Dense"}
    )
    algo = build(config.copy(copy_frozen=False))
    seen = []

    def watched(algo, seen):
        update = algo.update_learners

        def learn(groups):
            seen.append([(g[0].infos[0]["row"], g[0].infos[0]["visit"], len(g)) for g in groups])
            hot = {one.infos[0]["sampling"]["temperature"] for g in groups[4:] for one in g}
            assert hot <= {1.0, 1.2}
            return update(groups)

        algo.update_learners = learn
        return seen

    watched(algo, seen)
    replayed = []
    for k in range(1, 5):
        result = algo.train()
        counts, learned = result["env_runners"], learner_metrics(result)
        fresh, more = seen[-1][:4], seen[-1][4:]
        assert [size for *_, size in fresh] == [4] * 4
        explored = [group for group in more if group[1] >= EXPLORING and group[0] in dict_of(fresh)]
        assert counts["num_explored_episodes"] == 18 * len(explored) > 0
        again = more[len(explored) :]
        assert set(again) <= {group for groups in seen[:-1] for group in groups}
        assert counts["num_replayed_episodes"] == sum(size for *_, size in again)
        assert not again or k % 2 == 0
        replayed += again
        assert learned["num_module_steps_trained"] > 0 and learned["importance_bounded_share"] < 1
    assert replayed
    path = algo.save_to_path(str(tmp_path / "checkpoint"))
    for _ in range(2):
        algo.train()
    resumed = build(config.copy(copy_frozen=False))
    resumed.restore_from_path(path)
    later = watched(resumed, [])
    for _ in range(2):
        resumed.train()
    assert later == seen[-2:]
    assert_same_weights(policy_state(resumed), policy_state(algo))


def dict_of(groups):
    return {row: visit for row, visit, _ in groups}


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
