"""Files and folders that are replaced as a whole: a kill at any moment leaves the old or the new.

What is being written has a hidden name beside its place, `.tmp-NAME`, until it is renamed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
