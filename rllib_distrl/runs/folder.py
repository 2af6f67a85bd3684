"""The run folder: everything that one training run leaves on disk.

recipe.toml        the resolved recipe
meta.json          what ran: versions, commit, commands, seed
progress.jsonl     one line per iteration
tensorboard/       the same numbers for TensorBoard
checkpoints/       iteration_000100/ …: RLlib's `save_to_path`, atomic
model/             the trained policy as a plain Hugging Face folder
samples/           before.parquet, after.parquet: every graded completion of the evaluations;
                   tokens.parquet: completions with what the critic thought at every token
eval.json          avg@n and pass@k before and after training; eval.damaged.json, if it was damaged
scale.json         the newest request of `distrl scale`, and its answer
error.txt          the traceback, if the run failed
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rllib_distrl.files import write_atomic
from rllib_distrl.recipe import Recipe, content_hashes, load_recipe
from rllib_distrl.runs.log import commit, session, versions

_FORMAT = "distrl-run-1"
_MAY_GROW = ("run.iterations", "run.budget_tokens")
# The way past a prompt that is too long, for runs that began before all prompts were measured.
_MAY_CHANGE = ("environment.env_config.on_long_prompt",)


@dataclass(frozen=True)
class RunFolder:
    """Paths and small files of one run."""

    path: Path

    @property
    def recipe_file(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.toml"

    @property
    def meta_file(self) -> Path:
        """Versions, commit, commands, seed; also what marks a folder as a run."""
        return self.path / "meta.json"

    @property
    def progress_file(self) -> Path:
        """One JSON line per iteration."""
        return self.path / "progress.jsonl"

    @property
    def has_progress(self) -> bool:
        """Whether an iteration is recorded."""
        return self.progress_file.is_file() and self.progress_file.stat().st_size > 0

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """The checkpoints, see `rllib_distrl.runs.checkpoints`."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """The trained policy as a plain Hugging Face folder."""
        return self.path / "model"

    @property
    def samples(self) -> Path:
        """Parquet files of graded completions."""
        return self.path / "samples"

    @property
    def tokens_file(self) -> Path:
        """Completions with what the critic thought at every token."""
        return self.samples / "tokens.parquet"

    @property
    def eval_file(self) -> Path:
        """avg@n and pass@k before and after training."""
        return self.path / "eval.json"

    @property
    def scale_file(self) -> Path:
        """The newest request of `distrl scale`, see `rllib_distrl.cli.scale`."""
        return self.path / "scale.json"

    @property
    def error_file(self) -> Path:
        """The traceback of a run that failed."""
        return self.path / "error.txt"

    def recipe(self) -> Recipe:
        """Returns the recipe that this run was made with."""
        return load_recipe(self.recipe_file)

    def started(self) -> str:
        """Returns when the run first started, ISO 8601 in UTC."""
        meta = json.loads(self.meta_file.read_text(encoding="utf-8"))
        return meta["sessions"][0]["started"]

    def read_eval(self) -> dict[str, Any]:
        """Returns `eval.json`, or {} before the first evaluation.

        Raises:
            ValueError: If the file is damaged.
        """
        if not self.eval_file.is_file():
            return {}
        try:
            found = json.loads(self.eval_file.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ValueError(
                f"{self.eval_file} is damaged: it is no JSON object. Delete it; "
                f"`distrl train {self.path} --resume` measures again."
            )
        return found

    def set_damaged_eval_aside(self) -> str:
        """Renames an `eval.json` that cannot be read, so that it is measured again.

        Returns:
            What was done, for the console; "" if nothing.
        """
        try:
            self.read_eval()
        except ValueError:
            aside = self.eval_file.with_name("eval.damaged.json")
            os.replace(self.eval_file, aside)
            return f"{self.eval_file} is damaged; it is {aside.name} now. Measuring again."
        return ""

    def write_eval(self, results: dict[str, Any]) -> None:
        """Replaces `eval.json`."""
        write_atomic(self.eval_file, json.dumps(results, indent=2) + "\n")


def is_run_folder(path: Path) -> bool:
    """Says whether a folder was made by `distrl train`.

    Raises:
        ValueError: If it was, and its `meta.json` cannot be read.
    """
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
    except OSError:
        return False
    except ValueError as error:
        if not RunFolder(path).recipe_file.is_file():
            return False
        raise ValueError(
            f"{path / 'meta.json'} is damaged ({error}). Put it back from a copy of the run, or "
            "name another folder with --out."
        ) from None
    return isinstance(meta, dict) and meta.get("format") == _FORMAT


def open_run(path: Path) -> RunFolder:
    """Opens an existing run folder.

    Raises:
        ValueError: If there is no run at `path`.
    """
    if not is_run_folder(path):
        raise ValueError(f"{path} is not a run folder: it has no meta.json of `distrl train`.")
    return RunFolder(path)


def create_run(
    path: Path, recipe: Recipe, command: Sequence[str], *, overwrite: bool = False
) -> RunFolder:
    """Makes a new run folder.

    Args:
        path: Where; missing parents are made.
        recipe: Written as `recipe.toml`.
        command: The command line, for `meta.json`.
        overwrite: Delete the run that is there. Only the files of a run are deleted.

    Raises:
        ValueError: If a run is there and may not be deleted, or if the folder holds other things.
    """
    check_free(path, overwrite=overwrite)
    run = RunFolder(path)
    if is_run_folder(path):
        _delete_run(run)
    path.mkdir(parents=True, exist_ok=True)
    write_atomic(run.recipe_file, recipe.to_toml())
    meta = {
        "format": _FORMAT,
        "seed": recipe.run.seed,
        "commit": commit(),
        "versions": versions(),
        "machine": {"system": platform.platform(), "python": platform.python_version()},
        "data": content_hashes(recipe.to_dict()),
        "sessions": [session(command)],
    }
    write_atomic(run.meta_file, json.dumps(meta, indent=2) + "\n")
    return run


def check_free(path: Path, *, overwrite: bool = False) -> None:
    """Checks that a new run may be put at `path`.

    Raises:
        ValueError: See `create_run`.
    """
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ValueError(f"--out {path} is not a folder. Name another place.")
    if is_run_folder(path):
        if not overwrite:
            raise ValueError(
                f"{path} already holds a run. Continue it with --resume, replace it with "
                "--overwrite, or name another folder with --out."
            )
    elif path.is_dir() and any(path.iterdir()):
        raise ValueError(
            f"{path} holds files that are not a run; they are left alone. Name another folder "
            "with --out."
        )


def resume_run(path: Path, recipe: Recipe, command: Sequence[str]) -> RunFolder:
    """Opens a run to continue it, and notes that in `meta.json`.

    Args:
        path: The run folder.
        recipe: What to continue with; its iterations or tokens may be more than before.
        command: The command line, for `meta.json`.

    Raises:
        ValueError: If there is no run, or if the recipe differs (the message shows where).
    """
    run = open_run(path)
    hashes = check_same_recipe(run, recipe)
    meta = json.loads(run.meta_file.read_text(encoding="utf-8"))
    meta["data"] = hashes
    run.scale_file.unlink(missing_ok=True)  # asked of a process that has ended
    write_atomic(run.recipe_file, recipe.to_toml())
    meta["sessions"].append(session(command))
    write_atomic(run.meta_file, json.dumps(meta, indent=2) + "\n")
    return run


def check_same_recipe(run: RunFolder, new: Recipe) -> dict[str, str]:
    """Checks that a run may be continued with `new`.

    Returns:
        The present hashes of `new`'s data and models.

    Raises:
        ValueError: If anything but raised iterations, a raised budget of tokens or the place of the
            same data or model differs, or if these have changed.
    """
    meta = json.loads(run.meta_file.read_text(encoding="utf-8"))
    began, now = meta.get("data", {}), content_hashes(new.to_dict())
    before, after = _dotted(run.recipe().to_dict()), _dotted(new.to_dict())
    missing = "(not set)"
    grown = {key for key in _MAY_GROW if before.get(key) and after.get(key)}
    differ = {
        key
        for key in before.keys() | after.keys()
        if key not in (*grown, *_MAY_CHANGE) and before.get(key, missing) != after.get(key, missing)
    }
    differ -= {key for key, digest in began.items() if now.get(key) == digest}
    lines = [
        f"  {key}: {before.get(key, missing)!r} in the run, {after.get(key, missing)!r} now"
        for key in sorted(differ)
    ]
    if lines:
        raise ValueError(
            "The recipe differs from the one that this run was made with:\n"
            + "\n".join(lines)
            + "\nResume with the same settings, or start another run with --out."
        )
    for key in sorted(grown):
        if after[key] < before[key]:
            raise ValueError(
                f"{key} can only be raised on resume: {before[key]} in the run, {after[key]} now."
            )
    _check_same_files(began, now, after)
    return now


def _check_same_files(
    began: Mapping[str, str], now: Mapping[str, str], places: Mapping[str, Any]
) -> None:
    """Refuses data and models that have changed or are gone; earlier versions noted fewer."""
    for key, digest in began.items():
        if now.get(key) != digest:
            what = "have changed since the run began" if key in now else "are gone"
            raise ValueError(
                f"{key}: the files of {places.get(key)} {what}, so the run cannot go on as it was. "
                f"Put them back as they were, say where they are now with {key}=PLACE, or start "
                "another run with --out."
            )


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a folder for this process; makes it if it is missing.

    Raises:
        ValueError: If another process holds it.
    """
    path.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ValueError(f"Another process is training in {path}. Wait, or use --out.") from None
    finally:
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Says whether another process holds a folder, that is, trains in it."""
    try:
        with locked(path):
            return False
    except ValueError:
        return True


def _delete_run(run: RunFolder) -> None:
    """Deletes the parts of a run, the marker last; files that are not ours stay."""
    for folder in (run.checkpoints, run.tensorboard, run.model, run.samples):
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder)
    files = (run.scale_file, run.error_file, run.progress_file, run.eval_file, run.recipe_file)
    for file in (*files, run.meta_file):
        file.unlink(missing_ok=True)


def discard_run(run: RunFolder) -> None:
    """Deletes a run in which nothing has happened yet, and its folder if nothing else is there."""
    _delete_run(run)
    with contextlib.suppress(OSError):
        run.path.rmdir()


def _dotted(tree: Any, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _dotted(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
