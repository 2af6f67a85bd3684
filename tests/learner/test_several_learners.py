"""Two learners, as RLlib's own actors, learn what one learns from all of the data."""

import gymnasium
import pytest
import ray
import torch
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.rl_module.rl_module import RLModuleSpec

from rllib_distrl.learner.distrl_learner import TRAINING_ITERATION
from tests.helpers import COUNTDOWN
from tests.learner.double_precision import DoubleModule, SgdLearner
from tests.learner.rig import hot_config, sample

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("ray_session"),
]

GROUPS, GENERATIONS = 4, 3
SETTINGS = {
    "separate": {"critic": "separate", "aggregation": "sequence_mean"},
    "shared": {
        "critic": "shared",
        "entropy_coeff": 0.01,
        "regularisers": [{"name": "kl", "coeff": 0.1}],
        "reward_transforms": [{"name": "kl_penalty", "coeff": 0.1}],
        "micro_batch_tokens": 80,
        "num_epochs": 2,
    },
    "remembering": {"critic": "shared", "advantage": {"name": "aapo"}},
    "imitating": {
        "critic": "separate",
        "micro_batch_tokens": 80,
        "policy_loss": {"name": "hpt", "gate": 1},
    },
}


@pytest.fixture(scope="module")
def episodes():
    return sample(hot_config(), prompts=GROUPS, generations=GENERATIONS)


def learned(config, episodes, learners):
    """Gradients of the last step and weights, of each learner, before and after an update."""
    config = config.copy(copy_frozen=False).learners(num_learners=learners)
    config.validate()
    env = gymnasium.make(COUNTDOWN, disable_env_checker=True, **config.env_config)
    spaces = {DEFAULT_MODULE_ID: (env.observation_space, env.action_space)}
    group = config.build_learner_group(spaces=spaces)

    def read(learner):
        module = learner.module[DEFAULT_MODULE_ID].unwrapped()
        named = dict(module.named_parameters())
        return (
            {name: p.detach().clone() for name, p in named.items()},
            {name: p.grad.clone() for name, p in named.items() if p.grad is not None},
        )

    ranks = max(learners, 1)
    groups = [episodes[i : i + GENERATIONS] for i in range(0, len(episodes), GENERATIONS)]
    shards = [[e for group in groups[rank::ranks] for e in group] for rank in range(ranks)]
    settings = {
        "timesteps": {TRAINING_ITERATION: 1},
        "num_epochs": config.num_epochs,
        "shuffle_batch_per_epoch": False,
    }
    try:
        before = group.foreach_learner(read).result_or_errors[0].get()[0]
        if learners:
            group.update(episodes_refs=[ray.put(shard) for shard in shards], **settings)
        else:
            group.update(episodes=shards[0], **settings)
        return before, [result.get() for result in group.foreach_learner(read).result_or_errors]
    finally:
        group.shutdown()


def difference(one, other):
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def compare(config, episodes, bound, dtype):
    """Both learners' gradients and weights against one's, and that the weights moved."""
    before, [(weights, gradients)] = learned(config, episodes, 0)
    assert {weight.dtype for weight in weights.values()} == {dtype}
    started, both = learned(config, episodes, 2)
    assert difference(before, started) == 0.0
    assert difference(before, weights) > 100 * bound
    assert max(float(g.abs().max()) for g in gradients.values()) > 1e-2
    for their_weights, their_gradients in both:
        assert difference(their_gradients, gradients) < bound
        assert difference(their_weights, weights) < bound
    assert difference(both[0][0], both[1][0]) == 0.0


def test_float32_gradients_and_steps_in_their_direction_agree(episodes):
    config = hot_config(learner_class=SgdLearner, init_value=0.5, **SETTINGS["shared"])
    compare(config, episodes, 1e-5, torch.float32)


@pytest.mark.parametrize("settings", ["separate", "remembering", "imitating"])
def test_float64_gradients_and_adams_steps_agree(episodes, settings):
    config = hot_config(init_value=0.5, **SETTINGS[settings])
    if settings == "imitating":  # episodes then bring solutions with them
        episodes = sample(config, prompts=GROUPS, generations=GENERATIONS)
    config.rl_module(rl_module_spec=RLModuleSpec(module_class=DoubleModule))
    compare(config, episodes, 1e-10, torch.float64)
