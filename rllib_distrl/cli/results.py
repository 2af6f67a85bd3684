"""Tables of evaluation results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table


def print_before_after(console: Console, results: Mapping[str, Any]) -> None:
    """Prints the table that ends a training run.

    Args:
        console: Where to.
        results: The contents of `eval.json`; shares in [0, 1], shown as percentages.
    """
    before, after = results["before"], results["after"]
    if before is None:
        print_summary(console, after, results["problems"], results["samples"])
        return
    table = Table()
    table.add_column("metric")
    for column in ("before", "after", "change"):
        table.add_column(column, justify="right")
    for name in (k for k in before if k in after):
        change = after[name] - before[name]
        style = "green" if change > 0 else "red" if change < 0 else ""
        table.add_row(
            name,
            _percent(before[name]),
            _percent(after[name]),
            f"[{style}]{_signed(change)}[/]" if style else _signed(change),
        )
    _print(console, table, results["problems"], results["samples"])


def print_summary(
    console: Console, summary: Mapping[str, float], problems: int, samples: int
) -> None:
    """Prints the table of one evaluation."""
    table = Table()
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in summary.items():
        table.add_row(name, _percent(value))
    _print(console, table, problems, samples)


def in_one_line(summary: Mapping[str, float]) -> str:
    """Formats one evaluation as `avg@64 17.1 %, pass@8 60.9 %`."""
    return ", ".join(f"{name} {_percent(value)} %" for name, value in summary.items())


def _print(console: Console, table: Table, problems: int, samples: int) -> None:
    console.print(
        f"{problems} held-out problems, {samples} samples each, in %:",
        highlight=False,
        soft_wrap=True,
    )
    console.print(table)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}"
