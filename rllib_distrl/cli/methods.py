"""`distrl methods`: what a recipe may choose by name, from the registry."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from rllib_distrl.method.registry import KINDS, Method, methods

_PAPER = re.compile(r"arXiv (\d{4}\.\d{4,5})")
_AUTHORS = re.compile(r"\(?([A-Z][\w-]+(?: (?:et al\.|& [A-Z][\w-]+))?)[ ,]+((?:19|20)\d\d)\b")


@dataclass(frozen=True)
class Entry:
    """One method as the table shows it: all texts are read from the code."""

    kind: str
    name: str
    what: str
    source: str
    needs: str
    settings: str


def entries(kind: str | None = None) -> list[Entry]:
    """Every registered method, by kind and name.

    Raises:
        ValueError: for an unknown kind.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"There is no kind {kind!r}; there are {', '.join(KINDS)}.")
    shipped = [
        each for one in KINDS if kind in (None, one) for each in methods(one)
        if each.function.__module__.startswith("rllib_distrl.")
    ]  # fmt: skip
    return [_entry(each) for each in shipped]


def _entry(method: Method) -> Entry:
    text = inspect.getdoc(method.function) or ""
    needs = {} if callable(method.needs) else method.needs
    settings = [
        name if p.default is inspect.Parameter.empty else f"{name}={p.default!r}".replace("'", "")
        for name, p in method.settings().items()
    ]
    return Entry(
        method.kind,
        method.name,
        text.partition("\n\n")[0].replace("\n", " "),
        _source(text),
        "by its settings" if callable(method.needs) else ", ".join(sorted(needs)),
        ", ".join(settings),
    )


def _source(text: str) -> str:
    """The first paper that a docstring names, or that it is our choice."""
    text = " ".join(text.split())
    if found := _PAPER.search(text):
        return f"arXiv {found[1]}"
    if found := _AUTHORS.search(text):
        return f"{found[1]} {found[2]}"
    return "ours" if re.search(r"\b[Oo]urs?\b", text) else ""


def markdown() -> str:
    """The table of docs/methods.md, one part per kind."""
    parts = []
    for kind in KINDS:
        lines = [f"### {kind}", "", "| name | what | source | reads | settings |"]
        lines.append("|---|---|---|---|---|")
        for entry in entries(kind):
            cells = (f"`{entry.name}`", entry.what, entry.source, entry.needs, entry.settings)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def run_methods(kind: str | None, console: Console | None = None) -> None:
    """Prints the methods of a kind, or of all."""
    console = console or Console()
    table = Table(box=None, pad_edge=False, show_lines=False)
    for column in ("kind", "name", "what", "settings"):
        table.add_column(column, overflow="fold", style="bold" if column == "name" else None)
    for entry in entries(kind):
        table.add_row(entry.kind, entry.name, entry.what, entry.settings)
    console.print(table)
