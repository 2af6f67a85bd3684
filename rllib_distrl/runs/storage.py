"""A run's copy on another file system: what any machine needs to go on with it.

The run folder stays on the local disk; its small files and its checkpoints are copied below a
URI. A checkpoint's `manifest.json` is written last and removed first, so that a checkpoint there
is whole, or is none. Every other file is replaced by a rename.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import fs

from rllib_distrl.files import TEMPORARY, replaced_folder
from rllib_distrl.recipe import Recipe
from rllib_distrl.runs.checkpoints import (
    MANIFEST,
    DamagedCheckpointError,
    Mode,
    best_iteration,
    checkpoint_iteration,
    checkpoint_name,
    is_checkpoint_name,
    kept_iterations,
    list_checkpoints,
    verify_checkpoint,
)
from rllib_distrl.runs.folder import RunFolder

_LOCAL = fs.LocalFileSystem()


class RunStorage:
    """The place of one run on a file system of pyarrow's or fsspec's."""

    def __init__(self, storage: str, name: str) -> None:
        """Opens the file system.

        Args:
            storage: URI or absolute path of the folder that holds the copies of runs.
            name: Of the run's folder in there.

        Raises:
            ValueError: If nothing can be opened there.
        """
        self.uri = f"{storage.rstrip('/')}/{name}"
        try:
            self._fs, root = _open(storage)
        except (pyarrow.ArrowInvalid, OSError, ValueError, ImportError) as error:
            raise ValueError(
                f"run.storage: {storage!r} cannot be opened: {error}. Give an absolute path or a "
                "URI such as file:///mnt/disk, s3://bucket/folder or one that fsspec knows."
            ) from None
        self._root = f"{root.rstrip('/')}/{name}"
        self._sent: dict[str, tuple[int, int]] = {}

    def holds_run(self) -> bool:
        """Says whether a run has been copied here."""
        return self._is_file(f"{self._root}/meta.json")

    def check_free(self) -> None:
        """Raises ValueError if a run has been copied here."""
        if self.holds_run():
            raise ValueError(
                f"{self.uri} already holds a run. Continue it with --resume, replace it with "
                "--overwrite, or name another folder with --out."
            )

    def check_not_ahead(self, run: RunFolder) -> None:
        """Checks that nobody has trained on with the copy.

        Raises:
            ValueError: If it has a later checkpoint than the run folder.
        """
        there = max(self._scores(), default=0)
        here = max(map(checkpoint_iteration, list_checkpoints(run.checkpoints)), default=0)
        if there > here:
            raise ValueError(
                f"{self.uri} is at iteration {there} and {run.path} at {here}: the run has been "
                "continued elsewhere. Move the folder away to continue from the copy."
            )

    def delete(self) -> None:
        """Deletes the copy, if there is one, the mark of a run first."""
        if self.holds_run():
            self._fs.delete_file(f"{self._root}/meta.json")
            self._fs.delete_dir(self._root)

    def upload(self, run: RunFolder, *, keep: int, mode: Mode) -> None:
        """Brings the copy up to date with the run folder.

        Args:
            run: What to copy.
            keep: How many of the newest checkpoints stay there, besides the best.
            mode: Whether the best has the highest or the lowest score.

        Raises:
            OSError: If the file system fails.
        """
        for file in _small_files(run):
            self._send(file, f"{self._root}/{file.relative_to(run.path).as_posix()}")
        checkpoints = list_checkpoints(run.checkpoints)
        for path in reversed(checkpoints):
            if self._manifest(path.name) != (path / MANIFEST).read_bytes():
                self._upload_checkpoint(path)
        if checkpoints:
            self._remove_old(checkpoint_iteration(checkpoints[0]), keep=keep, mode=mode)

    def download(self, target: Path, *, mode: Mode, report: Callable[[str], None]) -> None:
        """Makes the run folder anew: small files, the newest good checkpoint and the best.

        Args:
            target: The run folder; must not exist, or be empty.
            mode: Whether the best has the highest or the lowest score.
            report: Called with a sentence for each checkpoint that is passed over.
        """
        with replaced_folder(target) as folder:
            for entry in self._list(self._root):
                if not entry.base_name.startswith(("checkpoints", TEMPORARY)):
                    self._fetch(entry.path, folder / entry.base_name)
            scores, checkpoints = self._scores(), folder / "checkpoints"
            best = best_iteration(scores, mode)
            for number in sorted(scores, reverse=True):
                if self._download_checkpoint(number, checkpoints, report):
                    break
            if best is not None and not (checkpoints / checkpoint_name(best)).exists():
                self._download_checkpoint(best, checkpoints, report)

    def _upload_checkpoint(self, path: Path) -> None:
        target = f"{self._root}/checkpoints/{path.name}"
        self._remove_checkpoint(target)  # the rest of an interrupted upload
        for entry in path.iterdir():
            if entry.name != MANIFEST:
                self._copy(entry, f"{target}/{entry.name}")
        self._copy(path / MANIFEST, f"{target}/{TEMPORARY}{MANIFEST}")
        self._fs.move(f"{target}/{TEMPORARY}{MANIFEST}", f"{target}/{MANIFEST}")

    def _download_checkpoint(
        self, number: int, folder: Path, report: Callable[[str], None]
    ) -> bool:
        name = checkpoint_name(number)
        self._fetch(f"{self._root}/checkpoints/{name}", folder / name)
        try:
            verify_checkpoint(folder / name)
        except DamagedCheckpointError as error:
            report(f"Skipping a damaged checkpoint of {self.uri}. {error}")
            shutil.rmtree(folder / name)
            return False
        return True

    def _remove_old(self, newest: int, *, keep: int, mode: Mode) -> None:
        kept = kept_iterations(self._scores(), newest, keep=keep, mode=mode)
        for name in self._folders(f"{self._root}/checkpoints"):
            if not is_checkpoint_name(name) or checkpoint_iteration(Path(name)) not in kept:
                self._remove_checkpoint(f"{self._root}/checkpoints/{name}")

    def _remove_checkpoint(self, path: str) -> None:
        if self._is_file(f"{path}/{MANIFEST}"):
            self._fs.delete_file(f"{path}/{MANIFEST}")
        if self._fs.get_file_info(path).type == fs.FileType.Directory:
            self._fs.delete_dir(path)

    def _scores(self) -> dict[int, float | None]:
        """{iteration: score} of the checkpoints that are whole."""
        names = filter(is_checkpoint_name, self._folders(f"{self._root}/checkpoints"))
        manifests = {checkpoint_iteration(Path(name)): self._manifest(name) for name in names}
        return {n: json.loads(text)["score"] for n, text in manifests.items() if text is not None}

    def _manifest(self, name: str) -> bytes | None:
        """What marks a checkpoint of the copy as whole; None if it is not."""
        path = f"{self._root}/checkpoints/{name}/{MANIFEST}"
        if not self._is_file(path):
            return None
        with self._fs.open_input_stream(path) as stream:
            return stream.read()

    def _send(self, file: Path, target: str) -> None:
        """Replaces a file of the copy, unless this process has sent this very one before."""
        status = file.stat()
        version = (status.st_size, status.st_mtime_ns)
        if self._sent.get(target) == version:
            return
        parent, _, name = target.rpartition("/")
        temporary = f"{parent}/{TEMPORARY}{name}"
        self._copy(file, temporary)
        self._fs.move(temporary, target)
        self._sent[target] = version

    def _copy(self, source: Path, target: str) -> None:
        """Copies a file or a folder there."""
        # Not all of the folders that it needs are made by `copy_files` (pyarrow 25).
        folder = target if source.is_dir() else target.rpartition("/")[0]
        self._fs.create_dir(folder, recursive=True)
        fs.copy_files(str(source), target, _LOCAL, self._fs)

    def _fetch(self, source: str, target: Path) -> None:
        """Copies a file or a folder from there."""
        (target.parent if self._is_file(source) else target).mkdir(parents=True, exist_ok=True)
        fs.copy_files(source, str(target), self._fs, _LOCAL)

    def _is_file(self, path: str) -> bool:
        return self._fs.get_file_info(path).type == fs.FileType.File

    def _folders(self, path: str) -> list[str]:
        return [i.base_name for i in self._list(path) if i.type == fs.FileType.Directory]

    def _list(self, path: str) -> list[Any]:
        return self._fs.get_file_info(fs.FileSelector(path, allow_not_found=True))


def storage_of(recipe: Recipe, path: Path) -> RunStorage | None:
    """The place that the recipe names for a copy of the run at `path`.

    Raises:
        ValueError: If it cannot be opened.
    """
    storage = recipe.run.storage
    return RunStorage(storage, path.resolve().name) if storage else None


def _open(storage: str) -> tuple[Any, str]:
    """Gives pyarrow's own file system for a URI, or fsspec's."""
    try:
        return fs.FileSystem.from_uri(storage)
    except pyarrow.ArrowInvalid as error:
        if "://" not in storage or storage.startswith("file:"):
            raise
        try:
            import fsspec

            found, path = fsspec.core.url_to_fs(storage)
        except (ImportError, ValueError) as other:
            raise ValueError(f"{error} {other}") from None
        return fs.PyFileSystem(fs.FSSpecHandler(found)), path


def _small_files(run: RunFolder) -> Iterator[Path]:
    """Everything of a run but checkpoints and model, what marks it as a run last."""
    files = (run.progress_file, run.eval_file, run.error_file, run.recipe_file)
    yield from (file for file in files if file.is_file())
    for folder in (run.tensorboard, run.samples):
        visible = (p for p in folder.rglob("*") if p.is_file())
        yield from sorted(p for p in visible if not p.relative_to(folder).parts[0].startswith("."))
    yield run.meta_file
