"""Files and folders that are replaced as a whole: a kill at any moment leaves the old or the new.

What is being written has a hidden name beside its place, `.tmp-NAME`, until it is renamed. At the
end the folders of the user's cache: built once, checked, shared between processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, FileLock, Timeout
from rich.console import Console

TEMPORARY = ".tmp-"
_BLOCK = 1 << 20  # bytes hashed at once
_SAMPLE, _SAMPLES = 1 << 16, 64  # bytes and number of the blocks within a large file
_MODEL_FILES = frozenset(
    {".json", ".safetensors", ".bin", ".pt", ".model", ".txt", ".jinja", ".tiktoken"}
)


@contextmanager
def replaced_file(target: Path) -> Iterator[Path]:
    """Gives a path to write to, whose file then takes the place of `target`, on disk.

    Missing folders are made. After an error `target` is what it was, and nothing else is left.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    # The ending stays what it was: some libraries choose the format by it.
    temporary = target.with_name(f"{TEMPORARY}{os.getpid()}-{target.name}")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replaces a file; text is UTF-8. See `replaced_file`."""
    data = content.encode() if isinstance(content, str) else content
    with replaced_file(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Gives a hidden sibling to write into, which then takes the place of `target`.

    After an error `target` is what it was, and nothing else is left.
    """
    temporary = target.with_name(f"{TEMPORARY}{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if target.exists():
            remove_folder(target)
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Removes a folder so that a half-removed one is never taken for it."""
    doomed = path.with_name(f"{TEMPORARY}removed-{path.name}")
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def remove_temporaries(folder: Path) -> None:
    """Removes what an interrupted write or removal has left in a folder."""
    for path in folder.glob(f"{TEMPORARY}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def model_hash(folder: str | Path) -> str | None:
    """BLAKE2b, 32 hexadecimal digits, of the files of a model's folder, of large ones in samples.

    Of each its name, size, first and last megabyte, and blocks evenly between: weights that were
    trained further or exchanged differ, and gigabytes need a fraction of a second. Notes, and what
    lies in folders below, do not count.

    Returns:
        None where there is no such folder.
    """
    if not Path(folder).is_dir():
        return None
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(Path(folder).iterdir()):
        if file.suffix not in _MODEL_FILES or not file.is_file():
            continue
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_BLOCK))
            for number in range(1, _SAMPLES):
                at = size * number // _SAMPLES
                if at >= _BLOCK:
                    stream.seek(at)
                    digest.update(stream.read(_SAMPLE))
            if size > _BLOCK:
                stream.seek(max(_BLOCK, size - _BLOCK))
                digest.update(stream.read(_BLOCK))
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Returns when a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """`sync` of every file, then of every folder from the leaves up."""
    for root, _, files in os.walk(path, topdown=False):
        for name in files:
            sync(Path(root) / name)
        sync(Path(root))


def content_hash(path: Path) -> str:
    """BLAKE2b, 32 hexadecimal digits, of a file, or of all files in a folder with their names."""
    digest = hashlib.blake2b(digest_size=16)
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        if file != path:
            digest.update(file.relative_to(path).as_posix().encode() + b"\0")
        with file.open("rb") as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()


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
