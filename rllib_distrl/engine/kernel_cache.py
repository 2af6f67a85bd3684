"""Functions that Numba compiles once per machine and keeps under our own cache directory.

No compiler has to be installed: Numba brings LLVM.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from filelock import FileLock
from numba import njit
from numba.core import config

from rllib_distrl.files import KEY_DIGITS, ROOT_VARIABLE, cache_root, say


def compile_once(
    signatures: Mapping[Callable[..., Any], str],
    options: Mapping[str, Any],
    sources: Sequence[Path],
) -> SimpleNamespace:
    """Compiles functions, or loads what was compiled before.

    One process compiles while others wait: Numba's cache is not made for several writers.

    Args:
        signatures: Numba signature of each function.
        options: Of `numba.njit`.
        sources: Every file that the functions are made of; Numba itself looks at one only.

    Returns:
        The compiled functions under their names.

    Raises:
        ValueError: If the cache directory cannot be written to.
    """
    content = b"".join(file.read_bytes() for file in sources)
    key = hashlib.sha256(content).hexdigest()[:KEY_DIGITS]
    folder = cache_root() / f"kernels-{key}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            return _compiled(signatures, {**options, "cache": True}, folder)
    except OSError as error:
        raise ValueError(
            f"The rollout engine's compiled kernels are kept under {folder}, which cannot be "
            f"written to: {error}. Set {ROOT_VARIABLE} to a directory of yours."
        ) from None


def _compiled(
    signatures: Mapping[Callable[..., Any], str], options: Mapping[str, Any], folder: Path
) -> SimpleNamespace:
    if not any(folder.rglob("*.nbi")):
        say("Compiling the rollout engine's kernels for this machine, once.")
    # The folder is looked up when a function is wrapped; other users of Numba keep theirs.
    before = getattr(config, "CACHE_DIR")  # noqa: B009
    setattr(config, "CACHE_DIR", str(folder))  # noqa: B010
    try:
        return SimpleNamespace(
            **{
                function.__name__: njit(signature, **options)(function)
                for function, signature in signatures.items()
            }
        )
    finally:
        setattr(config, "CACHE_DIR", before)  # noqa: B010
