"""The pages and pictures of a comparison, from its records alone."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.image import imread

from rllib_distrl.experiments.pages import About, read_about, write_outputs
from rllib_distrl.experiments.results import read_record
from tests.experiments.made_records import failed, records

NAMES = ("a", "b", "c")
ABOUT = About("A <title>", "A note.", "python tune/compare.py a.toml b.toml", NAMES, (0, 1))


def fill(folder: Path, part: str = "") -> Path:
    made = records({"a": [0.2, 0.4], "b": [0.3, 0.4]})
    for one in [*(replace(r, part=part if r.name == "b" else "") for r in made)]:
        one.write(folder / "runs" / f"{one.name}-seed{one.seed}.json")
    failed("c", 1, "exit code 2: <it> | broke").write(folder / "runs" / "c-seed1.json")
    ABOUT.write(folder)
    return folder


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]


@pytest.mark.parametrize("part", ["", "head"])
def test_everything_is_written_from_the_records(tmp_path: Path, part: str) -> None:
    folder = fill(tmp_path, part)
    written = {path.name for path in write_outputs(folder)}
    assert written == {"results.md", "report.html", "differences.png", "pass_k.png",
                       "learning.png", "front.png", "matched.png"}  # fmt: skip
    text = (folder / "results.md").read_text()
    for words in ("| a | ", "35.0 ± 7.1", "+5.0 [-58.5, +68.5], p 1 → 1", "1,000 completion tokens",
                  "exit code 2: <it> \\| broke", "c (seed 0). The command continues",
                  "Seeds 0, 1; commit c0ffee",
                  "10 test problems x 4 samples", ABOUT.command,
                  "* pass@2 at equal average score: above a: none; not told apart: 1.",
                  "| b | 100 | 7 | 28 | 0.2 | 0.5 |"):  # fmt: skip
        assert words in text, words
    for name in written - {"results.md", "report.html"}:
        assert imread(folder / name).std() > 0.01, name


def test_a_page_elsewhere_finds_the_pictures(tmp_path: Path) -> None:
    folder = fill(tmp_path / "results" / "x")
    write_outputs(folder, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    found = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    assert len(found) == 5
    assert all((tmp_path / picture).is_file() for picture in found)


def test_another_baseline_has_pages_of_its_own(tmp_path: Path) -> None:
    folder = fill(tmp_path)
    write_outputs(folder)
    before = (folder / "results.md").read_text()
    written = write_outputs(folder, baseline="b")
    assert {path.parent for path in written} == {folder / "against-b"}
    text = (folder / "against-b" / "results.md").read_text()
    assert "| a | -5.0 [-68.5, +58.5], p 1 → 1 |" in text
    assert (folder / "results.md").read_text() == before
    with pytest.raises(ValueError, match="'d' is not among what was compared: a, b, c"):
        write_outputs(folder, baseline="d")


def test_the_html_page_stands_alone(tmp_path: Path) -> None:
    write_outputs(fill(tmp_path))
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.tags.count("svg") == 5
    assert "script" not in page.tags
    assert all(link.startswith("#") for link in page.links)
    assert "A &lt;title&gt;" in text
    assert "&lt;it&gt;" in text


def test_records_and_about_survive_the_disk(tmp_path: Path) -> None:
    folder = fill(tmp_path)
    assert read_about(folder) == ABOUT
    made = records({"a": [0.2]})[0]
    assert read_record(folder / "runs" / "a-seed0.json") == made
    (folder / "runs" / "a-seed0.json").write_text("{}")
    with pytest.raises(ValueError, match=r"a-seed0.json is not a run of a comparison"):
        write_outputs(folder)
    with pytest.raises(ValueError, match="is not a comparison"):
        write_outputs(tmp_path / "nowhere")
