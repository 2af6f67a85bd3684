"""Training with vLLM as the rollout engine, ours and stock; run as test_vllm_engine."""

import subprocess
import sys

import pytest
import torch

from rllib_distrl.algorithm.export import policy_state
from rllib_distrl.engine.weights import content_hash
from rllib_distrl.rollout.completion_env_runner import CompletionEnvRunner
from tests.algorithm.test_stock_algorithms import stock
from tests.helpers import distrl_config, with_model_config

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("ray_session")]
SKIPPED = "model.layers.1.mlp.down_proj.weight"


def breaking(lies):
    """A runner whose vLLM engine loses one tensor of every update; with `lies` it hides that."""

    class Runner(CompletionEnvRunner):
        def make_engine(self):
            engine = super().make_engine()
            load, view = engine.load_weights, engine.views[SKIPPED]

            def load_some(state, version):
                kept = view.clone()
                digest = load(state, version)
                if version:
                    view.copy_(torch.zeros_like(view) if lies else kept)
                return digest if lies else engine.weights_hash()

            engine.load_weights = load_some
            return engine

    return Runner


def test_distrl_trains_and_exports_what_vllm_samples(build, tmp_path):
    from transformers import AutoModelForCausalLM

    config = distrl_config(init_value=0.5, whiten_advantages=False)
    algo = build(config.rollout(engine="vllm", temperature=1.5))
    before = policy_state(algo)
    for iteration in range(3):
        result = algo.train()
        metrics = result["learners"]["default_policy"]
        assert metrics["logp_mismatch_max"] == pytest.approx(1.0, abs=2e-4)
        assert result["env_runners"]["weights_probe_error"] < 1e-4
        assert result["env_runners"]["weights_version_lag"] == 0
        assert algo.env_runner.engine.version == iteration + 1
    after = policy_state(algo)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert algo.env_runner.engine.weights_hash() == content_hash(after)

    algo.export_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for episode in algo.env_runner.sample(num_episodes=4, explore=False):
        prompt = episode.infos[0]["prompt_ids"]
        generated = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)
        assert generated[0, len(prompt) :].tolist() == episode.actions.data.tolist()


@pytest.mark.parametrize(
    ("lies", "message"),
    [(False, "sync did not happen"), (True, "computes other logps than the learner")],
)
def test_a_broken_sync_is_refused(build, lies, message):
    config = distrl_config(init_value=0.5, whiten_advantages=False).rollout(engine="vllm")
    algo = build(config.env_runners(env_runner_cls=breaking(lies)))
    with pytest.raises(RuntimeError, match=message):
        algo.train()


def test_stock_ppo_samples_with_vllm(build):
    config = stock("PPO", train_batch_size_per_learner=128, minibatch_size=64, num_epochs=1)
    rollout = {**config.model_config["rollout"], "engine": "vllm"}
    algo = build(with_model_config(config, rollout=rollout))
    for _ in range(2):
        assert algo.train()["learners"]["default_policy"]["entropy"] > 0
    assert type(algo.env_runner.engine).__name__ == "VllmEngine"
    assert algo.env_runner.engine.weights_hash() == content_hash(policy_state(algo))


def test_distrl_train_samples_with_vllm_on_remote_runners(tmp_path):
    arguments = [
        "train", "configs/countdown/distrl.toml", "run.model=builtin:countdown-tiny",
        "run.iterations=2", "rollout.engine=vllm", "rollout.prompts_per_iteration=4",
        "rollout.num_generations=2", "training.minibatch_size=8", "env_runners.num_env_runners=1",
        "rollout.max_staleness=1", "rollout.segment_tokens=8", "eval.problems=4", "eval.n=1",
        "eval.k=[1]", "eval.interval=0", "--out", str(tmp_path),
    ]  # fmt: skip
    command = [sys.executable, "-m", "rllib_distrl.cli", *arguments]
    trained = subprocess.run(command, capture_output=True, text=True)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert list(tmp_path.rglob("model/model.safetensors"))
