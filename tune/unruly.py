"""Countdown whose rewards in training are unruly, and controls that can do without a law.

    python tune/compare.py tune/unruly.toml --seeds 8 --budget-tokens 60000 --out runs/unruly-clean
    python tune/compare.py tune/unruly.toml environment.env_config.task_config.glitches=0.03 ...

What a completion is worth is what its steps compute, the more the better, whatever the target is.
Rewards of different problems may be two decades apart, and a verifier may now and then answer
nonsense, in training alone: what is held out is scored as it is.
"""

from random import Random

import torch
from torch import Tensor

from distrl_envs.task import Grade, Problem
from distrl_envs.tasks.countdown import LARGEST_VALUE, OPERATORS, STEP, CountdownTask
from rllib_distrl.method.batch import SequenceBatch

SCALES = 0.1, 10.0
LARGE_TARGET = 40
"""From here on a problem is of the other family, 36 % of them; the prompt shows which."""
GLITCH = 20.0
"""Times the reward of a perfect answer, with either sign."""


class Unruly(CountdownTask):
    """Countdown's numbers and steps, graded by how much the steps compute."""

    name = "unruly"

    def __init__(
        self,
        split: str = "train",
        seed: int = 0,
        numbers: int = 4,
        scales: bool = False,
        glitches: float = 0.0,
    ):
        """Chooses what is unruly in the split "train".

        Args:
            split: "train", "validation" or "test".
            seed: Which problems are made.
            numbers: As of Countdown.
            scales: Whether rewards are times .1 for small targets and times 10 for large ones.
            glitches: The share of completions that get -20 or 20 times a perfect answer's reward
                in place of their own.
        """
        super().__init__(split, seed, numbers)
        self.scales = scales
        self.glitches = glitches

    def grade(self, problem: Problem, completion: str, *, truncated: bool = False) -> Grade:
        """The steps' true result over 99, within 0 and 1; in training as it comes."""
        result = true_result(completion, problem.data["numbers"])
        score = 0.0 if result is None else min(max(result / LARGEST_VALUE, 0.0), 1.0)
        status = "no_answer" if result is None else "correct" if score == 1.0 else "small"
        if self.split == "train":
            score = self._unruly(score, problem, completion)
        return Grade(score, status, completion.strip())

    def _unruly(self, score: float, problem: Problem, completion: str) -> float:
        # A completion's verdict is always the same, and no other completion's says what it is.
        chance = Random(f"{problem.key} {completion}")
        if chance.random() < self.glitches:
            score = chance.choice((-GLITCH, GLITCH))
        large = problem.data["target"] >= LARGE_TARGET
        return score * SCALES[large] if self.scales else score


def true_result(completion: str, numbers: tuple[int, ...]) -> int | None:
    """What the steps of an answer really compute, whatever they say that it is.

    Args:
        completion: `3 * 4 = 13 , 13 + 5 = 18` of 3, 4 and 5: 17.
        numbers: Each must be used once, under its name; results under the name they were given.

    Returns:
        None where the steps do not use what there is, or leave more than one number.
    """
    held = [(number, number) for number in numbers]  # by name, and what it is
    for piece in completion.split(","):
        step = STEP.fullmatch(piece.strip())
        if step is None:
            return None
        left, symbol, right, said = step.groups()
        found = []
        for name in (int(left), int(right)):
            place = next((i for i, (known, _) in enumerate(held) if known == name), None)
            if place is None:
                return None
            found.append(held.pop(place)[1])
        held.append((int(said), OPERATORS[symbol](*found)))
    return held[0][1] if len(held) == 1 else None


def group_rank(batch: SequenceBatch) -> Tensor:
    """2 F(R) - 1 with F the law of the group's returns, its own included: without a critic."""
    same = (batch.group.unsqueeze(0) == batch.group.unsqueeze(1)).to(batch.returns.dtype)
    above = (batch.returns.unsqueeze(1) - batch.returns.unsqueeze(0)).sign()
    return batch.at_tokens((same * above).sum(1) / same.sum(1))


def clipped(batch: SequenceBatch, advantages: Tensor, *, medians: float = 3.0) -> Tensor:
    """Cuts advantages at so many times the median of their size in the batch (one learner's)."""
    bound = medians * advantages[batch.loss_mask].abs().median()
    return advantages.clamp(-bound, bound)


_SEEN: list[Tensor] = []  # the returns of this process's run so far


def normalised(batch: SequenceBatch) -> Tensor:
    """Rewards less the mean of all so far, over their deviation: what PopArt has a value learn.

    van Hasselt et al. 2016, arXiv 1602.07714, for one learner. Statistics of all returns in the
    place of recent ones soon stand still: the correction of the head's weights by which a moving
    scale would leave values where they were (its "Pop") is left out.
    """
    if batch.k == 1:
        _SEEN.clear()
    _SEEN.append(batch.returns)
    seen = torch.cat(_SEEN)
    last = batch.loss_mask.long().cumsum(1).argmax(1, keepdim=True)
    mean = seen.mean().expand(last.shape)
    return batch.rewards.scatter_add(1, last, -mean) / seen.std(correction=0).clamp(min=1e-4)
