"""A learner without actors, and completions of the tiny model for it."""

import gymnasium
import numpy as np
from ray.rllib.core import DEFAULT_MODULE_ID

from rllib_distrl.method.prompt_samplers import PromptRequest
from rllib_distrl.rollout.completion_env_runner import CompletionEnvRunner
from tests.helpers import COUNTDOWN, distrl_config


def make_learner(config):
    env = gymnasium.make(COUNTDOWN, disable_env_checker=True, **config.env_config)
    spaces = {DEFAULT_MODULE_ID: (env.observation_space, env.action_space)}
    return config.build_learner(spaces=spaces)


def sample(config, prompts=4, generations=3):
    """Whole groups, hot so that lengths differ, with rewards that differ."""
    runner = CompletionEnvRunner(config=config)
    requests = [PromptRequest(row, 0) for row in range(prompts)]
    report = runner.sample_prompts(requests, generations)
    assert report.error is None
    rng = np.random.default_rng(0)
    for episode in report.episodes:
        episode.rewards.data[:] = rng.normal(size=len(episode)).astype(np.float32)
    return report.episodes


def gradients(learner, episodes):
    """What `update` reports and the gradients by name, of a step over all episodes, not taken."""
    learner.apply_gradients = lambda gradients: None
    metrics = learner.update(episodes=episodes, timesteps={"training_iteration": 1})
    named = learner.policy_module.state_dict(keep_vars=True).items()
    return (
        {name: each.peek() for name, each in metrics["default_policy"].items()},
        {name: p.grad.clone() for name, p in named if p.grad is not None},
    )


def pass_apart(learner):
    """Lets the pass before the update be one of its own, also where a training pass could serve."""
    once = learner.batch_pass
    learner.batch_pass = lambda columns, k, single_step: once(columns, k)
    return learner


def hot_config(**training):
    config = distrl_config(prompts=4, generations=3, **training)
    config.rollout(temperature=2.0)
    config.validate()
    return config
