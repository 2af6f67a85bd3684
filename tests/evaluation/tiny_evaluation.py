"""A tiny model and task for evaluation tests; as a script, an evaluation to be killed."""

import sys
import time
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from distrl_envs.task import Grade, Problem, Task
from distrl_envs.tokenizers import VOCABULARY, small_tokenizer
from rllib_distrl.evaluation.evaluate import evaluate_model
from rllib_distrl.settings import EvalSettings

ENV_ID = "distrl_envs:distrl/Countdown-v0"
SETTINGS = EvalSettings(problems=12, n=8, k=(1, 4), max_tokens=12, chunk=2, seed=3)


class FirstNumber(Task):
    """Right when the completion begins with a number in the problem's half of 0..99.

    A random model is right now and then, answers differ, and no answer is common.
    """

    name = "first_number"
    split = "test"
    max_prompt_tokens = 8
    max_completion_tokens = 12

    def __len__(self):
        return 40

    def problem(self, row):
        self.check_row(row)
        return Problem(row, f"{row % 20} ->", {"low": row % 2 == 0}, key=str(row % 20))

    def grade(self, problem, completion, *, truncated=False):
        first = completion.split()[:1]
        if not first or not first[0].isdigit():
            return Grade(0.0, "no_answer", None)
        right = (int(first[0]) < 50) == problem.data["low"]
        return Grade(float(right), "correct" if right else "wrong", first[0])

    def tokenizer(self):
        return small_tokenizer()


def tiny_model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(VOCABULARY), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=64,
        pad_token_id=0, eos_token_id=1, bos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():  # Sharper than at random, and ending now and then.
        model.lm_head.weight.mul_(8.0)
    return model


def evaluate_tiny(out=None, settings=SETTINGS, **kwargs):
    task = kwargs.pop("task", None) or FirstNumber()
    return evaluate_model(tiny_model(), ENV_ID, {"task": task}, settings, out=out, **kwargs)


def say_and_wait(progress):
    print(progress.problems_done, flush=True)
    time.sleep(0.025)


if __name__ == "__main__":
    torch.set_num_threads(1)
    evaluate_tiny(Path(sys.argv[1]), on_progress=say_and_wait)
