"""Completions in segments: token for token those that are sampled in one go."""

import numpy as np
import pytest
from ray.rllib.core import COMPONENT_RL_MODULE, DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.utils.metrics import WEIGHTS_SEQ_NO

from rllib_distrl.engine import TorchEngine
from rllib_distrl.method.prompt_samplers import PromptRequest
from rllib_distrl.rollout.completion_env_runner import CompletionEnvRunner
from tests.helpers import COUNTDOWN, distrl_config

PROMPTS = [PromptRequest(row, 0) for row in range(4)]
SEGMENT = 5


def make_runner(decoder=None, segment=SEGMENT, **env_config):
    config = distrl_config().environment(COUNTDOWN, env_config=env_config)
    config.rollout(temperature=1.5, segment_tokens=segment)
    config.validate()
    runner = CompletionEnvRunner(config=config, worker_index=0, num_workers=0)
    if decoder:
        env, state = runner.token_env.unwrapped, runner.module.policy.state_dict()
        runner.engine = TorchEngine(
            runner.module.policy.config, env.eos_token_ids, decoder=decoder, max_batch_size=5
        )
        runner.engine.load_weights(state, 0)
    return runner


def in_segments(runner):
    """Episodes in the order of prompts, and how many calls it took."""
    begun, groups, calls = {}, {}, 0
    policy = {DEFAULT_MODULE_ID: runner.module.get_state()}
    while missing := [prompt for prompt in PROMPTS if prompt not in groups]:
        runner.set_state({COMPONENT_RL_MODULE: policy, WEIGHTS_SEQ_NO: calls})
        calls += 1
        report = runner.sample_prompts(missing, 3, begun=begun)
        assert report.error is None, report.error
        for rows in report.begun.values():
            for row in rows:
                # A pause comes after as many tokens as were allowed, and nowhere else.
                assert row.finish_reason != "paused" or len(row.tokens) == calls * SEGMENT
            assert any(row.finish_reason == "paused" for row in rows)
        begun, whole = report.begun, [p for p in missing if p not in report.begun]
        for place, prompt in enumerate(whole):
            groups[prompt] = report.episodes[3 * place : 3 * place + 3]
    return [episode for prompt in PROMPTS for episode in groups[prompt]], calls


def whole(runner):
    report = runner.sample_prompts(PROMPTS, 3)
    assert report.error is None, report.error
    assert not report.begun
    return report.episodes


@pytest.mark.parametrize("decoder", [None, "generic"])
@pytest.mark.parametrize(
    "env_config",
    [
        {},
        {"stop": ["+"]},
        {"task": "tests.rollout.turn_tasks:Talk"},
        {"task": "tests.rollout.turn_tasks:ShortTalk", "stop": ["5 5", "7"]},
        {"task": "tests.rollout.turn_tasks:SlowTalk", "max_context_tokens": 34},
    ],
)
def test_a_completion_in_segments_is_the_one_that_is_sampled_in_one_go(env_config, decoder):
    runner = make_runner(decoder, **env_config)
    expected = whole(runner)
    found, calls = in_segments(runner)
    assert calls >= 3
    for one, other in zip(found, expected, strict=True):
        first, last = one.infos[0], one.infos[-1]
        assert first == other.infos[0]
        assert one.actions.data.tolist() == other.actions.data.tolist()
        np.testing.assert_array_equal(one.rewards.data, other.rewards.data)
        assert (last["grade"], last["finish_reason"]) == (
            other.infos[-1]["grade"],
            other.infos[-1]["finish_reason"],
        )
        # What was computed of a row before is computed again, in another order of sums.
        np.testing.assert_allclose(
            one.extra_model_outputs[Columns.ACTION_LOGP].data,
            other.extra_model_outputs[Columns.ACTION_LOGP].data,
            atol=2e-5,
        )
        versions = one.extra_model_outputs[WEIGHTS_SEQ_NO].data.tolist()
        assert versions == [step // SEGMENT for step in range(len(versions))]
