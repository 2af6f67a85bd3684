"""Files and folders that a recipe names: found beside the recipe, and written down absolute.

So a run goes on from any folder, and the name of a local model never becomes an id on the hub.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distrl_envs.data_files import HUB_PREFIX
from rllib_distrl.files import content_hash

_FILES = (".jsonl", ".csv", ".parquet")
# Settings whose value may be a path, in any table.
_PATHS = ("data", "model", "tokenizer", "samples", "critic_checkpoint")
# Those whose content decides what is learned, beside the model.
_CONTENT = ("data", "samples")


def locate(tables: dict[str, Any], folder: Path, leave: frozenset[str] = frozenset()) -> None:
    """Makes the paths of a recipe absolute, in place.

    A relative path is looked for beside the recipe, then in the working directory. What is in
    neither stays as it is: it may be an id on the hub.

    Args:
        tables: Of the recipe.
        folder: That the recipe lies in.
        leave: Dotted names of settings that are left alone.

    Raises:
        ValueError: If both folders hold the name, and not the same thing under it.
    """
    for table, key, dotted in _paths(tables, ""):
        if dotted not in leave:
            table[key] = _located(dotted, table[key], folder)


def content_hashes(tables: Mapping[str, Any]) -> dict[str, str]:
    """Hashes of the data that a recipe learns from, by "table.key" of the setting.

    Data on the hub have none: the hub's address says what they are.
    """
    found = {}
    for table, key, dotted in _paths(tables, ""):
        place = _split_hub(table[key])[1]
        decides = any(name in _CONTENT for name in dotted.split("."))
        if decides and Path(place).is_absolute() and Path(place).exists():
            found[dotted] = content_hash(Path(place))
    return found


def _paths(node: Any, prefix: str, within: bool = False) -> Iterator[tuple[Any, str, str]]:
    """Tables that hold a path, its key, and its dotted name; `data` may be a table of paths."""
    for key, value in node.items():
        dotted, meant = f"{prefix}{key}", within or key in _PATHS
        if isinstance(value, Mapping):
            yield from _paths(value, f"{dotted}.", key == "data")
        elif isinstance(value, str) and (meant or value.endswith(_FILES)):
            yield node, key, dotted


def _located(dotted: str, text: str, folder: Path) -> str:
    prefix, place, split = _split_hub(text)
    path = Path(place).expanduser()
    if not place or path.is_absolute():
        return f"{prefix}{path}{split}" if place else text
    beside, here = folder.absolute() / path, Path.cwd() / path
    found = [candidate for candidate in (beside, here) if candidate.exists()]
    if len(found) == 2 and not beside.samefile(here):
        raise ValueError(
            f"{dotted} = {text!r} is both {beside} (beside the recipe) and {here} (in the working "
            "directory). Write the one that is meant as an absolute path."
        )
    return f"{prefix}{_normal(found[0])}{split}" if found else text


def _split_hub(text: str) -> tuple[str, str, str]:
    """`hf:./folder/split` in its three parts; other data on the hub has no place here."""
    if not text.startswith(HUB_PREFIX):
        return "", text, ""
    address = text.removeprefix(HUB_PREFIX)
    if not address.startswith(("/", "./", "../", "~")):
        return text, "", ""
    place, _, split = address.rpartition("/")
    return HUB_PREFIX, place, f"/{split}"


def _normal(path: Path) -> Path:
    """Without `.` and `..`; links stay, for a link may be meant to move."""
    return Path(*path.parts) if ".." not in path.parts else path.parent.resolve() / path.name
