"""What is shown of an iteration, and of an evaluation on its way."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from rllib_distrl.cli.display import EvaluationProgress, Progress, duration, training_display
from rllib_distrl.evaluation.sampling import Progress as EvalProgress
from rllib_distrl.experiments.training import RunLength


def row(iteration: int, tokens: int, **more: float) -> dict[str, float]:
    return {
        "iteration": iteration,
        "env_runners/num_env_steps_sampled_lifetime": tokens,
        "env_runners/num_env_steps_sampled": 100,
        "env_runners/episode_return_mean": 0.25,
        "learners/default_policy/entropy": 0.75,
        **more,
    }


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_speed_and_time_left() -> None:
    clock = Clock()
    progress = Progress(RunLength(10), clock)
    clock.now = 2.0
    snapshot = progress.snapshot(row(1, 100))
    assert snapshot.tokens_per_s == pytest.approx(50.0)
    assert snapshot.seconds_left == pytest.approx(18.0)
    clock.now = 3.0
    snapshot = progress.snapshot(row(2, 200))
    assert snapshot.tokens_per_s == pytest.approx(200 / 3)
    assert snapshot.seconds_left == pytest.approx(8 * 1.5)


def test_speed_after_a_resume_leaves_earlier_tokens_out() -> None:
    clock = Clock()
    progress = Progress(RunLength(10), clock)
    clock.now = 2.0
    snapshot = progress.snapshot(row(6, 600))
    assert snapshot.tokens_per_s == pytest.approx(50.0)
    assert snapshot.seconds_left == pytest.approx(8.0)


def test_the_last_validation_stays_even_if_zero() -> None:
    progress = Progress(RunLength(3), Clock())
    key = "evaluation/env_runners/episode_return_mean"
    assert progress.snapshot(row(1, 1)).validation is None
    assert progress.snapshot(row(2, 2, **{key: 0.5})).validation == 0.5
    assert progress.snapshot(row(3, 3)).validation == 0.5
    assert progress.snapshot(row(4, 4, **{key: 0.0})).validation == 0.0


def test_plain_lines_come_at_the_interval_and_at_the_end() -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=200)
    progress = Progress(RunLength(5), Clock())
    with training_display(console, interval=2) as show:
        for iteration in range(1, 6):
            show(progress.snapshot(row(iteration, 1_000 * iteration)))
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["2/5", "4/5", "5/5"]
    assert "tokens 2,000" in lines[0]
    assert "return 0.250" in lines[0]
    assert "entropy 0.750" in lines[0]
    assert "quantile spread" not in lines[0]


def test_a_budget_of_tokens_shows_how_much_of_it_is_left() -> None:
    clock = Clock()
    progress = Progress(RunLength(5, budget_tokens=1_000), clock)
    clock.now = 2.0
    first = progress.snapshot(row(1, 100))
    assert first.cells()["iteration"] == "1"
    assert first.cells()["tokens"] == "100/1,000"
    assert first.share_done == pytest.approx(0.1)
    assert first.seconds_left == pytest.approx(18.0)
    assert not first.last
    assert not progress.snapshot(row(9, 999)).last
    assert progress.snapshot(row(10, 1_000)).last


def test_a_terminal_gets_a_live_table() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120)
    with training_display(console, interval=100) as show:
        show(Progress(RunLength(5), Clock()).snapshot(row(1, 1_000)))
    assert "1/5" in stream.getvalue()
    assert "1,000" in stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, ""), (0.4, "0:00"), (59.6, "1:00"), (3661, "1:01:01")]
)
def test_duration(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def shown_of(steps: list[tuple[float, EvalProgress]], *, terminal: bool) -> str:
    """What is printed of progress reported at given times."""
    now = [0.0]
    console = Console(file=io.StringIO(), width=120, force_terminal=terminal)
    with EvaluationProgress(console, "Evaluating", clock=lambda: now[0]) as report:
        for now[0], progress in steps:
            report(progress)
    return console.file.getvalue()  # type: ignore[attr-defined]


EVALUATION = [
    (0.0, EvalProgress(5, 20, resumed=5, n=64)),
    (10.0, EvalProgress(6, 20, 5, samples=64, tokens=500, seconds=10.0, score=0.5, n=64)),
    (40.0, EvalProgress(8, 20, 5, samples=240, tokens=60_000, seconds=40.0, score=0.25, n=64)),
    (50.0, EvalProgress(10, 20, 5, samples=320, tokens=70_000, seconds=50.0, score=0.25, n=64)),
]


def test_a_log_gets_a_line_every_half_minute() -> None:
    # 240 samples took 40 s, of 1,280 there are 720 left: the samples of a problem that is not
    # finished count too.
    assert shown_of(EVALUATION, terminal=False).splitlines() == [
        "Continuing: 5 of 20 problems are finished.",
        "Evaluating: 560/1,280 samples  score 0.250  tokens/s 1,500  time left 2:00",
    ]


def test_a_short_evaluation_prints_nothing() -> None:
    assert (
        shown_of(
            [(0.0, EvalProgress(0, 2)), (3.0, EvalProgress(2, 2, 0, 4, 9, 3.0))], terminal=False
        )
        == ""
    )


def test_a_terminal_gets_a_bar() -> None:
    text = shown_of(EVALUATION, terminal=True)
    assert "640/1280" in text
    assert "samples  score 0.250  tokens/s 1,400" in text
