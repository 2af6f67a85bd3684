"""A critic on its own says what it said beside its policy."""

import json

import pytest
import torch
from ray.rllib.core import DEFAULT_MODULE_ID
from safetensors.torch import load_file, save_file

from rllib_distrl.algorithm.export import export_critic
from rllib_distrl.algorithm.registry import algorithm_config
from rllib_distrl.model.sequences import INPUT_IDS, PROMPT_LENS
from rllib_distrl.settings import RolloutSettings
from tests.helpers import TINY, distrl_config, local_learner

pytestmark = pytest.mark.usefixtures("ray_session")
ROWS = {
    INPUT_IDS: torch.tensor([[3, 4, 5, 6, 7], [8, 9, 3, 0, 0]]),
    PROMPT_LENS: torch.tensor([2, 2]),
    "actions": torch.tensor([[5, 6, 7], [3, 0, 0]]),
    "loss_mask": torch.tensor([[True, True, True], [True, False, False]]),
}


@pytest.fixture
def trained():
    algos = []

    def make(config):
        algos.append(config.build_algo())
        algos[-1].train()
        return algos[-1]

    yield make
    for algo in algos:
        algo.stop()


def module_of(algo):
    return local_learner(algo).module[DEFAULT_MODULE_ID].unwrapped()


@pytest.mark.parametrize("critic", ["separate", "shared", "twin"])
def test_another_policy_starts_with_what_the_critic_had_learned(trained, tmp_path, critic):
    algo = trained(distrl_config(critic=critic, critic_lr=1e-2, init_value=0.3))
    export_critic(algo, tmp_path / "critic")
    assert sorted(p.name for p in (tmp_path / "critic").iterdir()) == [
        "config.json",
        "critic.safetensors",
    ]
    # Which of twins has the smaller mean may change in a step.
    kind, atol = ("twin", 0.1) if critic == "twin" else ("separate", 0.05)
    config = distrl_config(critic=kind, critic_checkpoint=str(tmp_path / "critic"))
    config.validate()
    other = config.build_algo()
    try:
        expected = module_of(algo).compute_quantiles(ROWS)
        assert torch.equal(module_of(other).compute_quantiles(ROWS), expected)
        other.train()  # must not put its own start value over it
        assert not torch.equal(module_of(other).compute_quantiles(ROWS), expected)
        torch.testing.assert_close(
            module_of(other).compute_quantiles(ROWS), expected, atol=atol, rtol=0
        )
    finally:
        other.stop()


def test_a_critic_that_does_not_fit_is_refused(trained, tmp_path):
    folder = tmp_path / "critic"
    algo = trained(distrl_config(n_quantiles=4))
    export_critic(algo, folder)
    path = str(folder)
    with pytest.raises(
        ValueError, match=r"n_quantiles=4, the settings say 16. Set n_quantiles = 4"
    ):
        distrl_config(critic_checkpoint=path).validate()
    with pytest.raises(ValueError, match=r"head_center='mean', the settings say 'median'"):
        distrl_config(critic_checkpoint=path, n_quantiles=4, head_center="median").validate()
    with pytest.raises(ValueError, match=r"critic_observation='none', the settings say 'state'"):
        distrl_config(critic_checkpoint=path, n_quantiles=4, critic_observation="state").validate()
    with pytest.raises(ValueError, match=r"critic is 'shared'.*critic = 'separate'"):
        distrl_config(critic_checkpoint=path, n_quantiles=4, critic="shared").validate()
    with pytest.raises(ValueError, match=r"holds no critic.*distrl export RUN OUT --critic"):
        distrl_config(critic_checkpoint=str(tmp_path)).validate()
    tensors = load_file(folder / "critic.safetensors")
    tensors["value_head.weight"] = torch.zeros(4, 48)
    save_file(tensors, folder / "critic.safetensors")
    with pytest.raises(
        ValueError, match=r"value_head.weight is \(4, 48\) in the folder and \(4, 32\)"
    ):
        distrl_config(critic_checkpoint=path, n_quantiles=4).build_algo()
    (folder / "critic.safetensors").write_bytes(b"cut short")
    with pytest.raises(ValueError, match=r"critic.safetensors cannot be read"):
        distrl_config(critic_checkpoint=path, n_quantiles=4).build_algo()


def test_the_scalar_critic_of_stock_ppo_is_exported(trained, tmp_path):
    from rllib_distrl.algorithm.wiring import wire_language_model

    config = algorithm_config("PPO").environment("distrl_envs:distrl/Countdown-v0")
    wire_language_model(config, TINY, RolloutSettings(max_completion_tokens=24))
    config.training(train_batch_size=64, minibatch_size=64, num_epochs=1)
    config.env_runners(num_env_runners=0)
    algo = trained(config)
    export_critic(algo, tmp_path / "critic")
    assert json.loads((tmp_path / "critic" / "config.json").read_text())["n_quantiles"] == 1
    scalar = distrl_config(
        critic_checkpoint=str(tmp_path / "critic"), n_quantiles=1, bonus_coeff=0.0
    )
    other = scalar.build_algo()
    try:
        torch.testing.assert_close(
            module_of(other).compute_values(ROWS), module_of(algo).compute_values(ROWS)
        )
    finally:
        other.stop()
