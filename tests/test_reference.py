"""The reference has every module of ours but those of the command line."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rllib_distrl"
# Not for import: the `distrl` command, and former names.
LEFT_OUT = {"__init__", "cli", "moved"}


def test_every_module_stands_in_the_reference_and_every_page_in_the_navigation():
    pages = {path.name: path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md")}
    named = set(re.findall(r"^::: rllib_distrl\.(\w+)$", "\n".join(pages.values()), re.MULTILINE))
    modules = {path.stem for path in PACKAGE.glob("*.py")}
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert named == (modules | rooms) - LEFT_OUT
    navigation = (ROOT / "mkdocs.yml").read_text()
    for name in pages.keys() - {"index.md"}:
        assert f"reference/{name}" in navigation
        assert f"({name})" in pages["index.md"]
