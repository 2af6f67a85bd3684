"""`distrl new`: a recipe to start from, also where only the wheel is installed."""

from __future__ import annotations

from pathlib import Path

from rllib_distrl.recipe_schema import nearest

_PACKAGE = Path(__file__).parents[1]


def run_new(name: str, out: Path | None) -> Path:
    """Writes a recipe.

    Args:
        name: Of one that comes with the package, `distrl` or `grpo` for instance.
        out: The file; NAME.toml here if not given.

    Returns:
        The file.

    Raises:
        ValueError: If there is no such recipe, or the file exists.
    """
    # A wheel brings them beside the package; a source tree has them in `configs/`.
    packed, source = _PACKAGE / "recipes", _PACKAGE.parent / "configs" / "countdown"
    known = {p.stem: p for p in (packed if packed.is_dir() else source).glob("*.toml")}
    if name not in known:
        raise ValueError(
            f"There is no recipe {name!r}. The nearest one is {nearest(name, known)!r}; there are "
            f"{', '.join(sorted(known))}."
        )
    target = out or Path(f"{name}.toml")
    try:
        with target.open("x", encoding="utf-8") as stream:
            stream.write(known[name].read_text(encoding="utf-8"))
    except FileExistsError:
        raise ValueError(f"{target} exists and is left alone. Name another file.") from None
    return target
