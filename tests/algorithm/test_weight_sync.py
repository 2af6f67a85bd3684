"""Syncs that are broken on purpose."""

import logging
import re
import time

import numpy as np
import pytest
import torch

from rllib_distrl.algorithm.export import policy_state
from rllib_distrl.algorithm.weight_sync import MismatchWarning, score_probes
from rllib_distrl.engine.torch_engine import TorchEngine
from rllib_distrl.engine.weights import PROBE_TOKENS, Probe, check_probe, content_hash
from rllib_distrl.rollout.completion_env_runner import CompletionEnvRunner
from rllib_distrl.rollout.groups import RunnersLostError
from tests.helpers import distrl_config, local_learner, with_model_config

pytestmark = pytest.mark.usefixtures("ray_session")
SKIPPED = "model.layers.1.mlp.down_proj.weight"


class SkippingEngine(TorchEngine):
    """Forgets one tensor of every update but the first."""

    def load_weights(self, state, version):
        kept = self.decoder.canonical()[SKIPPED].clone()
        super().load_weights(state, version)
        if version:
            self.decoder.canonical()[SKIPPED].copy_(kept)
        return self.weights_hash()


class LyingEngine(TorchEngine):
    """Answers with the right hash, but computes with a tensor that was wiped out."""

    def load_weights(self, state, version):
        self.true_hash = super().load_weights(state, version)
        if version:
            self.decoder.canonical()[SKIPPED].zero_()
        return self.true_hash


class ForgetfulEngine(TorchEngine):
    """Loads what it is sent, and numbers it as what it had."""

    def load_weights(self, state, version):
        return super().load_weights(state, max(self.version, 0))


def runner_with(engine_class):
    class Runner(CompletionEnvRunner):
        def make_engine(self):
            engine = super().make_engine()
            engine.__class__ = engine_class
            return engine

    return Runner


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (SkippingEngine, "weights it should not have: version 1, .*sync did not happen"),
        (LyingEngine, "computes other logps than the learner.*0.001 is allowed for float32"),
    ],
)
def test_an_engine_that_missed_a_tensor_is_refused(build, engine, message):
    # The tiny model earns nothing: a value of 0.5 gives every token a gradient.
    config = distrl_config(init_value=0.5, whiten_advantages=False)
    algo = build(config.env_runners(env_runner_cls=runner_with(engine)))
    with pytest.raises(RuntimeError, match=message):
        algo.train()


@pytest.mark.slow
def test_every_remote_engine_is_checked(build):
    config = distrl_config(init_value=0.5, whiten_advantages=False)
    algo = build(config.env_runners(num_env_runners=2, num_cpus_per_env_runner=0.5))

    def become(engine_class):
        algo.env_runner_group.foreach_env_runner(
            lambda runner: setattr(runner.engine, "__class__", engine_class),
            remote_worker_ids=[2],
            local_env_runner=False,
        )

    for engine_class, message in (
        (
            SkippingEngine,
            r"Env runner 2 .*was sent version 1, hash (\w+) .* loaded version 1, hash ",
        ),
        (LyingEngine, "Env runner 2 .*computes other logps than the learner"),
        (ForgetfulEngine, "Env runner 2 .*was sent version 3, .* loaded version 2, hash "),
    ):
        become(engine_class)
        with pytest.raises(RuntimeError, match=message):
            algo.train()
        become(TorchEngine)
        algo.weight_sync.fetch()
        algo.weight_sync.send()
    algo.train()


def addresses(module):
    """Where each tensor of a policy lies."""
    return {name: tensor.data_ptr() for name, tensor in module.policy.state_dict().items()}


def evaluated(config, **settings):
    return config.evaluation(evaluation_interval=1, evaluation_duration=2, **settings)


@pytest.mark.parametrize("critic", ["separate", "detached"])
def test_in_one_process_the_policy_is_in_memory_once(build, critic):
    algo = build(evaluated(distrl_config(init_value=0.5, critic=critic)))
    learner, seen = local_learner(algo), set()
    for _ in range(3):
        assert algo.env_runner.engine is algo.eval_env_runner.engine
        for runner in (algo.env_runner, algo.eval_env_runner):
            assert addresses(runner.module) == addresses(learner.policy_module)
        weights = content_hash(learner.policy_module.policy.state_dict(), sample=algo.iteration)
        assert (
            algo.env_runner.engine.weights_hash() == algo.env_runner.held_weights().hash == weights
        )
        episodes = algo.env_runner.sample(num_episodes=4, explore=True)
        probes = [
            Probe(
                tuple(episode.infos[0]["prompt_ids"]),
                episode.actions.data,
                episode.extra_model_outputs["action_logp"].data,
            )
            for episode in episodes
        ]
        for probe, logps in zip(probes, score_probes(learner, probes=probes), strict=True):
            np.testing.assert_allclose(probe.logps, logps, atol=1e-5)
        seen.add(weights)
        algo.train()
    assert len(seen) == 3  # Each update made another policy.


def test_what_a_runner_is_told_by_others_does_not_reach_the_learner(build):
    algo = build(distrl_config())
    runner, before = algo.env_runner, policy_state(algo)
    others = {name: array + 1 for name, array in runner.module.get_state().items()}
    for array in others.values():
        array.flags.writeable = False  # As they come from Ray's object store.
    runner.set_state({"rl_module": others})
    assert torch.equal(policy_state(algo)["model.norm.weight"], before["model.norm.weight"])
    name = "policy.model.norm.weight"
    held = runner.module.state_dict()[name]
    np.testing.assert_array_equal(held, others[name])
    assert held.data_ptr() != others[name].ctypes.data
    with pytest.raises(ValueError, match=r"missing.*policy\.model\.norm\.weight"):
        runner.set_state({"rl_module": {k: x for k, x in others.items() if k != name}})
    assert not algo.weight_sync.fetch_foreign()
    algo.weight_sync.send()
    assert addresses(runner.module) == addresses(local_learner(algo).policy_module)


def test_weights_that_change_between_iterations_are_noticed_where_they_are_lent(build):
    algo = build(distrl_config())
    policy = local_learner(algo).policy_module.policy
    with torch.no_grad():
        policy.model.embed_tokens.weight[3, 3] += 0.5
    assert algo.weight_sync.fetch_foreign()
    assert not algo.weight_sync.fetch_foreign()


@pytest.mark.parametrize("why", ["adapters", "staleness", "parallel evaluation"])
def test_elsewhere_runners_keep_copies(build, why):
    config = distrl_config(init_value=0.5)
    if why == "adapters":
        with_model_config(config, lora={"r": 2})
    elif why == "staleness":
        config.rollout(max_staleness=1).env_runners(num_env_runners=1, num_cpus_per_env_runner=0.5)
    else:
        evaluated(config, evaluation_num_env_runners=1, evaluation_parallel_to_training=True)
    algo = build(config)
    runner, learner = algo.env_runner.module, local_learner(algo).policy_module
    assert not set(addresses(runner).values()) & {
        parameter.data_ptr() for parameter in learner.parameters() if parameter.requires_grad
    }
    algo.train()
    algo.train()


def test_an_evaluation_by_another_engine_has_its_own(build):
    config = evaluated(distrl_config())
    other = {"env_runner_cls": runner_with(ForgetfulEngine)}
    algo = build(config.evaluation(evaluation_config=other))
    assert type(algo.eval_env_runner.engine) is ForgetfulEngine
    assert type(algo.env_runner.engine) is TorchEngine


def test_lag_and_probe_error_are_logged(build):
    algo = build(distrl_config())
    result = algo.train()["env_runners"]
    assert result["weights_version_lag"] == 0
    assert 0 < result["weights_probe_error"] < 1e-4
    assert result["num_stale_episodes_dropped"] == 0


def test_a_bfloat16_engine_is_held_to_the_cast_weights(build):
    algo = build(distrl_config().rollout(dtype="bfloat16"))
    algo.train()
    engine = algo.env_runner.engine
    assert engine.decoder.weights.embed.dtype == torch.bfloat16
    assert engine.weights_hash() == content_hash(policy_state(algo), dtype=torch.bfloat16)
    result = algo.train()
    assert 1e-4 < result["env_runners"]["weights_probe_error"] < 0.15
    assert 1.001 < result["learners"]["default_policy"]["logp_mismatch_max"] < 3


def test_probes_are_scored_by_the_learners_own_forward_pass(build):
    algo = build(distrl_config().rollout(temperature=0.7))
    probes = [
        Probe((4, 5, 6), np.array([7, 8, 9]), np.zeros(3)),
        Probe((5,), np.array([6]), np.zeros(1)),
    ]
    results = algo.learner_group.foreach_learner(score_probes, probes=probes)
    scored = next(result.get() for result in results)
    policy = algo.env_runner.module.policy
    for probe, got in zip(probes, scored, strict=True):
        ids = torch.tensor([[*probe.prompt_ids, *probe.tokens]])
        with torch.no_grad():
            logps = (policy(ids).logits[0] / 0.7).log_softmax(-1)[len(probe.prompt_ids) - 1 : -1]
        want = logps.gather(-1, torch.tensor(probe.tokens)[:, None])[:, 0]
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_probe_is_judged_by_its_mean_difference():
    probe = Probe((1,), np.arange(4), np.array([-1.0, -2.0, -3.0, -4.0]))
    close = probe.logps + np.array([0.002, 0.0, -0.001, 0.0])
    assert check_probe("it", probe, close, "float32") == pytest.approx(7.5e-4)
    with pytest.raises(RuntimeError, match=r"differ by 0\.00125"):
        check_probe("it", probe, probe.logps + np.array([0.004, 0, 0, 0.001]), "float32")
    with pytest.raises(RuntimeError, match="nan"):
        check_probe("it", probe, probe.logps * np.nan, "bfloat16")


def test_a_probe_is_always_the_same(build):
    runner = build(distrl_config()).env_runner
    state = {"rl_module": runner.module.get_state()}
    first, second = runner.load_weights(state).probe, runner.load_weights(state).probe
    assert len(first.tokens) <= PROBE_TOKENS
    assert first.tokens.tolist() == second.tokens.tolist()
    assert first.logps.tolist() == second.logps.tolist()


@pytest.mark.slow
def test_a_runner_that_does_not_answer_is_named(build, caplog):
    class Deaf(CompletionEnvRunner):
        def load_weights(self, state):
            time.sleep(600 if state["weights_seq_no"] else 0)
            return super().load_weights(state)

    config = distrl_config().env_runners(env_runner_cls=Deaf, num_env_runners=1, sample_timeout_s=8)
    algo = build(
        config.fault_tolerance(
            num_consecutive_env_runner_failures_tolerance=1, env_runner_health_probe_timeout_s=5
        )
    )
    with caplog.at_level(logging.WARNING):
        algo.train()
    assert re.search(r"Env runner 1 .* has not loaded its weights in 8 s", caplog.text)
    with pytest.raises(RunnersLostError, match="0 of them serve"):
        algo.train()


@pytest.mark.parametrize(
    ("rollout", "training", "ratios", "times"),
    [
        ({}, {}, [1.0001, 1.04], 0),
        ({}, {}, [1.2, 3.0], 1),
        ({"dtype": "bfloat16"}, {}, [1.2], 0),
        ({}, {"precision": "bf16"}, [1.2, 1.6], 1),
        ({"max_staleness": 1}, {}, [3.0], 0),
        ({"top_p": 0.9}, {}, [3.0], 0),
    ],
)
def test_a_mismatch_far_outside_its_range_is_told_once(rollout, training, ratios, times, caplog):
    warn = MismatchWarning(distrl_config(**training).rollout(**rollout))
    for ratio in ratios:
        warn(ratio)
    assert len(caplog.records) == times
    assert all("logp_mismatch_p95" in record.message for record in caplog.records)
