"""What `meta.json` says about the software that made a run."""

from __future__ import annotations

import datetime
import importlib.metadata
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_PACKAGES = ("rllib-distrl", "ray", "torch", "transformers", "gymnasium", "numpy")


def session(command: Sequence[str]) -> dict[str, Any]:
    """Says when and by which command line a session of a run started."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"started": now, "command": list(command)}


def versions() -> dict[str, str]:
    """Returns the installed versions of what decides a run's numbers."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit() -> str | None:
    """Returns the commit of the source tree, "+changes" where it is edited; None outside of git."""
    folder = Path(__file__).parent
    if not (folder.parent / ".git").exists():
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+changes" if commit and changed else commit


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
