"""Controls for critics that are told the verifier's state, on Countdown.

`Placebo` tells them that of another problem. `Shaped` pays the state to a critic that is told
nothing. `mean_of_others`, with `first_two`, is a baseline that nearly knows each prompt's mean, and
`other_of_two` what two completions alone know of it.
"""

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor

from distrl_envs.task import Problem, Turn
from distrl_envs.tasks.countdown import CountdownTask
from rllib_distrl.maths.group_advantages import group_index, leave_one_out
from rllib_distrl.maths.losses import token_weights
from rllib_distrl.method.batch import SequenceBatch


class Placebo(CountdownTask):
    """Countdown, whose critic is told how the same answer would stand to the next problem.

    Its name is Countdown's, of which its problems are drawn.
    """

    def critic_observation(
        self, problem: Problem, turns: Sequence[Turn], texts: Sequence[str]
    ) -> list[tuple[float, ...]]:
        """As Countdown's, of the row behind this one."""
        return super().critic_observation(self.problem(problem.row + 1), turns, texts)


class Shaped(CountdownTask):
    """Countdown that pays, in training, the difference of a potential at each token.

    Potential-based shaping (Ng, Harada & Russell 1999): phi(s') - phi(s), phi 0 at the end. What is
    to go from s is then R - phi(s). phi is the root of the chance that uniform play has: it is the
    initial policy's mean return within .01, and explains .60 of its variance (our choice).
    """

    def __init__(
        self, split: str = "train", seed: int = 0, numbers: int = 4, max_completion_tokens: int = 24
    ):
        """As Countdown; `max_completion_tokens` is the limit at which a completion ends."""
        super().__init__(split, seed, numbers)
        self.has_step_reward = split == "train"
        self._limit = max_completion_tokens
        self._tokens = self.tokenizer()

    def step_reward(self, problem: Problem, completion_ids: Sequence[int]) -> float:
        """What the last token adds to the potential."""
        last, length = completion_ids[-1], len(completion_ids)
        texts = [self._tokens.decode(completion_ids[:n]) for n in (length - 1, length)]
        states = self.critic_observation(problem, (), texts)
        before, after = (sqrt(chance) for _, _, chance, *_ in states)
        ended = last == self._tokens.eos_token_id or length == self._limit
        return (0.0 if ended else after) - before


def mean_of_others(batch: SequenceBatch) -> Tensor:
    """R less the mean of all others of its prompt; for the first two completions of each."""
    kept = _keep_two(batch)
    return batch.at_tokens(leave_one_out(batch.returns, batch.group).where(kept, 0.0))


def other_of_two(batch: SequenceBatch) -> Tensor:
    """R less that of the other one, of the first two completions of each prompt."""
    kept = _keep_two(batch)
    advantages = torch.zeros_like(batch.returns)
    advantages[kept] = leave_one_out(batch.returns[kept], batch.group[kept])
    return batch.at_tokens(advantages)


def _keep_two(batch: SequenceBatch) -> Tensor:
    """(B,), bool: the first two rows of each group, which `first_two` then finds marked."""
    index, _ = group_index(batch.group)
    same = index.unsqueeze(0) == index.unsqueeze(1)
    kept = batch.extras["learned_from"] = same.tril(-1).sum(1) < 2
    return kept


def first_two(batch: SequenceBatch) -> Tensor:
    """The mean over the tokens of those of a minibatch that an advantage above has kept."""
    learned = batch.loss_mask & batch.column("learned_from").unsqueeze(1)
    return token_weights(learned, all_reduce=batch.all_reduce)
