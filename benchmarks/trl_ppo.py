"""TRL's PPO trainer (its last release that has one) on the workload, one step per command.

python trl_ppo.py MODEL_FOLDER
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from workload import LR, PROMPTS, WORKLOADS, Commands, Stopwatch  # isort: skip

from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

STEPS = 10_000


class StepOnCommand(TrainerCallback):
    """From one step's end to the next one's is what a command measures; the first is warm-up."""

    def __init__(self, commands: Commands, tokens: int):
        self.commands, self.tokens, self.watch, self.running = commands, tokens, Stopwatch(), None

    def on_step_end(self, args, state, control, **kwargs):
        if self.running is not None:
            self.running.__exit__(None, None, None)
            self.commands.answer({"end_to_end": self.watch.measured(self.tokens)})
        self.commands.wait()
        self.watch.reset()
        self.running = self.watch.running()
        self.running.__enter__()


def main() -> None:
    commands = Commands()
    path, workload = sys.argv[1], WORKLOADS[Path(sys.argv[1]).name]
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    rows = [row for row in range(PROMPTS) for _ in range(workload.generations)]
    value, reward = (
        AutoModelForSequenceClassification.from_pretrained(path, num_labels=1) for _ in range(2)
    )
    batch = len(rows)
    PPOTrainer(
        args=PPOConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=batch,
            local_rollout_forward_batch_size=batch,
            gradient_accumulation_steps=1,
            num_mini_batches=1,
            num_ppo_epochs=1,
            total_episodes=STEPS * batch,
            response_length=workload.max_tokens,
            temperature=1.0,
            stop_token=None,
            num_sample_generations=0,
            learning_rate=LR,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=1_000,
        ),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(path),
        ref_model=AutoModelForCausalLM.from_pretrained(path),
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_dict(
            {"input_ids": [tokenizer(workload.prompt(row))["input_ids"] for row in rows]}
        ),
        callbacks=[StepOnCommand(commands, batch * workload.max_tokens)],
    ).train()


if __name__ == "__main__":
    main()
