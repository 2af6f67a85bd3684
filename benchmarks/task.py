"""The workload's prompts as a task of the token environment."""

from benchmarks.workload import GOOD, PROMPTS, WORDS, WORKLOADS, score
from distrl_envs.task import Grade, Problem, Task

_GOOD_IDS = frozenset(i for i, word in enumerate(WORDS) if word in GOOD)


class WordTask(Task):
    """Rewards good words: at the end, or (``dense``) at every token."""

    name = "words"

    def __init__(self, dense: bool = False, workload: str = "fixed"):
        self.has_step_reward, self.workload = dense, WORKLOADS[workload]
        self.max_prompt_tokens = self.workload.prompt_tokens

    def __len__(self) -> int:
        return PROMPTS

    def problem(self, row: int) -> Problem:
        self.check_row(row)
        return Problem(row, self.workload.prompt(row), {}, str(row))

    def grade(self, problem: Problem, completion: str, *, truncated: bool = False) -> Grade:
        return Grade(score(completion), "correct")

    def step_reward(self, problem: Problem, completion_ids) -> float:
        return 1.0 if completion_ids[-1] in _GOOD_IDS else 0.0
