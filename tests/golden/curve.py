"""Twenty iterations of DistRL on a small random model, without Ray, as a table of losses.

`python -m tests.golden.curve` writes `loss_curve.json` anew: after a change that is meant to
change the numbers, and never without saying so.
"""

import json
import tempfile
from pathlib import Path

import gymnasium
import numpy as np
import torch
import transformers
from ray.rllib.core import COMPONENT_RL_MODULE, DEFAULT_MODULE_ID
from ray.rllib.utils.metrics import WEIGHTS_SEQ_NO

from distrl_envs.task import Grade
from distrl_envs.tasks.arithmetic import ArithmeticTask
from distrl_envs.tokenizers import small_tokenizer
from rllib_distrl.method.prompt_samplers import PromptRequest
from rllib_distrl.rollout.completion_env_runner import CompletionEnvRunner
from tests.helpers import distrl_config

ITERATIONS, PROMPTS, GENERATIONS = 20, 4, 4
FILE = Path(__file__).with_name("loss_curve.json")
METRICS = ("total_loss", "policy_loss", "vf_loss", "entropy", "quantile_crps", "optimism_ratio")


class EvenDigits(ArithmeticTask):
    """Graded rewards that a random model earns: the share of even digits in the completion."""

    def grade(self, problem, completion, *, truncated=False):
        digits = [c for c in completion if c.isdigit()]
        even = sum(int(c) % 2 == 0 for c in digits)
        return Grade(even / max(len(digits), 1), "correct" if even else "wrong")


def _save_model(path):
    """A model that is the same on every machine: drawn, not trained."""
    tokenizer = small_tokenizer()
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config)
    rng = np.random.default_rng(0)  # torch's own normal numbers depend on the processor
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.copy_(torch.from_numpy(rng.normal(0.0, 0.3, weight.shape)))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def _config(model):
    config = distrl_config(
        model=model, prompts=PROMPTS, generations=GENERATIONS, minibatch_size=8, num_epochs=2,
        critic_lr=3e-3, n_quantiles=8, entropy_coeff=0.01, critic_warmup_iterations=2,
    )  # fmt: skip
    config.environment(env_config={"task": EvenDigits()}).rollout(max_completion_tokens=12)
    config.validate()
    return config


def loss_curve():
    """One list of 20 numbers per metric."""
    with tempfile.TemporaryDirectory() as model:
        _save_model(model)
        config = _config(model)
        runner = CompletionEnvRunner(config=config)
        env = gymnasium.make(config.env, **config.env_config)
        learner = config.build_learner(
            spaces={DEFAULT_MODULE_ID: (env.observation_space, env.action_space)}
        )
    curve = {name: [] for name in METRICS}
    for k in range(1, ITERATIONS + 1):
        prompts = [PromptRequest((k - 1) * PROMPTS + row, 0) for row in range(PROMPTS)]
        report = runner.sample_prompts(prompts, GENERATIONS)
        assert report.error is None, report.error
        results = learner.update(
            episodes=report.episodes,
            timesteps={"num_env_steps_sampled_lifetime": 0, "training_iteration": k},
            num_epochs=config.num_epochs,
            minibatch_size=config.minibatch_size,
        )
        for name in METRICS:
            curve[name].append(float(results[DEFAULT_MODULE_ID][name].peek()))
        weights = learner.module[DEFAULT_MODULE_ID].get_state(inference_only=True)
        runner.set_state({COMPONENT_RL_MODULE: weights, WEIGHTS_SEQ_NO: k})
    return curve


if __name__ == "__main__":
    FILE.write_text(json.dumps(loss_curve(), indent=1) + "\n")
