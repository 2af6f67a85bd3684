"""What is checked when a checkpoint is restored. RLlib (Ray 2.60) checks nothing of it."""

import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.fs

from rllib_distrl.files import model_hash
from rllib_distrl.method.critic import head_identity
from rllib_distrl.method.registry import LEARNED_STATS, resolve
from rllib_distrl.model.lora import DEFAULTS as LORA_DEFAULTS
from rllib_distrl.settings import DistanceSettings, EnsembleSettings

UNCERTAINTIES = {"ensemble": EnsembleSettings, "distance": DistanceSettings}
SETTINGS = "module_settings"
WEIGHTS = "policy_weights"
# Beside the model's name in a checkpoint: which files it had, wherever they lie.
_MODEL_FILES = "model_files"
# What unpickling raises, and looking into a state that is built in another way.
_UNREADABLE = (
    AttributeError, EOFError, ImportError, IndexError, KeyError, TypeError, pickle.UnpicklingError
)  # fmt: skip
# What decides which tensors there are and what they mean; anything else may be changed.
_SHAPING = (
    "model", "critic", "critic_observation", "critic_freeze", "head", "n_quantiles",
    "head_center", "lora", "ensemble", "distance",
)  # fmt: skip


def module_settings(config: Any) -> dict[str, Any]:
    """The settings of ``config`` that a checkpoint must agree with."""
    found = {name: config.model_config.get(name) for name in _SHAPING}
    found[_MODEL_FILES] = model_hash(str(found["model"]))
    if found["head"] is not None:
        found["head"] = head_identity(config.model_config)["head"]
    if lora := found["lora"]:
        lora = {**LORA_DEFAULTS, **lora}
        if not isinstance(lora["targets"], str):
            lora["targets"] = sorted(lora["targets"])
    found["lora"] = lora or None
    statistic = resolve("bonus_statistic", config.bonus_stat).name
    for name in LEARNED_STATS:
        if statistic != name:  # A checkpoint without its state leaves it to start afresh.
            del found[name]
        else:
            found[name] = UNCERTAINTIES[name](**getattr(config, name)).to_dict()
    return found


def saved_settings(path: Any, filesystem: Any, state_file: str) -> dict[str, Any]:
    """The `module_settings` in a checkpoint; empty where it was written without them.

    Args:
        path: of an algorithm's checkpoint; of `place_of`.
        filesystem: pyarrow's, for a ``path`` on it; None: found from the path.
        state_file: name of the file with the algorithm's own state, without its ending.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: as `reading`.
    """
    with reading(path):
        if filesystem is None:
            filesystem, path = pyarrow.fs.FileSystem.from_uri(path)
        file = (Path(path) / state_file).with_suffix(".pkl").as_posix()
        with filesystem.open_input_stream(file) as stream:
            return dict(pickle.loads(stream.read()).get(SETTINGS, {}))


def place_of(path: Any, filesystem: Any) -> str:
    """Where a checkpoint is, as pyarrow takes it: a URI, or a folder from the root."""
    text = os.fspath(path)
    return text if filesystem is not None or "://" in text else str(Path(text).absolute())


@contextmanager
def reading(path: Any) -> Iterator[None]:
    """Says that a checkpoint cannot be read: what another version has written has other names.

    Raises:
        ValueError: with what to do.
    """
    try:
        yield
    except _UNREADABLE as error:
        raise ValueError(
            f"The checkpoint {path} cannot be read ({type(error).__name__}: {error}). It is "
            "damaged, or was written by a version that this one does not understand: take another "
            "checkpoint, or the version that wrote it (meta.json of a run names it). Its exported "
            "model can be trained on with any."
        ) from error


def check_settings(config: Any, saved: Mapping[str, Any], what: str) -> None:
    """Refuses the state of another model or critic before anything is loaded from it.

    Args:
        config: of the algorithm that is to be restored.
        saved: the `module_settings` that it was made with.
        what: how the message calls it.

    Raises:
        ValueError: with every setting that differs.
    """
    present = module_settings(config)
    if saved.get(_MODEL_FILES) and saved[_MODEL_FILES] == present[_MODEL_FILES]:
        saved = {**saved, "model": present["model"]}  # The folder was moved, or copied.
    lines = [
        f"  {name}: {saved[name]!r} in the checkpoint, {present[name]!r} now"
        for name in _SHAPING
        if name in saved and name in present and not _same(saved[name], present[name])
    ]
    if lines:
        raise ValueError(
            f"{what} is of another configuration:\n"
            + "\n".join(lines)
            + "\nRestore it with the settings that it was made with."
        )


def _same(saved: Any, present: Any) -> bool:
    """Whether two settings agree; a folder may be named from here or from the root."""
    if saved == present:
        return True
    if not (isinstance(saved, str) and isinstance(present, str)):
        return False
    there = Path(saved).exists() and Path(present).exists()
    return there and Path(saved).samefile(present)


def check_restored(path: Any, saved: tuple[int, str] | None, present: tuple[int, str]) -> None:
    """Refuses to go on with other weights than the checkpoint's.

    RLlib passes over a component whose folder is missing, and over a learner that fails to load.

    Args:
        path: of the checkpoint.
        saved: version and content hash of the policy when it was written; None: not known.
        present: those of the learner now.

    Raises:
        RuntimeError: when they differ.
    """
    if saved is not None and saved != present:
        raise RuntimeError(
            f"The learners did not take over the checkpoint {path}: it was written with version "
            f"{saved[0]} of the weights (hash {saved[1][:12]}), and they have version "
            f"{present[0]} (hash {present[1][:12]}). Is the checkpoint complete, and can every "
            "learner read it?"
        )
