"""RLlib's callbacks about episodes, and wrappers around the env, as RLlib documents them."""

from typing import ClassVar

import gymnasium
import numpy as np
import pytest
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.tune import register_env

from rllib_distrl.method.prompt_samplers import PromptRequest
from rllib_distrl.rollout.completion_env_runner import CompletionEnvRunner
from tests.helpers import COUNTDOWN, distrl_config

PROMPTS = [PromptRequest(row, 0) for row in range(3)]


def make_runner(callbacks=None, env=COUNTDOWN, **callback_functions):
    config = distrl_config().callbacks(callbacks, **callback_functions)
    config.environment(env)
    config.validate()
    return CompletionEnvRunner(config=config, worker_index=0, num_workers=0)


class Diary(RLlibCallback):
    """What each hook of the last one made saw, in order."""

    seen: ClassVar = []

    def __init__(self):
        Diary.seen = []

    def on_episode_created(self, *, episode, **kwargs):
        self.seen.append(("created", episode.id_, episode.is_reset))

    def on_episode_start(self, *, episode, **kwargs):
        self.seen.append(("start", len(episode), episode.get_infos(0)["row"]))

    def on_episode_step(self, *, episode, **kwargs):
        self.seen.append(("step", len(episode), int(episode.get_actions(-1))))

    def on_episode_end(self, *, episode, **kwargs):
        self.seen.append(("end", episode.id_, episode.get_return()))

    def on_sample_end(self, *, samples, **kwargs):
        self.seen.append(("sample_end", [episode.id_ for episode in samples]))


def test_hooks_see_each_episode_grow():
    runner = make_runner(Diary)
    episodes = runner.sample_prompts(PROMPTS, 2).episodes
    expected = []
    for episode in episodes:
        tokens = episode.actions.data.tolist()
        expected.append(("created", episode.id_, False))
        expected.append(("start", 0, episode.infos[0]["row"]))
        expected += [("step", number, token) for number, token in enumerate(tokens, 1)]
        expected.append(("end", episode.id_, episode.get_return()))
    assert Diary.seen == [*expected, ("sample_end", [episode.id_ for episode in episodes])]


def columns(episode):
    extra = {name: episode.extra_model_outputs[name].data for name in episode.extra_model_outputs}
    return {
        "obs": episode.observations.data,
        "actions": episode.actions.data,
        "rewards": episode.rewards.data,
        **extra,
    }


def test_episodes_are_the_same_with_hooks_and_without():
    plain, watched = (
        make_runner(callbacks).sample_prompts(PROMPTS, 2).episodes for callbacks in (None, Diary)
    )
    for one, other in zip(plain, watched, strict=True):
        assert columns(one).keys() == columns(other).keys()
        for name, column in columns(one).items():
            np.testing.assert_array_equal(column, columns(other)[name], strict=True, err_msg=name)
        assert list(one.infos.data) == list(other.infos.data)
        assert (one.is_terminated, one.is_truncated) == (True, False)
        assert (other.is_terminated, other.is_truncated) == (True, False)


def fail(*, samples=None, **kwargs):
    return {}["my_key"]


def leave(**kwargs):
    raise SystemExit(3)


@pytest.mark.parametrize("hook", ["on_episode_start", "on_episode_end", "on_sample_end"])
@pytest.mark.parametrize(
    ("function", "reason"), [(fail, "KeyError: 'my_key'"), (leave, "SystemExit: 3")]
)
def test_a_callback_that_fails_is_named_with_its_row_and_traceback(hook, function, reason):
    runner = make_runner(**{hook: function})
    failure = runner.sample_prompts([PromptRequest(2, 0)], 2).error
    assert failure.users
    where = "" if hook == "on_sample_end" else " on row 2"
    assert failure.text.startswith(f"CallbackError: The callback {hook} failed{where}: {reason}\n")
    assert f'File "{__file__}", line ' in failure.text
    assert f"in {function.__name__}" in failure.text
    assert failure.text.count(reason) == 1


def limited(env_config, steps=5):
    return gymnasium.wrappers.TimeLimit(gymnasium.make(COUNTDOWN, **env_config), steps)


class Counted(gymnasium.Wrapper):
    """Says in each info how many steps there were, and doubles rewards."""

    def reset(self, **kwargs):
        observation, info = super().reset(**kwargs)
        return observation, {**info, "steps": 0}

    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, 2 * reward - 1, terminated, truncated, {**info, "steps": 1}


@pytest.fixture
def limited_env():
    register_env("limited-countdown", limited)
    return "limited-countdown"


def test_truncation_by_a_wrapper_reaches_rllibs_episodes(limited_env):
    runner = make_runner(env=limited_env)
    whole = make_runner()
    cut = 0
    for episode, full in zip(
        runner.sample(num_episodes=6), whole.sample(num_episodes=6), strict=True
    ):
        steps = min(5, len(full))
        np.testing.assert_array_equal(episode.actions.data, full.actions.data[:steps])
        assert episode.is_truncated == (len(full) > 5)
        assert episode.is_terminated == (len(full) <= 5)
        assert ("grade" in episode.infos[-1]) == episode.is_terminated
        cut += episode.is_truncated
    assert cut
    assert runner.get_metrics()["truncated_share"].peek() == pytest.approx(cut / 6)


def test_our_algorithms_refuse_what_a_wrapper_has_cut(limited_env):
    report = make_runner(env=limited_env).sample_prompts(PROMPTS, 1)
    assert report.episodes == []
    assert report.error.users
    assert "truncated row" in report.error.text
    assert "max_completion_tokens=5" in report.error.text


def test_what_wrappers_say_is_kept():
    register_env("counted-countdown", lambda c: Counted(gymnasium.make(COUNTDOWN, **c)))
    episodes = make_runner(env="counted-countdown").sample_prompts(PROMPTS, 1).episodes
    plain = make_runner().sample_prompts(PROMPTS, 1).episodes
    for episode, other in zip(episodes, plain, strict=True):
        assert [info["steps"] for info in episode.infos.data] == [0, *[1] * len(episode)]
        np.testing.assert_array_equal(episode.rewards.data, 2 * other.rewards.data - 1)
