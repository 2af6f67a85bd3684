"""Learners that share out weights, gradients and moments learn what one learns."""

import os

import gymnasium
import numpy as np
import pytest
import ray
import torch
from ray.rllib.core import (
    COMPONENT_LEARNER,
    COMPONENT_OPTIMIZER,
    COMPONENT_RL_MODULE,
    DEFAULT_MODULE_ID,
)
from ray.rllib.core.rl_module.rl_module import RLModuleSpec

from rllib_distrl.algorithm.estimates import learner_memory, shape_of
from rllib_distrl.algorithm.weight_sync import runner_weights
from rllib_distrl.learner.distrl_learner import TRAINING_ITERATION
from rllib_distrl.model.loading import load_config
from rllib_distrl.model.lora import count_adapter_parameters
from rllib_distrl.model.sequences import from_columns
from rllib_distrl.model.sharding import blocks_of, is_sharded
from tests.helpers import COUNTDOWN, TINY, save_untied, with_model_config
from tests.learner.double_precision import DoubleModule
from tests.learner.rig import hot_config, make_learner, sample

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("ray_session"),
]

GENERATIONS = 3
# Learners compute in float64 here, and RLlib's states are float32.
ROUNDED = 1e-6
KL = {"regularisers": [{"name": "kl", "coeff": 0.1}]}
SMALL = {"micro_batch_tokens": 80, "num_epochs": 2}
"""Micro-batches of which the two learners have different numbers."""


@pytest.fixture(scope="module")
def episodes():
    return sample(hot_config(), prompts=4, generations=GENERATIONS)


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return save_untied(tmp_path_factory.mktemp("untied"))


@pytest.fixture
def group_of():
    """Builds groups of learners of configurations, and stops them after the test."""
    built = []

    def make(config, learners):
        config = config.copy(copy_frozen=False).learners(num_learners=learners)
        config.training(sharding="fsdp" if learners > 1 else "none")
        config.validate()
        env = gymnasium.make(COUNTDOWN, disable_env_checker=True, **config.env_config)
        spaces = {DEFAULT_MODULE_ID: (env.observation_space, env.action_space)}
        built.append(config.build_learner_group(spaces=spaces))
        return built[-1]

    yield make
    for group in built:
        group.shutdown()


def shards_of(episodes, ranks):
    """Whole groups: all for one learner; of two the first gets one, and the second all others."""
    return [episodes] if ranks == 1 else [episodes[:GENERATIONS], episodes[GENERATIONS:]]


def learn(group, episodes, k=1):
    """One update."""
    shards = shards_of(episodes, max(len(group), 1))
    batch = (
        {"episodes_refs": [ray.put(shard) for shard in shards]}
        if len(group)
        else {"episodes": shards[0]}
    )
    return group.update(
        **batch,
        timesteps={TRAINING_ITERATION: k},
        num_epochs=group.config.num_epochs,
        shuffle_batch_per_epoch=False,
    )


def flat(state):
    """Weights and moments of a learner's state by name."""
    learner = state[COMPONENT_LEARNER]
    found = {f"weight {n}": x for n, x in learner[COMPONENT_RL_MODULE][DEFAULT_MODULE_ID].items()}
    for optimizer, each in learner[COMPONENT_OPTIMIZER].items():
        for number, moments in each["state"]["state"].items():
            found |= {f"{optimizer} {number} {name}": x for name, x in moments.items()}
    return {name: torch.tensor(np.array(x)).double() for name, x in found.items()}


def difference(one, other):
    assert one.keys() == other.keys()
    assert {name: x.shape for name, x in one.items()} == {n: x.shape for n, x in other.items()}
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize(
    "settings",
    [
        {"critic": "separate", "aggregation": "sequence_mean", "grad_clip": None},
        {"critic": "shared", **KL, **SMALL, "entropy_coeff": 0.01, "grad_clip": 0.1},
        {
            "critic": "detached",
            **KL,
            **SMALL,
            "activation_checkpointing": True,
            "grad_clip": 0.01,
            "grad_clip_by": "norm",
        },
    ],
    ids=["separate", "shared", "detached"],
)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_two_sharded_learners_take_ones_steps_in_float64(
    group_of, episodes, untied, tied, settings
):
    config = hot_config(model=TINY if tied else untied, init_value=0.5, **settings)
    config.rl_module(rl_module_spec=RLModuleSpec(module_class=DoubleModule))
    one, two = group_of(config, 0), group_of(config, 2)
    before = flat(one.get_state())
    assert difference(before, flat(two.get_state())) == 0.0
    for group in (one, two):
        learn(group, episodes)
    after = flat(one.get_state())
    weights = [name for name in before if name.startswith("weight ")]
    assert max(float((before[n] - after[n]).abs().max()) for n in weights) > 1e-3
    assert difference(after, flat(two.get_state())) < ROUNDED


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_an_embedding_and_a_head_of_their_own_are_gathered_for_themselves(
    group_of, episodes, untied, tied
):
    group = group_of(hot_config(model=TINY if tied else untied, critic="separate"), 2)

    def watch(learner):
        module, learner.seen = learner.policy_module, set()

        def look(block, arguments, output):
            named = module.named_parameters()
            learner.seen |= {name for name, weight in named if not is_sharded(weight)}

        for block in blocks_of(module):
            block.register_forward_hook(look)

    group.foreach_learner(watch)
    learn(group, episodes)
    results = group.foreach_learner(lambda learner: learner.seen).result_or_errors
    outside = {
        "policy.model.norm.weight", "critic.norm.weight", "value_head.weight", "value_head.bias"
    }  # fmt: skip
    if tied:  # The policy's; the critic's is no head.
        outside.add("policy.model.embed_tokens.weight")
    assert [result.get() for result in results] == [outside, outside]


@pytest.mark.parametrize("lora", [None, {"r": 4, "alpha": 8}], ids=["all", "lora"])
def test_for_env_runners_the_policy_alone_is_gathered(group_of, lora):
    config = with_model_config(hot_config(critic="separate"), lora=lora)
    group = group_of(config, 2)

    def count(learner):
        from torch.distributed.tensor import DTensor

        gather, learner.gathered = DTensor.full_tensor, 0

        def counted(tensor):
            learner.gathered += tensor.numel()
            return gather(tensor)

        DTensor.full_tensor = counted

    group.foreach_learner(count)
    update, _ = runner_weights(group)
    sent = update[COMPONENT_RL_MODULE]
    assert {name.partition(".")[0] for name in sent} == {"policy"}
    numbers = sum(array.size for array in sent.values())
    if lora:  # Adapters too, and their products, of the shape of what these are added to.
        numbers += sum(x.size for name, x in sent.items() if name.endswith("_proj.weight"))
        numbers += count_adapter_parameters(lora, load_config(TINY))
    results = group.foreach_learner(lambda learner: learner.gathered).result_or_errors
    assert [result.get() for result in results] == [numbers, numbers]


def test_each_learner_holds_half_of_everything(group_of, episodes):
    group = group_of(hot_config(init_value=0.5, critic="separate", **KL), 2)
    learn(group, episodes)

    def held(learner):
        module, moments = learner.policy_module, []
        for _, optimizer in learner.get_optimizers_for_module(DEFAULT_MODULE_ID):
            moments += [state["exp_avg"] for state in optimizer.state.values()]
        parts = {
            "weights": list(module.parameters()),
            "gradients": [p.grad for p in module.parameters()],
            "moments": moments,
            "reference": list(learner.reference.policy.parameters()),
        }
        return {
            name: (sum(x.to_local().numel() for x in part), sum(x.numel() for x in part))
            for name, part in parts.items()
        }

    first, second = (result.get() for result in group.foreach_learner(held).result_or_errors)
    for name, (share, total) in first.items():
        assert share + second[name][0] == total, name
        assert 0.5 * total <= share <= 0.51 * total, name
    assert first["weights"][1] == first["moments"][1] > 1.5 * first["reference"][1] > 0
    estimated = learner_memory(
        shape_of(TINY), critic="separate", critic_outputs=16, micro_batch_tokens=1,
        reference=True, learners=2, sharded=True,
    )  # fmt: skip
    weights = estimated["policy weights"] + estimated["critic weights"]
    assert weights == estimated["gradients"] == pytest.approx(4 * first["weights"][0], rel=0.01)
    assert estimated["reference weights"] == pytest.approx(4 * first["reference"][0], rel=0.01)


def test_learners_of_these_tests_have_unequal_numbers_of_micro_batches(episodes):
    learner = make_learner(hot_config(critic="shared", **SMALL))
    sequences = [from_columns(learner.columns(shard)) for shard in shards_of(episodes, 2)]
    few, many = (len(learner.policy_module.micro_batches(rows)) for rows in sequences)
    assert few < many


def test_a_lost_learner_is_an_error_not_a_wait(group_of):
    group = group_of(hot_config(), 2)
    group.foreach_learner(lambda learner: os._exit(1), remote_actor_ids=[1])
    with pytest.raises(RuntimeError, match="1 of 2 learners are lost"):
        group.get_weights()


@pytest.mark.parametrize("learners", [(2, 0), (0, 2)], ids=["2 to 1", "1 to 2"])
def test_a_checkpoint_goes_on_with_other_learners(group_of, episodes, tmp_path, learners):
    config = hot_config(init_value=0.5, critic="separate", **KL, **SMALL)
    config.rl_module(rl_module_spec=RLModuleSpec(module_class=DoubleModule))
    before, after = (group_of(config, number) for number in learners)
    learn(before, episodes)
    before.save_to_path(tmp_path)
    after.restore_from_path(tmp_path)
    assert difference(flat(before.get_state()), flat(after.get_state())) == 0.0
    for group in (before, after):
        learn(group, episodes, k=2)
    assert difference(flat(before.get_state()), flat(after.get_state())) < ROUNDED


def test_learners_refuse_together(group_of, episodes):
    group = group_of(hot_config(init_value=0.5, critic="shared"), 2)
    learn(group, episodes)
    before = flat(group.get_state())

    def poison(learner):
        def spoil(module, arguments, output):
            return output * float("nan") if torch.is_grad_enabled() else output

        learner.policy_module.policy.get_input_embeddings().register_forward_hook(spoil)

    group.foreach_learner(poison, remote_actor_ids=[1])
    metrics = learn(group, episodes, k=2)
    assert [m[DEFAULT_MODULE_ID]["nonfinite_steps"].peek() for m in metrics] == [1, 1]
    assert difference(before, flat(group.get_state())) == 0.0
    said = group.foreach_learner(lambda learner: learner.last_refusal).result_or_errors
    assert "iteration 2" in said[0].get()
    assert "policy_loss of episode" in said[1].get()
