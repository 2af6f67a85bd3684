"""RLlib's evaluation on the validation problems, beside training and parallel to it."""

import pytest
import torch

from rllib_distrl import RolloutSettings, wire_language_model
from rllib_distrl.algorithm.export import policy_state
from rllib_distrl.algorithm.registry import algorithm_config
from rllib_distrl.rllib_traps import without_repeats
from rllib_distrl.rollout.pool_metrics import join_pools, time_validations
from tests.helpers import COUNTDOWN, TINY, distrl_config

pytestmark = pytest.mark.usefixtures("ray_session")
PROBLEMS, POOL = 4, 4


def configured(name):
    if name == "DistRL":
        config = distrl_config(prompts=4, generations=2, entropy_coeff=0.01)
        config.rollout(evaluation_generations=POOL, temperature=2.0)
    else:
        rollout = RolloutSettings(
            num_generations=2, evaluation_generations=POOL, max_completion_tokens=24,
            temperature=2.0,
        )  # fmt: skip
        config = algorithm_config(name).environment(COUNTDOWN).debugging(seed=1)
        config.env_runners(num_env_runners=0).learners(num_learners=0)
        config.training(train_batch_size_per_learner=128, minibatch_size=64, num_epochs=1)
        config.training(lr=1e-3, entropy_coeff=0.01)
        config = wire_language_model(config, TINY, rollout)
    return config.evaluation(
        evaluation_interval=1,
        evaluation_duration=PROBLEMS * POOL,
        evaluation_duration_unit="episodes",
        evaluation_config={"env_config": {"split": "validation"}, "explore": True},
    )


def check(validation):
    assert validation["num_episodes"] == PROBLEMS * POOL
    assert validation["pass@1"] == pytest.approx(validation[f"avg@{POOL}"])
    assert validation["pass@1"] <= validation["pass@2"] <= validation[f"pass@{POOL}"] <= 1.0
    assert 0.0 <= validation["unparsable"] <= 1.0
    assert {"maj@4", "distinct_correct", "truncated_share"} <= set(validation)
    problems = join_pools(validation["problems"])
    assert [row for row, *_ in problems] == list(range(PROBLEMS))
    passed = sum(right for _, right, _ in problems) / (PROBLEMS * POOL)
    assert passed == pytest.approx(validation["pass@1"])


@pytest.mark.parametrize("name", ["DistRL", pytest.param("PPO", marks=pytest.mark.slow)])
def test_evaluation_runs_parallel_to_training(name):
    config = configured(name)
    config.evaluation(evaluation_parallel_to_training=True, evaluation_num_env_runners=1)
    algo = config.build_algo()
    try:
        before = policy_state(algo)
        for _ in range(2):
            result = algo.train()
            check(result["evaluation"]["env_runners"])
            assert result["env_runners"]["num_env_steps_sampled_lifetime"] > 0
        after = policy_state(algo)
        assert any(not torch.equal(before[key], after[key]) for key in before)
    finally:
        algo.stop()


@pytest.mark.slow
def test_parallel_evaluation_lasts_as_long_as_training():
    config = configured("DistRL").rollout(prompts_per_iteration=256)
    config.evaluation(
        evaluation_parallel_to_training=True,
        evaluation_num_env_runners=1,
        evaluation_duration="auto",
    )
    algo = config.build_algo()
    try:
        algo.train()  # RLlib does not know yet how long that takes.
        # It goes by the iteration before, which on a busy machine may have been a quick one.
        rounds = [algo.train()["evaluation"].get("env_runners") for _ in range(6)]
        held = [validation for validation in rounds if validation]
        assert max(validation["num_episodes"] for validation in held) > POOL
        assert all(0.0 <= validation["pass@4"] <= 1.0 for validation in held)
    finally:
        algo.stop()


def test_a_validation_repeats_with_the_same_weights():
    algo = configured("DistRL").build_algo()
    try:
        first, second = (algo.evaluate()["env_runners"] for _ in range(2))
        check(first)
        for name in ("pass@1", "pass@4", "maj@4", "distinct_correct", "episode_len_mean"):
            assert first[name] == second[name]
    finally:
        algo.stop()


def test_an_evaluation_is_timed_and_reported_once(build):
    config = distrl_config().evaluation(
        evaluation_interval=2,
        evaluation_duration=4,
        evaluation_duration_unit="episodes",
        evaluation_config={"env_config": {"split": "validation"}},
    )
    time_validations(config)
    algo = build(config)
    first, second, third = (algo.train() for _ in range(3))
    assert "evaluation" not in without_repeats(first)
    runners = second["evaluation"]["env_runners"]
    assert without_repeats(second)["evaluation"]["env_runners"] == runners
    # Sampling is a part of the evaluation, and that of the iteration.
    assert runners["sample"] <= second["evaluation"]["seconds"] <= second["time_this_iter_s"]
    # Ray 2.60 reports it once more.
    assert third["evaluation"]["env_runners"]["pass@1"] == runners["pass@1"]
    # Four problems, one completion each, in place of what the runner has logged of them.
    problems = second["evaluation"]["problems"]
    assert [(row, right) for row, right, _ in problems] == [
        (row, sum(n for score, n in scores if score == 1.0))
        for row, (_, _, scores) in enumerate(problems)
    ]
    assert [sum(n for _, n in scores) for _, _, scores in problems] == [1] * 4
    assert sum(right for _, right, _ in problems) / 4 == pytest.approx(runners["pass@1"])
    assert "problems" not in runners
    assert "evaluation" not in without_repeats(third)
    assert without_repeats(third)["env_runners"] == third["env_runners"]
