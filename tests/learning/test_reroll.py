"""A game of two turns and a die: its optimum is learned, and the critic's law is the game's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from distrl_envs.token_env import TokenEnv
from distrl_envs.tokenizers import VOCABULARY
from rllib_distrl.maths.headroom import headroom
from rllib_distrl.model.loading import resolve
from tests.cli import forked
from tests.helpers import TINY
from tests.rollout.turn_tasks import Reroll

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

RECIPE = f"""
[run]
model = "{TINY}"
log_interval = 1000

[rollout]
prompts_per_iteration = 64
num_generations = 2
max_completion_tokens = 4

[eval]
before = false
problems = 60
n = 16
k = [1]
critic_prefixes = 0

[environment]
env = "distrl_envs:distrl/Countdown-v0"

[environment.env_config]
task = "tests.rollout.turn_tasks:Reroll"

[training]
minibatch_size = 64
critic_lr = 3e-3
bonus_coeff = 0.0
"""
ROLLS = np.arange(1, 7) / 6
BETWEEN = ROLLS - 1 / 12  # where no return is: laws are compared there


def trained(folder: Path, *settings: str) -> Path:
    (folder / "reroll.toml").write_text(RECIPE)
    output = folder / "output.txt"
    arguments = ("train", "reroll.toml", *settings, "--out", "run")
    code = forked.run(*arguments, cwd=folder, output=output, seconds=400)
    assert code == 0, output.read_text()
    return folder / "run"


def test_the_optimum_is_learned(tmp_path: Path) -> None:
    run = trained(tmp_path, "run.iterations=60", "training.lr=2e-3", "training.entropy_coeff=0.01")
    after = json.loads((run / "eval.json").read_text())["after"]
    assert after["avg@16"] > 17 / 24 - 0.02  # 14/24 for a coin; the mean of 960 dice has s.e. .008


class Game:
    """The game as the model plays it, by dynamic programming over all that it may say."""

    def __init__(self) -> None:
        self.env = TokenEnv(Reroll(), max_completion_tokens=4)
        self.model = AutoModelForCausalLM.from_pretrained(resolve(TINY)).eval()
        self.odd = [i for word, i in VOCABULARY.items() if self.env.task.keeps(word)]

    def says(self, ids: list[list[int]]) -> torch.Tensor:
        """(n, V) probabilities of the next token."""
        with torch.no_grad():
            return self.model(torch.tensor(ids)).logits[:, -1].softmax(-1)

    def after_roll(self, ids: list[list[int]], roll: int) -> np.ndarray:
        """(n, 6) laws of the score where the model is to answer a roll."""
        keep = self.says(ids)[:, self.odd].sum(-1, keepdim=True).numpy()
        return (1 - keep) / 6 + keep * (np.arange(1, 7) == roll)

    def at_start(self, prompt: list[int]) -> np.ndarray:
        """(6,) the law before anything is said."""
        words, law = list(VOCABULARY.values()), np.zeros(6)
        first = self.says([prompt])[0].numpy()[words]
        for roll in range(1, 7):
            asked = [[*prompt, word, *self.reply(roll, prompt)] for word in words]
            law += first @ self.after_roll(asked, roll) / 6
        return law

    def reply(self, roll: int, prompt: list[int]) -> list[int]:
        """What stands between the turns: the number, and the mark that ends a prompt."""
        return [VOCABULARY[str(roll)], prompt[-1]]


def below(quantiles: np.ndarray) -> np.ndarray:
    """(6,) the law's distribution function of quantiles between the rolls."""
    return (quantiles[:, None] < BETWEEN).mean(0)


def below_law(law: np.ndarray) -> np.ndarray:
    """(6,) the same of the probabilities of the rolls."""
    return np.cumsum(law) - law


def test_the_critics_law_is_the_games(tmp_path: Path) -> None:
    # The policy stays as it is: with such steps no weight of it moves.
    run = trained(
        tmp_path, "run.iterations=120", "training.lr=1e-30", "eval.token_problems=60",
        "training.n_quantiles=24", "env_runners.num_env_runners=0",
    )  # fmt: skip
    game = Game()
    start = game.at_start(game.env.prompt_ids(game.env.task.problem(0)))
    starts, errors, laws, told = [], [], [], []
    for row in pd.read_parquet(run / "samples" / "tokens.parquet").itertuples():
        prompt = game.env.prompt_ids(game.env.task.problem(row.row))
        quantiles = np.stack(np.split(np.asarray(row.quantiles), len(row.token)))
        starts.append(below(quantiles[0]) - below_law(start))
        (at,) = row.reply_at
        roll = int(row.reply_texts[0].split()[0])
        (law,) = game.after_roll([[*prompt, *row.token[:at], *game.reply(roll, prompt)]], roll)
        told.append(quantiles[at].std())
        errors.append(below(quantiles[at]) - below_law(law))
        laws.append(law)
    assert len(errors) > 100
    means, squares = np.stack(laws) @ ROLLS, np.stack(laws) @ ROLLS**2
    stds = np.sqrt(squares - means**2)
    known = headroom(means, stds, np.ones(len(laws)), bins=10)
    print(f"headroom of the standard deviation: {known:.2f}")
    assert known > 0.5
    # Where nothing has been said, the prompt is a number that means nothing.
    assert np.abs(np.mean(starts, 0)).max() < 0.08
    # And behind a roll, beside who knows the start's law alone.
    blind = np.abs([below_law(start) - below_law(law) for law in laws]).mean()
    assert np.abs(errors).mean() < 0.05 < 0.4 * blind
    assert np.corrcoef(stds, told)[0, 1] > 0.6
