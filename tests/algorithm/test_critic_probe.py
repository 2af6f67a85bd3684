import pytest
import torch

from distrl_envs.task import distinct_rows
from rllib_distrl.algorithm.critic_probe import probe_critic
from rllib_distrl.algorithm.inspection import held_out_runner
from rllib_distrl.rollout.completion_env_runner import PromptRequest
from tests.golden.curve import EvenDigits
from tests.helpers import distrl_config, local_learner

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def cold():
    """Nearly greedy: every continuation repeats the completion. V is 0.5 everywhere."""
    config = distrl_config(init_value=0.5, bonus_stat="ensemble", bonus_coeff=0.0)
    config.environment(env_config={"task": EvenDigits()}).rollout(temperature=1e-3)
    algo = config.build_algo()
    yield algo
    algo.stop()


def test_the_error_is_that_of_the_mean_return_of_continuations(cold):
    found = probe_critic(cold, prefixes=6, continuations=3, split=None)
    runner = held_out_runner(cold, None)
    rows = distinct_rows(runner.token_env.unwrapped.task, 6)
    report = runner.sample_prompts([PromptRequest(row, 0) for row in rows], 1)
    runner.stop()
    returns = torch.tensor([episode.get_return() for episode in report.episodes])
    assert returns.std() > 0.05
    assert (found["prefixes"], found["continuations"]) == (6, 3)
    rmse = (returns - 0.5).square().mean().sqrt().item()
    assert found["quantile_state_rmse"] == pytest.approx(rmse, rel=1e-4)
    # A value that is the same everywhere explains nothing.
    assert found["quantile_state_explained_variance"] == pytest.approx(0.0, abs=1e-5)
    assert found["quantile_explained_variance"] == pytest.approx(0.0, abs=1e-5)
    assert found["quantile_crossing_rate"] == 0.0
    assert found["quantile_spread"] > 0
    assert {"quantile_coverage_50", "quantile_pit_9", "quantile_crps"} <= set(found)
    assert -1 <= found["optimism_stat_error_correlation"] <= 1


def test_looking_leaves_training_alone(cold):
    state = local_learner(cold).uncertainty.get_state()["ensemble"]
    cursor = cold.prompt_sampler.cursor
    one = probe_critic(cold, prefixes=4, continuations=2, split=None)
    assert probe_critic(cold, prefixes=4, continuations=2, split=None) == one
    after = local_learner(cold).uncertainty.get_state()["ensemble"]
    assert all((state[name] == after[name]).all() for name in state)
    assert cold.prompt_sampler.cursor == cursor
