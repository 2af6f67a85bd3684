"""Checkpoint folders that are either whole or recognisably damaged.

A checkpoint is written into a hidden sibling, listed with sizes and hashes in `manifest.json`,
flushed to disk and renamed into place, so that a kill at any moment leaves the one before intact.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Literal

from rllib_distrl.files import (
    content_hash,
    remove_folder,
    remove_temporaries,
    replaced_folder,
    sync,
    sync_tree,
)

MANIFEST = "manifest.json"
Mode = Literal["max", "min"]
_NAME = re.compile(r"iteration_(\d{6,})")
_TRIES = 8


class TrainingStopped(RuntimeError):
    """Training cannot go on; the last good state is in a checkpoint."""


class DamagedCheckpointError(ValueError):
    """A checkpoint folder whose files are not those that were written."""


def checkpoint_name(iteration: int) -> str:
    """Returns the folder name of a checkpoint, sortable up to a million iterations."""
    return f"iteration_{iteration:06d}"


def checkpoint_iteration(path: Path) -> int:
    """Returns the iteration after which a checkpoint was written.

    Raises:
        ValueError: If the name is not that of a checkpoint.
    """
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path} is not a checkpoint: its name is not iteration_NNNNNN.")
    return int(match[1])


def is_checkpoint_name(name: str) -> bool:
    """Says whether a folder of this name is a checkpoint."""
    return _NAME.fullmatch(name) is not None


def list_checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoints in a folder, newest first, damaged ones included."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if p.is_dir() and is_checkpoint_name(p.name)]
    return sorted(found, key=checkpoint_iteration, reverse=True)


def checkpoint_score(path: Path) -> float | None:
    """Returns the metric that a checkpoint was written with, or None."""
    try:
        return json.loads((path / MANIFEST).read_text(encoding="utf-8")).get("score")
    except (OSError, ValueError, AttributeError):
        return None


def best_iteration(scores: Mapping[int, float | None], mode: Mode) -> int | None:
    """Returns the iteration with the best score, the earliest of equals; None without scores."""
    sign = 1.0 if mode == "max" else -1.0
    known = [(sign * score, -number) for number, score in scores.items() if score is not None]
    return -max(known)[1] if known else None


def kept_iterations(
    scores: Mapping[int, float | None], newest: int, *, keep: int, mode: Mode
) -> set[int]:
    """Returns the iterations whose checkpoints stay: the newest `keep`, and the best.

    Those of later iterations than `newest` go: the run went back behind them because they are
    damaged.

    Args:
        scores: {iteration: score} of the checkpoints that there are.
        newest: The iteration of the checkpoint that has just been written.
        keep: How many of the newest stay.
        mode: Whether the best has the highest or the lowest score.
    """
    past = {number: score for number, score in scores.items() if number <= newest}
    best = best_iteration(past, mode)
    return {*sorted(past, reverse=True)[:keep], *([] if best is None else [best])}


def save_checkpoint(
    folder: Path,
    iteration: int,
    write: Callable[[str], object],
    *,
    keep: int,
    score: float | None = None,
    mode: Mode = "max",
) -> Path:
    """Writes a checkpoint atomically and removes those that `kept_iterations` leaves out.

    Args:
        folder: Where the checkpoints of a run lie.
        iteration: The iteration that has just been completed.
        write: Writes the state below the path that it is given (`Algorithm.save_to_path`).
        keep: How many of the newest checkpoints stay.
        score: The metric after this iteration, if it was measured.
        mode: Whether the best has the highest or the lowest score.

    Returns:
        The checkpoint's folder.
    """
    folder = folder.resolve()  # Ray takes a relative path for a URI
    folder.mkdir(parents=True, exist_ok=True)
    remove_temporaries(folder)
    target = folder / checkpoint_name(iteration)
    with replaced_folder(target) as temporary:
        write(str(temporary))
        _write_manifest(temporary, iteration, score)
        sync_tree(temporary)
    sync(folder)
    kept = kept_iterations(checkpoint_scores(folder), iteration, keep=keep, mode=mode)
    for path in list_checkpoints(folder):
        if checkpoint_iteration(path) not in kept:
            _prune(path)
    return target


def checkpoint_scores(folder: Path) -> dict[int, float | None]:
    """Returns {iteration: score} of the checkpoints in a folder, damaged ones included."""
    return {checkpoint_iteration(p): checkpoint_score(p) for p in list_checkpoints(folder)}


def verify_checkpoint(path: Path) -> None:
    """Compares a checkpoint with its manifest.

    Raises:
        DamagedCheckpointError: Naming the first file that is missing or differs.
    """
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        listed = [(name, entry["size"], entry["blake2b"]) for name, entry in files.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{path}: {MANIFEST} is missing or unreadable.") from error
    for name, size, digest in listed:
        file = path / name
        if not file.is_file():
            raise DamagedCheckpointError(f"{path}: {name} is missing.")
        if file.stat().st_size != size or content_hash(file) != digest:
            raise DamagedCheckpointError(f"{path}: {name} is not what was written.")


def latest_checkpoint(folder: Path, report: Callable[[str], None]) -> Path | None:
    """Returns the newest undamaged checkpoint, or None.

    Args:
        folder: Where the checkpoints of a run lie.
        report: Called with a sentence for each damaged checkpoint that is passed over.
    """
    with ExitStack() as held:
        return hold_latest(folder, report, held)


def hold_latest(folder: Path, report: Callable[[str], None], held: ExitStack) -> Path | None:
    """As `latest_checkpoint`; the run, if it goes on, does not prune it until `held` is closed."""
    for _ in range(_TRIES):
        for path in list_checkpoints(folder):
            with ExitStack() as stack:
                try:
                    hold_checkpoint(path, stack)
                    verify_checkpoint(path)
                except FileNotFoundError:
                    break  # pruned a moment ago: there is a newer one
                except DamagedCheckpointError as error:
                    report(f"Skipping a damaged checkpoint. {error}")
                    continue
                held.push(stack.pop_all())
                return path
        else:
            return None
    raise DamagedCheckpointError(f"{folder}: checkpoints go faster than they can be read.")


def hold_checkpoint(path: Path, held: ExitStack) -> None:
    """Keeps a checkpoint from being pruned by the run until `held` is closed.

    Raises:
        FileNotFoundError: If it is gone.
    """
    descriptor = os.open(path, os.O_RDONLY)
    held.callback(os.close, descriptor)
    with suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    if os.fstat(descriptor).st_ino != path.stat().st_ino:
        raise FileNotFoundError(path)


def _write_manifest(path: Path, iteration: int, score: float | None) -> None:
    files: dict[str, Any] = {
        file.relative_to(path).as_posix(): {
            "size": file.stat().st_size,
            "blake2b": content_hash(file),
        }
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }
    text = json.dumps({"iteration": iteration, "score": score, "files": files}, indent=1)
    (path / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _prune(path: Path) -> None:
    """Removes a checkpoint, unless `hold_checkpoint` keeps it: it goes with a later one then."""
    with ExitStack() as stack:
        descriptor = os.open(path, os.O_RDONLY)
        stack.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        except OSError:  # a file system without locks
            pass
        remove_folder(path)
