"""Numbers that are not finite never reach the weights, and never pass in silence."""

import math

import pytest
import torch

from rllib_distrl.algorithm.export import policy_state
from rllib_distrl.learner.step import NonFiniteError
from rllib_distrl.method.policy_losses import clip
from tests.helpers import distrl_config

pytestmark = pytest.mark.usefixtures("ray_session")
STEPS = 4  # per iteration: 8 completions in minibatches of 2


def broken(logp, batch, *, iterations=(), rows=None):
    """`clip`, with an infinite loss at the first token of some rows in some iterations."""
    loss = clip(logp, batch)
    if batch.k in iterations:
        hit = torch.ones(len(batch), dtype=torch.bool)
        if rows is not None:
            hit = torch.isin(batch.column("episode"), torch.tensor(rows))
        loss[hit, 0] = math.inf
    return loss


@pytest.fixture
def build():
    built = []

    def make(iterations, rows=None, **settings):
        spec = {"name": f"{__name__}:broken", "iterations": iterations, "rows": rows}
        config = distrl_config(
            prompts=4, generations=2, minibatch_size=2, policy_loss=spec, **settings
        )
        built.append(config.build_algo())
        return built[-1]

    yield make
    for algo in built:
        algo.stop()


def learner_metrics(result):
    return result["learners"]["default_policy"]


def whole_state(algo):
    """Weights of policy and critic, and the moments of both optimisers, by name."""
    state = algo.learner_group.get_state()["learner"]
    tensors = {}

    def collect(node, name):
        if isinstance(node, dict):
            for key, value in node.items():
                collect(value, f"{name}/{key}")
        elif hasattr(node, "shape"):
            tensors[name] = torch.as_tensor(node).clone()

    collect(state["rl_module"], "module")
    collect(state["optimizer"], "optimizer")
    assert any("exp_avg" in name for name in tensors)
    return tensors


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_refused_steps_change_nothing_and_are_counted(build):
    algo = build(iterations=(2,), max_nonfinite_steps=9)
    assert learner_metrics(algo.train())["nonfinite_steps"] == 0
    before = whole_state(algo)
    metrics = learner_metrics(algo.train())
    assert metrics["nonfinite_steps"] == metrics["nonfinite_steps_in_a_row"] == STEPS
    assert_equal(before, whole_state(algo))
    metrics = learner_metrics(algo.train())
    assert metrics["nonfinite_steps"] == metrics["nonfinite_steps_in_a_row"] == 0
    assert math.isfinite(metrics["policy_loss"])
    after = whole_state(algo)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in after.values())
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_the_good_minibatches_of_an_iteration_count(build):
    algo = build(iterations=(1,), rows=[3], max_nonfinite_steps=9)
    before = policy_state(algo)
    metrics = learner_metrics(algo.train())
    assert metrics["nonfinite_steps"] == 1
    assert math.isfinite(metrics["policy_loss"])
    after = policy_state(algo)
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_too_many_in_a_row_stop_training_with_a_state_to_go_on_from(build, tmp_path):
    algo = build(iterations=(2,), rows=[5], max_nonfinite_steps=1, shuffle_batch_per_epoch=False)
    algo.train()
    metrics = learner_metrics(algo.train())
    # Rows 0 to 3 are learned from; with 4 and 5 it ends, 6 and 7 are not tried.
    assert metrics["nonfinite_steps"] == 1
    stopped = whole_state(algo)
    where = r"policy_loss of episode \w+ \(row \d+\) \(iteration 2\)"
    with pytest.raises(NonFiniteError, match=rf"1 optimiser steps in a row .* {where}"):
        algo.train()
    assert algo.between_iterations
    assert algo.iteration == 2
    assert_equal(stopped, whole_state(algo))
    path = algo.save_to_path(str(tmp_path / "checkpoint"))
    algo.restore_from_path(path)
    assert learner_metrics(algo.train())["nonfinite_steps"] == 0
    assert algo.iteration == 3


def test_a_gradient_alone_is_named(build):
    algo = build(iterations=(), max_nonfinite_steps=1)
    found = algo.learner_group.foreach_learner(
        lambda learner: next(iter(learner.policy_module.named_parameters()))
    )
    name, parameter = found.result_or_errors[0].get()
    algo.train()
    before = whole_state(algo)
    handle = parameter.register_hook(lambda gradient: gradient * math.nan)
    algo.train()
    handle.remove()
    assert_equal(before, whole_state(algo))
    with pytest.raises(NonFiniteError, match=rf"the gradient of {name} \(iteration 2\)"):
        algo.train()


def test_a_reward_that_is_not_finite_stops_before_anything_is_learned(build):
    algo = build(iterations=())
    env = algo.env_runner.token_env.unwrapped
    step = env.step

    def poisoned(action):
        observation, reward, *rest = step(action)
        return observation, math.nan if rest[0] else reward, *rest

    algo.train()
    before, cursor = whole_state(algo), algo.prompt_sampler.get_state()
    env.step = poisoned
    with pytest.raises(
        NonFiniteError, match=r"rewards of episode \w+ \(row \d+\) is not finite in iteration 2"
    ):
        algo.train()
    assert algo.between_iterations
    assert algo.prompt_sampler.get_state() == cursor
    assert_equal(before, whole_state(algo))
    env.step = step
    algo.train()
    assert algo.iteration == 2


@pytest.mark.slow
def test_learners_refuse_together(build):
    config = distrl_config(prompts=4, generations=2, init_value=0.5, max_nonfinite_steps=9)
    algo = config.learners(num_learners=2).build_algo()
    try:
        algo.train()
        before = policy_state(algo)

        def poison(learner):
            parameter = next(learner.module["default_policy"].unwrapped().parameters())
            parameter.register_hook(lambda gradient: gradient * math.nan)

        algo.learner_group.foreach_learner(poison, remote_actor_ids=[1])
        assert learner_metrics(algo.train())["nonfinite_steps"] == 1
        for name, weight in policy_state(algo).items():
            assert torch.equal(weight, before[name]), name
        versions = algo.learner_group.foreach_learner(lambda learner: learner.last_refusal)
        assert all("iteration 2" in result.get() for result in versions.result_or_errors)
    finally:
        algo.stop()


def test_the_limit_is_checked():
    with pytest.raises(ValueError, match="max_nonfinite_steps is 0; it must be >= 1"):
        distrl_config(max_nonfinite_steps=0).validate()
