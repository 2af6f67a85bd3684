"""The one HTML page of viewer, reports and comparisons: a file that needs no network."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files


def html_page(title: str, body: str, *, style: str, script: str = "") -> str:
    """A page in the colours of the reader's choice, light or dark.

    Its own policy forbids every connection, and every script but the one that is given.

    Args:
        title: Plain text.
        body: HTML.
        style: Name of the style sheet that is added to the common one.
        script: Its only script, which ``body`` must hold as it is; none may run if empty.
    """
    dark = read_asset("dark.css")
    styles = fill(read_asset("page.css"), {"DARK": dark}) + read_asset(style)
    parts = {
        "POLICY": _policy(script, styles),
        "TITLE": html.escape(title),
        "STYLE": styles,
        "BODY": body,
    }
    return fill(read_asset("page.html"), parts)


def report_page(title: str, sections: Sequence[str], note: str = "") -> str:
    """A page of sections below a headline, without scripts."""
    head = f"<h1>{html.escape(title)}</h1>" + (f"<p>{prose(note)}</p>" if note else "")
    body = "\n".join([f"<header>{head}</header>", "<main>", *sections, "</main>"])
    return html_page(title, body, style="report.css")


def prose(text: str) -> str:
    """Plain text as HTML; what stands between backticks is code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def section(title: str, body: str, words: str = "", *, half: bool = False) -> str:
    """A part of a report.

    Args:
        title: Plain text.
        body: HTML.
        words: What a reader must know; plain text.
        half: Whether it shares the width of a wide page with another one.
    """
    said = f"<p>{prose(words)}</p>" if words else ""
    kind = ' class="half"' if half else ""
    return f"<section{kind}><h2>{html.escape(title)}</h2>{said}{body}</section>"


@dataclass(frozen=True)
class Table:
    """Cells as text.

    Attributes:
        head: Names of the columns.
        lines: One per row; the first cell names it.
        wraps: Whether cells are texts that may be broken into lines.
        mark: Whether rows whose cells differ are marked.
    """

    head: Sequence[str]
    lines: Sequence[Sequence[str]]
    wraps: bool = False
    mark: bool = False

    def to_markdown(self) -> str:
        """A Markdown table."""
        rows = [self.head, ["---"] * len(self.head), *self.lines]
        cells = ([cell.replace("|", "\\|") for cell in row] for row in rows)
        return "\n".join("| " + " | ".join(row) + " |" for row in cells)

    def to_html(self) -> str:
        """A `<table>`; in a frame of its own that scrolls where the page is too narrow."""
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in self.head)
        body = "".join(map(self._row, self.lines))
        kind = "" if self.wraps else ' class="numbers"'
        table = f"<table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        return f'<div class="wide" tabindex="0">{table}</div>'

    def _row(self, line: Sequence[str]) -> str:
        kind = ' class="differs"' if self.mark and len(set(line[1:])) > 1 else ""
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in line[1:])
        return f"<tr{kind}><th>{html.escape(line[0])}</th>{cells}</tr>"


def read_asset(name: str) -> str:
    """A file of the page, as text."""
    return (files("rllib_distrl.viewer") / "assets" / name).read_text(encoding="utf-8")


def fill(template: str, parts: Mapping[str, str]) -> str:
    """A template with every `{{NAME}}` replaced once; parts may hold such marks themselves."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _policy(script: str, style: str) -> str:
    """A content security policy without connections.

    Figures carry style attributes, so that pages without a script take any inline style.
    """
    scripts = f"'{_hash(script)}'" if script else "'none'"
    styles = f"'{_hash(style)}'" if script else "'unsafe-inline'"
    return (
        f"default-src 'none'; script-src {scripts}; style-src {styles}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
