"""GPUs that Ray would leave out, or wait for, without a word."""

import pytest

from rllib_distrl.algorithm.registry import algorithm_config
from rllib_distrl.algorithm.wiring import wire_language_model
from rllib_distrl.settings import RolloutSettings
from tests.helpers import COUNTDOWN, TINY, distrl_config


def on_gpus(runners, evaluators=0, interval=None, **evaluation):
    config = distrl_config()
    config.env_runners(num_env_runners=runners, num_gpus_per_env_runner=0.5)
    return config.evaluation(
        evaluation_interval=interval,
        evaluation_num_env_runners=evaluators,
        evaluation_config=evaluation,
    )


def test_a_runner_in_the_drivers_process_is_refused_a_gpu():
    with pytest.raises(
        ValueError, match=r"env_runner is 0.5, but num_env_runners is 0: .* the CPU"
    ):
        on_gpus(0).validate()
    on_gpus(1).validate()


def test_so_is_one_of_evaluation():
    with pytest.raises(ValueError, match=r"is 0.5, but evaluation_num_env_runners is 0"):
        on_gpus(1, interval=2).validate()
    only_there = on_gpus(1, 0, 2, num_gpus_per_env_runner=0.25)
    only_there.env_runners(num_gpus_per_env_runner=0)
    with pytest.raises(ValueError, match=r"is 0.25, but evaluation_num_env_runners is 0"):
        only_there.validate()
    for config in (on_gpus(1, 1, 2), on_gpus(1, 0, 2, num_gpus_per_env_runner=0)):
        config.validate()
        config.get_evaluation_config_object().validate()


def test_and_one_of_a_stock_algorithm():
    stock = algorithm_config("PPO").environment(COUNTDOWN)
    stock.env_runners(num_env_runners=0, num_gpus_per_env_runner=1)
    with pytest.raises(ValueError, match="num_gpus_per_env_runner is 1, but num_env_runners is 0"):
        wire_language_model(stock, TINY, RolloutSettings(max_completion_tokens=24))


@pytest.mark.usefixtures("ray_session")
def test_gpus_that_are_not_there_are_not_waited_for():
    config = on_gpus(3, evaluators=2).learners(num_learners=2, num_gpus_per_learner=1)
    message = r"2 for learners and 1.5 for env runners and 1 for evaluation: .* the cluster has 0"
    with pytest.raises(ValueError, match=message):
        config.build_algo()


@pytest.mark.usefixtures("ray_session")
def test_a_process_without_a_gpu_does_not_learn_on_one(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=r"PyTorch sees no GPU in it\. Set num_learners >= 1"):
        distrl_config().learners(num_gpus_per_learner=1).build_algo()
