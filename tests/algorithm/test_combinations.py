"""Settings that each have tests of their own, together."""

import time

import pytest
import torch
from ray.rllib.utils.metrics import WEIGHTS_SEQ_NO

from distrl_envs.tokenizers import small_tokenizer
from rllib_distrl.algorithm.export import policy_state
from rllib_distrl.engine.weights import content_hash
from rllib_distrl.rollout.completion_env_runner import CompletionEnvRunner
from tests.algorithm.recorded_distrl import kill, pid_of, runner_metric, train_until
from tests.algorithm.test_distrl import assert_same_update, learner_metrics
from tests.helpers import distrl_config, with_model_config

pytestmark = pytest.mark.usefixtures("ray_session")


def watch_batches(algo):
    """Per iteration: (row, visit, sample) and the weights' version of what is learned from."""
    update, seen = algo.update_learners, []

    def watched(groups):
        episodes = [episode for group in groups for episode in group]
        seen.append(
            {
                tuple(episode.infos[0][name] for name in ("row", "visit", "sample")): int(
                    episode.extra_model_outputs[WEIGHTS_SEQ_NO].data[0]
                )
                for episode in episodes
            }
        )
        assert len(seen[-1]) == len(episodes)
        return update(groups)

    algo.update_learners = watched
    return seen


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_bf16_learner_with_adapters_proves_its_weights(build, dtype):
    config = distrl_config(
        precision="bf16",
        critic_observation="state",
        activation_checkpointing=True,
        importance_correction="truncated",
        regularisers=[{"name": "kl", "coeff": 0.1}],
        shapers=[{"name": "entropy_shaped"}],
        entropy_coeff=0.01,
        lr=1e-2,
    ).rollout(dtype=dtype, temperature=1.5)
    algo = build(with_model_config(config, lora={"r": 4, "alpha": 8}))
    initial = policy_state(algo)
    for _ in range(2):
        result = algo.train()
        metrics = learner_metrics(result)
        assert 1e-4 < result["env_runners"]["weights_probe_error"] < 0.15
        assert metrics["importance_weight_mean"] == pytest.approx(1.0, abs=0.05)
        assert 1.001 < metrics["logp_mismatch_max"] < 3
    assert metrics["ref_kl"] > 1e-3
    merged = policy_state(algo)
    engine = algo.env_runner.engine
    assert engine.weights_hash() == content_hash(merged, dtype=getattr(torch, dtype))
    moved = [name for name in merged if not torch.equal(merged[name], initial[name])]
    assert moved and all("_proj" in name for name in moved)


SCORES = """
def parity(prompt, completion, row):
    return float(len(completion) % 2)
"""


def test_dynamic_sampling_is_corrected_for_in_micro_batches(build, tmp_path, monkeypatch):
    (tmp_path / "parity_scores.py").write_text(SCORES)
    monkeypatch.syspath_prepend(tmp_path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"problem": "{n} {n + 1}"}}\n' for n in range(9)))
    config = distrl_config(
        prompts=4,
        generations=3,
        max_sampling_rounds=3,
        importance_correction="truncated",
        advantage={"name": "grpo"},
        critic="none",
        bonus_coeff=0.0,
        minibatch_size=6,
        clip_param_high=0.28,
    ).rollout(temperature=2.0, top_k=8)
    config.environment(
        "distrl_envs:distrl/Custom-v0",
        env_config={
            "task_config": {"data": str(rows), "score": "parity_scores:parity"},
            "tokenizer": small_tokenizer(),
        },
    )
    whole = build(config.copy(copy_frozen=False))
    parts = build(config.copy(copy_frozen=False).training(micro_batch_tokens=60))
    found = []
    for algo in (whole, parts):
        seen = watch_batches(algo)
        result = algo.train()
        found.append((seen, learner_metrics(result), policy_state(algo)))
        assert result["env_runners"]["num_sampling_rounds"] > 1
        assert result["env_runners"]["num_dropped_groups"] > 0
    (seen, metrics, weights), (_, _, other) = found
    assert found[1][0] == seen
    assert 0.3 < metrics["importance_weight_mean"] < 0.99  # mass of the kept eight
    assert metrics["importance_weight_mean"] == pytest.approx(
        found[1][1]["importance_weight_mean"], rel=1e-4
    )
    assert_same_update(weights, other)


class SlowRunner(CompletionEnvRunner):
    """Still samples when it is killed."""

    def sample_prompts(self, *args, **kwargs):
        time.sleep(1.0)
        return super().sample_prompts(*args, **kwargs)


@pytest.mark.slow
def test_runners_come_go_and_die_while_they_sample_ahead(build):
    ahead = distrl_config(prompts=6, generations=2).rollout(max_staleness=2, max_env_runners=2)
    ahead.env_runners(num_env_runners=1, num_cpus_per_env_runner=0.25, env_runner_cls=SlowRunner)
    algo = build(ahead)
    seen = watch_batches(algo)
    algo.train()
    algo.scale_env_runners(2)
    results = train_until(algo, serving=2)
    algo.train()
    kill(pid_of(algo, 2))  # in the middle of one batch, and with the next to do
    results += [algo.train() for _ in range(2)]  # it may have done its share of the first
    assert runner_metric(results[-2:], "num_failed_env_runners") == 1
    algo.scale_env_runners(1)
    results.append(algo.train())
    kill(pid_of(algo, 1))  # the last one: what it held is sampled with newer weights
    results += [algo.train() for _ in range(5)]

    peaceful = build(distrl_config(prompts=6, generations=2))
    expected = watch_batches(peaceful)
    for _ in seen:
        peaceful.train()
    assert [set(batch) for batch in seen] == [set(batch) for batch in expected]
    for learned, batch in enumerate(seen):
        assert {learned - version for version in batch.values()} <= {0, 1, 2}
    assert sum(result["env_runners"]["num_stale_episodes_dropped"] for result in results) == 0
    assert results[-1]["env_runners"]["weights_version_lag"] == 2
