"""TRL's GRPO trainer on the workload; runs in TRL's environment, one step per command.

python trl_grpo.py MODEL_FOLDER
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from workload import LR, PROMPTS, WORKLOADS, Commands, Stopwatch, score  # isort: skip

from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

STEPS = 10_000


class Trainer(GRPOTrainer):
    """Times generation, grading and whole steps."""

    def __init__(self, *args, **kwargs):
        self.generation, self.grading, self.step = Stopwatch(), Stopwatch(), Stopwatch()
        super().__init__(*args, **kwargs)

    def _generate(self, *args, **kwargs):
        with self.generation.running():
            out = super()._generate(*args, **kwargs)
        self.tokens = sum(map(len, out[1]))
        return out

    def _calculate_rewards(self, *args, **kwargs):
        with self.grading.running():
            return super()._calculate_rewards(*args, **kwargs)

    def result(self) -> dict:
        step, outside = self.step, (self.generation, self.grading)
        return {
            "end_to_end": step.measured(self.tokens),
            "generation": self.generation.measured(self.tokens),
            "update": {
                "tokens": self.tokens,
                "cpu_s": step.cpu - sum(watch.cpu for watch in outside),
                "wall_s": step.wall - sum(watch.wall for watch in outside),
            },
        }


class StepOnCommand(TrainerCallback):
    """From one step's begin to the next one's is what a command measures."""

    def __init__(self, commands: Commands):
        self.commands, self.trainer, self.running = commands, None, None

    def on_step_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        if self.running is not None:
            self.running.__exit__(None, None, None)
            self.commands.answer(trainer.result())
        self.commands.wait()
        for watch in (trainer.step, trainer.generation, trainer.grading):
            watch.reset()
        self.running = trainer.step.running()
        self.running.__enter__()


def reward(completions, **kwargs):
    return [score(text) for text in completions]


def main() -> None:
    commands = Commands()
    model, workload = sys.argv[1], WORKLOADS[Path(sys.argv[1]).name]
    rows = PROMPTS * workload.generations
    prompts = [workload.prompt(row) for row in range(PROMPTS)]
    callback = StepOnCommand(commands)
    trainer = Trainer(
        model=model,
        reward_funcs=reward,
        args=GRPOConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=rows // workload.micro_batches,
            gradient_accumulation_steps=workload.micro_batches,
            num_generations=workload.generations,
            max_completion_length=workload.max_tokens,
            max_steps=STEPS,
            learning_rate=LR,
            beta=0.0,
            use_cpu=True,
            bf16=workload.dtype == "bfloat16",
            model_init_kwargs={"dtype": workload.dtype},
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=1_000,
            dataloader_num_workers=0,
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        callbacks=[callback],
    )
    callback.trainer = trainer
    trainer.train()


if __name__ == "__main__":
    main()
