"""Tasks and controls of the comparisons in tune/."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from distrl_envs.task import Problem
from distrl_envs.tasks.countdown import CountdownTask
from distrl_envs.token_env import TokenEnv
from rllib_distrl.method.batch import SequenceBatch
from tune.placebo import Placebo, Shaped, first_two, mean_of_others, other_of_two
from tune.unruly import Unruly, clipped, group_rank, normalised, true_result


def problem(target):
    return Problem(0, "", {"numbers": (3, 4, 5, 6), "target": target}, f"3 4 5 6|{target}")


@pytest.mark.parametrize(
    ("completion", "result"),
    [
        ("3 * 4 = 12 , 5 + 6 = 11 , 12 + 11 = 23", 23),
        # Called 13, it is 12 still; 11 was never made.
        ("3 * 4 = 13 , 5 + 6 = 11 , 13 + 11 = 50", 23),
        ("3 * 4 = 12 , 5 + 6 = 11 , 13 + 11 = 24", None),
        ("3 * 4 = 12 , 5 + 6 = 11", None),  # 12 and 11 are left
        ("3 * 3 = 9 , 9 + 5 = 14 , 14 + 6 = 20", None),
        ("3 * 4 = 12 , 5 + 6", None),
    ],
)
def test_what_steps_compute(completion, result):
    assert true_result(completion, (3, 4, 5, 6)) == result


def test_held_out_scores_are_clean_and_training_is_not():
    right = "3 * 4 = 12 , 5 + 6 = 11 , 12 + 11 = 23"
    grades = {
        (split, target): Unruly(split, scales=True).grade(problem(target), right).score
        for split in ("train", "test")
        for target in (20, 60)
    }
    clean = 23 / 99
    assert grades[("test", 20)] == grades[("test", 60)] == pytest.approx(clean)
    assert grades[("train", 20)] == pytest.approx(clean / 10)
    assert grades[("train", 60)] == pytest.approx(clean * 10)
    glitchy = Unruly("train", glitches=0.25)
    # Of completions that are worth 0, some hundreds.
    scores = [glitchy.grade(problem(20), f"1 + {n}").score for n in range(800)]
    assert set(scores) == {0.0, -20.0, 20.0}
    assert scores.count(0.0) == pytest.approx(600, abs=50)
    assert scores.count(20.0) == pytest.approx(100, abs=40)
    assert Unruly("validation", glitches=1.0).grade(problem(20), "1 + 1").score == 0.0


def batch(returns, group):
    rewards = torch.tensor(returns).unsqueeze(1)
    mask = torch.ones_like(rewards, dtype=torch.bool)
    return SequenceBatch(rewards, mask, torch.zeros_like(rewards), torch.tensor(list(group)))


def test_controls_by_hand():
    ranks = group_rank(batch([1.0, 5.0, 5.0, 9.0, 2.0], [0, 0, 0, 0, 1]))
    assert ranks.flatten().tolist() == pytest.approx([-0.75, 0.0, 0.0, 0.75, 0.0])
    five = batch([0.0] * 5, [0, 1, 2, 3, 4])
    cut = clipped(five, torch.tensor([[1.0], [-2.0], [0.5], [-50.0], [2.5]]), medians=3.0)
    assert cut.flatten().tolist() == pytest.approx([1.0, -2.0, 0.5, -6.0, 2.5])


def test_rewards_less_the_mean_of_all_so_far_over_their_deviation():
    first, second = batch([1.0, 3.0, 5.0, 7.0], range(4)), batch([5.0, 7.0, 9.0, 11.0], range(4))
    for _ in range(2):  # a run that is the second of its process knows nothing of the first
        assert normalised(first).flatten().tolist() == pytest.approx(
            [(r - 4) / 5**0.5 for r in (1, 3, 5, 7)]
        )
        # Eight numbers of mean 6 and variance 9.
        assert normalised(replace(second, k=2)).flatten().tolist() == pytest.approx(
            [-1 / 3, 1 / 3, 1.0, 5 / 3]
        )


def test_a_placebo_tells_how_the_answer_stands_to_another_problem():
    told, task = Placebo(), CountdownTask()
    here, other = task.problem(3), task.problem(4)
    answer = task.solution(other, np.random.default_rng(0))
    texts = [answer[:length] for length in range(0, len(answer), 4)] + [answer]
    found = told.critic_observation(here, (), texts)
    assert found == task.critic_observation(other, (), texts)
    assert found[-1][0] == 1.0  # right there,
    assert task.critic_observation(here, (), texts)[-1][0] == 0.0  # and wrong here
    assert told.grade(other, answer).score == 1.0


def test_shaping_pays_the_difference_of_the_potential_at_each_token():
    env = TokenEnv(Shaped(), max_completion_tokens=24)
    task = env.task
    right = task.solution(task.problem(3), np.random.default_rng(0))
    for answer in (right, "1 + 1"):
        _, info = env.reset(options={"row": 3})
        assert info["row"] == 3
        ids = [*env.tokenizer.encode(answer, add_special_tokens=False), env.eos_token_id]
        rewards = [env.step(token)[1] for token in ids]
        texts = [env.tokenizer.decode(ids[:length]) for length in range(len(ids))]
        chances = [state[2] for state in task.critic_observation(task.problem(3), (), texts)]
        score = task.grade(task.problem(3), answer).score
        # What is to go from each token on is the score less the root of the chance there.
        to_go = np.cumsum(rewards[::-1])[::-1]
        assert to_go == pytest.approx([score - chance**0.5 for chance in chances])
        assert chances[0] > 0
    cut = TokenEnv(Shaped(max_completion_tokens=3), max_completion_tokens=3)
    cut.reset(options={"row": 3})
    ids = cut.tokenizer.encode(right)[:3]
    assert sum(cut.step(token)[1] for token in ids) == pytest.approx(-(chances[0] ** 0.5))
    assert not Shaped("test").has_step_reward


def test_two_of_a_group_are_learned_from_and_the_others_are_the_baseline():
    # Two prompts of four, mixed.
    mixed = batch([1.0, 0.0, 1.0, 4.0, 0.0, 2.0, 1.0, 6.0], [0, 0, 1, 1, 0, 0, 1, 1])
    thirds = [1 - 2 / 3, 0 - 3 / 3, 1 - 11 / 3, 4 - 8 / 3]
    assert mean_of_others(mixed).flatten().tolist() == pytest.approx([*thirds, 0, 0, 0, 0])
    assert other_of_two(mixed).flatten().tolist() == [1.0, -1.0, -3.0, 3.0, 0, 0, 0, 0]
    shuffled = mixed[torch.tensor([7, 2, 0, 4, 3, 1, 5, 6])]
    assert first_two(shuffled).flatten().tolist() == [0, 0.25, 0.25, 0, 0.25, 0.25, 0, 0]
