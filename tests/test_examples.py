"""examples/ are read in a sitting and do what they say."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[1]


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_an_example_is_read_in_a_sitting(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300


def test_the_task_halves_products_alone():
    task = load("countdown").NoProducts()
    problem = next(p for p in map(task.problem, range(100)) if "*" in task.solution(p, task_rng()))
    solution = task.solution(problem, task_rng())
    grade = task.grade(problem, solution)
    assert (grade.score, grade.status) == (0.5, "multiplied")
    assert task.grade(problem, "1 * 1 = 2").score == 0.0


def task_rng():
    import numpy as np

    return np.random.default_rng(0)


def test_the_stage_cuts_at_its_deviations():
    # Of 0, 0, 0, 4 the mean is 1 and the standard deviation √3: 4 is cut to 1 + √3, 99 is padding.
    batch = SimpleNamespace(
        loss_mask=torch.tensor([[True, True, True], [True, False, False]]),
        all_reduce=lambda x: x,
        metrics={},
    )
    advantages = torch.tensor([[0.0, 0.0, 0.0], [4.0, 99.0, 0.0]])
    bounded = load("countdown").winsorised(batch, advantages, deviations=1.0)
    torch.testing.assert_close(bounded, torch.tensor([[0.0, 0.0, 0.0], [1.0 + 3.0**0.5, 0.0, 0.0]]))
    assert batch.metrics == {"winsorised_share": 0.25}


@pytest.mark.slow
def test_the_example_runs_with_a_remote_runner():
    command = [sys.executable, "examples/countdown.py"]
    command += ["--iterations", "2", "--prompts", "8", "--env-runners", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    before, trained, after, prompt, tokens = done.stdout.splitlines()
    assert before.startswith("before: average") and after.startswith("after:  average")
    assert "score" in trained and "->" in prompt and "<eos>(" in tokens
