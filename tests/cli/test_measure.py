from __future__ import annotations

import io

from rich.console import Console

from rllib_distrl.cli.display import EvaluationProgress
from rllib_distrl.evaluation.sampling import Progress


def shown(steps: list[tuple[float, Progress]], *, terminal: bool) -> str:
    """What is printed of progress reported at given times."""
    now = [0.0]
    console = Console(file=io.StringIO(), width=120, force_terminal=terminal)
    with EvaluationProgress(console, "Evaluating", clock=lambda: now[0]) as report:
        for now[0], progress in steps:
            report(progress)
    return console.file.getvalue()  # type: ignore[attr-defined]


STEPS = [
    (0.0, Progress(5, 20, resumed=5, n=64)),
    (10.0, Progress(6, 20, 5, samples=64, tokens=500, seconds=10.0, score=0.5, n=64)),
    (40.0, Progress(8, 20, 5, samples=240, tokens=60_000, seconds=40.0, score=0.25, n=64)),
    (50.0, Progress(10, 20, 5, samples=320, tokens=70_000, seconds=50.0, score=0.25, n=64)),
]


def test_a_log_gets_a_line_every_half_minute() -> None:
    # 240 samples took 40 s, of 1,280 there are 720 left: the samples of a problem that is not
    # finished count too.
    assert shown(STEPS, terminal=False).splitlines() == [
        "Continuing: 5 of 20 problems are finished.",
        "Evaluating: 560/1,280 samples  score 0.250  tokens/s 1,500  time left 2:00",
    ]


def test_a_short_evaluation_prints_nothing() -> None:
    assert shown([(0.0, Progress(0, 2)), (3.0, Progress(2, 2, 0, 4, 9, 3.0))], terminal=False) == ""


def test_a_terminal_gets_a_bar() -> None:
    text = shown(STEPS, terminal=True)
    assert "640/1280" in text
    assert "samples  score 0.250  tokens/s 1,400" in text
