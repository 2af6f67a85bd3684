"""Reading runs at an equal average score: by hand, and on simulated runs whose truth is known."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from rllib_distrl.experiments.statistics import ValidationFit, estimate, sign_flips
from rllib_distrl.maths.pass_k import pass_at_k

PROBLEMS, SAMPLES, SEEDS = 100, 64, 8


def test_the_fit_keeps_a_quadratic_and_is_read_between_its_ends() -> None:
    tokens = (1.0, 2.0, 3.0, 4.0, 5.0)
    fit = ValidationFit(tokens, tuple(0.01 * t * t for t in tokens))
    assert fit.span == (pytest.approx(0.01), pytest.approx(0.25))
    # At the average .09 there are 3 tokens, and .9 - .1 t is .6 there.
    found = fit.read([0.0, 0.09, 0.3], [0.9 - 0.1 * t for t in tokens])
    assert np.isnan(found[[0, 2]]).all()
    assert found[1] == pytest.approx(0.6, abs=1e-3)


def test_two_validations_are_a_line_and_one_is_nothing() -> None:
    fit = ValidationFit((1.0, 2.0), (0.1, 0.3))
    assert fit.read([0.1, 0.2, 0.3], [0.9, 0.7]) == pytest.approx([0.9, 0.8, 0.7])
    assert ValidationFit((1.0,), (0.1,)).span is None
    assert np.isnan(ValidationFit((1.0,), (0.1,)).read([0.1], [0.9])).all()
    assert ValidationFit((), ()).span is None


def test_an_average_that_falls_stands_still_and_is_read_in_its_middle() -> None:
    fit = ValidationFit((1.0, 2.0), (0.3, 0.1))
    assert fit.span == (pytest.approx(0.2), pytest.approx(0.2))
    assert fit.read([0.2], [0.9, 0.7]) == pytest.approx([0.8])


class Runs:
    """Runs whose problems polarise as their average rises, which is why pass@16 falls.

    A problem's logit is its difficulty, stretched along training, plus what training adds; `extra`
    keeps the hard problems alive. A seed goes a way of its own, and problems are drawn anew for
    every experiment. Truth is the law at the same time, without samples.
    """

    def __init__(self, rng: np.random.Generator, validations: int):
        self.rng, self.times = rng, np.arange(1, validations + 1) / validations

    def law(self, times: np.ndarray, difficulty: np.ndarray, extra: float) -> np.ndarray:
        """(T, P) chance to solve each problem."""
        logits = difficulty * (1 + 1.2 * times[:, None] * (1 - extra)) - 1.3
        return 1 / (1 + np.exp(-logits - 1.5 * (1 - np.exp(-2.5 * times[:, None]))))

    def validated(self, difficulty: np.ndarray, extra: float) -> tuple[np.ndarray, np.ndarray]:
        """(T,) average score and pass@16, as a validation estimates them."""
        average, solved = self.by_problem(difficulty, extra)
        return average.mean(1), solved.mean(1)

    def by_problem(self, difficulty: np.ndarray, extra: float) -> tuple[np.ndarray, np.ndarray]:
        """(T, P) the same problem by problem."""
        law = self.law(self.times * self.rng.normal(1, 0.1), difficulty, extra)
        right = self.rng.binomial(SAMPLES, law)
        return right / SAMPLES, pass_at_k(SAMPLES, right.ravel(), 16).reshape(right.shape)

    def truth(self, levels: list[float], difficulty: np.ndarray, extra: float) -> float:
        """pass@16 where the average is at a level, mean over the levels, without samples."""
        times = np.linspace(0, 1.4, 150)
        law = self.law(times, difficulty, extra)
        return float(np.interp(levels, law.mean(1), (1 - (1 - law) ** 16).mean(1)).mean())


def read(runs: Runs, levels: list[float], path: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    return ValidationFit(tuple(runs.times), tuple(path[0])).read(levels, path[1])


def first_crossing(path: tuple[np.ndarray, np.ndarray], level: float) -> float:
    for (a0, a1), (v0, v1) in zip(pairwise(path[0]), pairwise(path[1]), strict=True):
        if min(a0, a1) <= level <= max(a0, a1):
            return v0 + (level - a0) / (a1 - a0) * (v1 - v0)
    return float("nan")


@pytest.mark.parametrize("validations", [4, 7, 11])
def test_a_reading_is_right_on_average_and_less_noisy_than_the_first_crossing(
    validations: int,
) -> None:
    rng = np.random.default_rng(validations)
    runs, difficulty, level = Runs(rng, validations), rng.normal(0, 1.2, PROBLEMS), 0.40
    truth = runs.truth([level], difficulty, 0.0)
    paths = [runs.validated(difficulty, 0.0) for _ in range(250)]
    fitted = np.array([read(runs, [level], path)[0] for path in paths]) - truth
    crossed = np.array([first_crossing(path, level) for path in paths]) - truth
    assert np.isnan(fitted).mean() < 0.1
    assert abs(np.nanmean(fitted)) < 0.004
    assert np.nanmean(fitted**2) < 0.9 * np.nanmean(crossed**2)


@pytest.mark.parametrize("extra", [0.0, 0.5])
def test_differences_at_an_equal_average_cover_the_truth_of_their_problems(extra: float) -> None:
    rng, levels = np.random.default_rng(3), [0.37, 0.39, 0.41, 0.43]
    runs, covered, told, differ = Runs(rng, 7), [], [], []
    for _ in range(120):
        difficulty = rng.normal(0, 1.2, PROBLEMS)
        ways = [[runs.validated(difficulty, e) for e in (extra, 0.0)] for _ in range(SEEDS)]
        pairs = [read(runs, levels, a) - read(runs, levels, b) for a, b in ways]
        differences = [np.nanmean(pair) for pair in pairs if not np.isnan(pair).all()]
        truth = runs.truth(levels, difficulty, extra) - runs.truth(levels, difficulty, 0.0)
        found = estimate(differences)
        covered.append(found.low <= truth <= found.high)
        told.append(sign_flips([differences]).p[0] <= 0.05)
        differ.append(truth)
    assert 0.91 <= np.mean(covered) <= 0.99
    if extra == 0.0:
        assert np.mean(told) < 0.09
    else:
        assert np.mean(told) > 0.9
        # Other problems have another truth: intervals over the seeds alone do not hold that.
        assert np.std(differ) > 0.002


def test_problems_drawn_again_move_a_reading_as_the_fit_through_them_does() -> None:
    rng, levels, problems = np.random.default_rng(5), [0.37, 0.4, 0.43], 800
    runs = Runs(rng, 7)
    average, solved = runs.by_problem(rng.normal(0, 1.2, problems), 0.0)
    times = tuple(runs.times)
    fit = ValidationFit(times, tuple(average.mean(1)))
    whole, found = fit.read(levels, solved.mean(1)), fit.read_problems(levels, solved, average)
    assert found.shape == (3, problems)
    assert found.mean(1) == pytest.approx(whole, abs=1e-9)
    moved, refitted = [], []
    for _ in range(300):
        drawn = rng.integers(problems, size=problems)
        again = ValidationFit(times, tuple(average[:, drawn].mean(1)))
        refitted.append(again.read(levels, solved[:, drawn].mean(1)))
        moved.append(found[:, drawn].mean(1))
    moved, refitted = np.array(moved), np.array(refitted)
    assert not np.isnan(refitted[:, 1]).any()
    assert moved[:, 1].std() == pytest.approx(refitted[:, 1].std(), rel=0.1)
    assert np.corrcoef(moved[:, 1], refitted[:, 1])[0, 1] > 0.95
    # The average itself is at the level whatever the problems are.
    assert fit.read_problems(levels, average, average) == pytest.approx(
        np.repeat(np.array(levels)[:, None], problems, axis=1), abs=1e-6
    )
    assert np.isnan(fit.read_problems([0.9], solved, average)).all()


@pytest.mark.parametrize("extra", [0.0, 0.5])
def test_intervals_over_problems_too_cover_the_truth_of_new_problems(extra: float) -> None:
    rng, levels = np.random.default_rng(3), [0.37, 0.39, 0.41, 0.43]
    runs, all_problems = Runs(rng, 7), rng.normal(0, 1.2, 20_000)
    truth = runs.truth(levels, all_problems, extra)
    truths = np.array([truth, truth - runs.truth(levels, all_problems, 0.0)])
    covered, by_seeds = [], []
    for _ in range(120):
        difficulty = rng.normal(0, 1.2, PROBLEMS)
        tables = []  # of each seed (2, P): the recipe itself, and against the other
        for _ in range(SEEDS):
            ways = [runs.by_problem(difficulty, e) for e in (extra, 0.0)]
            ours, theirs = (
                ValidationFit(tuple(runs.times), tuple(average.mean(1))).read_problems(
                    levels, solved, average
                )
                for average, solved in ways
            )
            reached = ~np.isnan(ours - theirs).any(1)
            if reached.any():
                own, other = ours[reached].mean(0), theirs[reached].mean(0)
                tables.append((own, own - other))
        both = np.array(tables).swapaxes(0, 1)
        for found, kept in (
            ([estimate(table.mean(1), table) for table in both], covered),
            ([estimate(table.mean(1)) for table in both], by_seeds),
        ):
            kept.append([e.low <= t <= e.high for e, t in zip(found, truths, strict=True)])
    assert np.mean(covered, axis=0).min() >= 0.90
    # Over the seeds alone they are of these problems, and hold a recipe's own value hardly ever.
    assert np.mean(by_seeds, axis=0)[0] < 0.5
    if extra:
        assert np.mean(by_seeds, axis=0)[1] < 0.8
