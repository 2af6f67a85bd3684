"""A folder under the user's cache directory: built once, checked, shared between processes."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, FileLock, Timeout
from rich.console import Console

from rllib_distrl.files import replaced_folder

ROOT_VARIABLE = "DISTRL_CACHE"
META = "meta.json"
LAYOUT = 1
"""Version of the folder's own layout: part of every key."""

KEY_DIGITS = 16


def cache_root() -> Path:
    """`$DISTRL_CACHE`, else `$XDG_CACHE_HOME`, else `~/.cache`; in it the folder rllib_distrl."""
    chosen = os.environ.get(ROOT_VARIABLE) or os.environ.get("XDG_CACHE_HOME")
    return Path(chosen or "~/.cache").expanduser() / "rllib_distrl"


def content_key(content: Mapping[str, Any]) -> str:
    """A short hash of everything that determines a folder (JSON types only)."""
    text = json.dumps({"layout": LAYOUT, **content}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_DIGITS]


def say(line: str) -> None:
    """One line for a person, to stderr."""
    Console(file=sys.stderr, highlight=False).print(line, soft_wrap=True)


class CachedFolder:
    """One folder of the cache.

    Args:
        name: Of the folder; holds the key of what determines its content.
        title: What people call it.
        root: Cache directory; by default `cache_root()`.
    """

    def __init__(self, name: str, title: str, root: Path | None = None) -> None:
        self.root = cache_root() if root is None else root
        self.path = self.root / name
        self.title = title
        self._lock = FileLock(self.root / f".{name}.lock")

    def get(self, build: Callable[[Path], Mapping[str, Any]]) -> Path:
        """The intact folder, built if it is missing or damaged.

        Args:
            build: Writes files into the empty folder it is given; returns what to record in
                meta.json.

        Raises:
            ValueError: If the cache directory cannot be written to.
        """
        if self.damage() is None:
            return self.path
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with self._locked():
                self._build_if_needed(build)
        except OSError as error:
            raise ValueError(
                f"{self.title} is kept under {self.root}, which cannot be written to: {error}. "
                f"Set {ROOT_VARIABLE} to a directory of yours."
            ) from None
        return self.path

    def damage(self) -> str | None:
        """What is wrong with the folder, "missing" if it is not there, None if it is intact."""
        if not self.path.is_dir():
            return "missing"
        try:
            files = json.loads((self.path / META).read_text())["files"]
            recorded = {str(name): str(checksum) for name, checksum in files.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return f"{META} cannot be read"
        for name, checksum in recorded.items():
            file = self.path / name
            if not file.is_file():
                return f"{name} is missing"
            if _sha256(file) != checksum:
                return f"{name} was changed"
        return None

    def _locked(self) -> AcquireReturnProxy:
        """The lock, acquired; tells who has to wait."""
        try:
            return self._lock.acquire(timeout=0)
        except Timeout:
            say(f"Waiting for another process that builds {self.title}.")
            return self._lock.acquire()

    def _build_if_needed(self, build: Callable[[Path], Mapping[str, Any]]) -> None:
        damage = self.damage()  # again: another process may have built it while we waited
        if damage is None:
            return
        if damage != "missing":
            say(f"The cached {self.title} is damaged ({damage}): building it again.")
        with replaced_folder(self.path) as building:
            meta = dict(build(building))
            files = {file.name: _sha256(file) for file in sorted(building.iterdir())}
            text = json.dumps({**meta, "files": files}, indent=2)
            (building / META).write_text(text + "\n")


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
