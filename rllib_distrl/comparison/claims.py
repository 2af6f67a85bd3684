"""What came out, in sentences: only what the numbers and their intervals say."""

from __future__ import annotations

from collections.abc import Callable

from rllib_distrl.comparison.matched import front_metrics, levels, matched_mean
from rllib_distrl.comparison.results import Results, Row
from rllib_distrl.comparison.statistics import PairedTest
from rllib_distrl.comparison.tables import main_metrics, number

_MOST_NAMED = 4
_SIGNIFICANT = 0.05


def claims(results: Results) -> list[str]:
    """A sentence per metric at equal average score, and per metric after training.

    Each names the recipes whose 95 % interval of the paired difference to the baseline is above
    zero, those below, the furthest first and four at most, and counts the others. Before them
    stands a warning where there are too few seeds for any of it.
    """
    found = _warning(results)
    if over := levels(results):
        for metric in front_metrics(results):
            found.append(
                _sentence(
                    results,
                    metric,
                    f"{metric} at equal average score",
                    lambda row, m=metric: matched_mean(results, row, m, over).test,
                )
            )
    for metric in main_metrics(results):
        if "@" in metric:
            found.append(
                _sentence(
                    results,
                    metric,
                    f"{metric} after training",
                    lambda row, m=metric: results.against_baseline(row, m),
                )
            )
    return found


def _warning(results: Results) -> list[str]:
    seeds = max(len(row.records) for row in results.rows)
    least = 2.0 ** (1 - seeds)
    if least <= _SIGNIFICANT:
        return []
    return [
        f"{seeds} seeds cannot show a difference, whatever its size: the smallest p is {least:g}, "
        "and the intervals are too narrow. What follows are directions."
    ]


def _sentence(
    results: Results, metric: str, what: str, test_of: Callable[[Row], PairedTest | None]
) -> str:
    tests = [(row.name, test_of(row)) for row in results.rows[1:]]
    told = sorted(
        ((name, test) for name, test in tests if test is not None),
        key=lambda one: -one[1].difference.mean,
    )
    above = [_named(metric, *one) for one in told if one[1].difference.low > 0]
    below = [_named(metric, *one) for one in told if one[1].difference.high < 0]
    unclear = len(told) - len(above) - len(below)
    untold = len(tests) - len(told)
    parts = [f"above {results.baseline.name}: {_listed(above) or 'none'}"]
    parts += [f"below: {_listed(below[::-1])}"] if below else []
    parts += [f"interval holds zero: {unclear}"] if unclear else []
    parts += [f"too few seeds to tell: {untold}"] if untold else []
    return f"{what}: {'; '.join(parts)}."


def _listed(names: list[str]) -> str:
    """The first four, and how many more there are."""
    more = [f"and {len(names) - _MOST_NAMED} more"] if len(names) > _MOST_NAMED else []
    return ", ".join([*names[:_MOST_NAMED], *more])


def _named(metric: str, name: str, test: PairedTest) -> str:
    found = test.difference
    low, high = (number(metric, end, signed=True) for end in (found.low, found.high))
    return f"{name} {number(metric, found.mean, signed=True)} [{low}, {high}]"
