"""README and docs print what the committed results say."""

import json
import os
from pathlib import Path

import pytest

from rllib_distrl.experiments.pages import renew_table, table_of, write_outputs
from tune.tables import IGNORANCE, MAIN_JOB, RESULTS, ROOT, TABLES

COMPARISONS = {
    "ablation": "ablation",
    "critic-batches": "law-batches",
    "headline-countdown": "headline-countdown",
    "headline-graded": "headline-graded",
    "headline-graph-path": "headline-graph-path",
    "information-32": "law-information",
    "methods": "methods-compared",
    "prompt-baseline": "law-prompt-mean",
    "sao": "law-sao",
    "unruly-both": "law-both",
    "unruly-clean": "law-clean",
    "unruly-glitches": "law-glitches",
    "unruly-scales": "law-scales",
    "wide-law": "law-wide",
}


# A table of comparisons decides half a dozen pages and more: that takes its time.
MADE = [
    pytest.param(page, name, marks=[pytest.mark.slow] if name in ("comparisons", "law") else [])
    for page, name in TABLES
]


@pytest.mark.parametrize(("page", "name"), MADE)
def test_tables_are_those_of_the_committed_results(page: Path, name: str):
    assert table_of(page, name) == TABLES[page, name]()


@pytest.mark.slow
@pytest.mark.parametrize("folder", COMPARISONS)
def test_pages_of_comparisons_are_those_of_the_committed_records(folder: str, tmp_path: Path):
    copy = tmp_path / "docs" / "results" / folder
    copy.mkdir(parents=True)
    for part in ("runs", "comparison.json"):
        os.symlink(RESULTS / folder / part, copy / part)
    page = f"{COMPARISONS[folder]}.md"
    write_outputs(copy, tmp_path / "docs" / page)
    assert (tmp_path / "docs" / page).read_text() == (ROOT / "docs" / page).read_text()


def test_every_committed_number_names_its_commit():
    records = [json.loads(path.read_text()) for path in RESULTS.glob("*/runs/*.json")]
    records += json.loads(IGNORANCE.read_text()) + json.loads(MAIN_JOB.read_text())["runs"]
    assert len(records) > 300
    assert {len(record["commit"]) for record in records} == {40}


def test_a_table_goes_between_its_own_markers(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(
        "a\n<!-- table: begin -->\n1\n<!-- table: end -->\nb\n"
        "<!-- table x y: begin -->\n2\n<!-- table x y: end -->\nc\n"
    )
    renew_table(page, "| 3 |", "x y")
    assert (table_of(page), table_of(page, "x y")) == ("1", "| 3 |")
    assert page.read_text().endswith("<!-- table x y: end -->\nc\n")
    with pytest.raises(ValueError, match="needs <!-- table z: begin --> and"):
        renew_table(page, "", "z")
