"""The committed results are complete, and the page shows them."""

import json

import pytest

from benchmarks import memory, pretrained, sampling_ahead, sizes, turns
from benchmarks.ratios import RATIOS, Ratio, short_table, summary, table
from benchmarks.run import PAGES, RESULTS
from rllib_distrl.experiments.pages import table_of

NUMBERS = ("median", "low", "high", "target", "ours_tokens_per_s")


def test_every_ratio_has_median_spread_machine_and_commit():
    ratios = json.loads(RESULTS.read_text())["ratios"]
    assert list(ratios) == [ratio.name for ratio in RATIOS]
    for ratio in RATIOS:
        found = ratios[ratio.name]
        assert all(isinstance(found[name], int | float) for name in NUMBERS), ratio.name
        assert found["low"] <= found["median"] <= found["high"]
        assert found["repeats"] >= 3
        assert ("theirs_tokens_per_s" in found) == (ratio.theirs is not None)
        assert found["machine"]["processor"] and found["machine"]["torch"]
        assert len(found["commit"].rstrip("+")) >= 7


@pytest.mark.parametrize(("page", "name"), PAGES)
def test_the_pages_show_the_committed_results(page, name):
    results = json.loads(RESULTS.read_text())
    assert table_of(page, name) == PAGES[page, name](results)
    commits = {found["commit"] for found in results["ratios"].values()}
    assert all(commit in page.read_text() for commit in commits)


def test_tables_show_groups_misses_and_commits():
    found = {"median": 2.0, "low": 1.5, "high": 2.25, "target": 2.5, "what": "a", "commit": "abc"}
    results = {
        "ratios": {
            "token_reward_us": {**found, "commit": "def"},
            "smollm2_generation_vs_hf": found,
        }
    }
    row = "| `smollm2_generation_vs_hf` | 2.00 | 1.50 to 2.25 | ≥ 2.5 (missed) | a |"
    assert table(results, ["smollm2"]).splitlines()[2:] == [row, "", "Measured at abc."]
    assert short_table(results).splitlines()[2:] == [
        "| `token_reward_us` | 2.00 | ≤ 2.5 |",
        "| `smollm2_generation_vs_hf` | 2.00 | ≥ 2.5 (missed) |",
        "",
        "Measured at def, abc.",
    ]
    assert table(results, ["update"]).endswith("Measured at no commit yet.")


def test_a_ratio_is_the_median_of_neighbouring_runs():
    ratio = Ratio("r", "g", ("a", "b", ""), ("c", "d", ""), 2.0, "what")
    pairs = [
        ({"tokens": 10, "cpu_s": ours, "wall_s": 1.0}, {"tokens": 5, "cpu_s": 1.0, "wall_s": 4.0})
        for ours in (0.5, 1.0, 2.0)
    ]
    found = summary(ratio, pairs)
    assert (found["low"], found["median"], found["high"]) == (1.5, 2.0, 3.0)
    assert found["median_wall"] == pytest.approx(8.0)
    assert (found["ours_tokens_per_s"], found["theirs_tokens_per_s"]) == (10.0, 5.0)


def test_the_page_on_memory_shows_the_committed_results():
    results = json.loads(memory.RESULTS.read_text())
    assert table_of(memory.PAGE) == memory.tables(results)
    assert results["commit"] in memory.PAGE.read_text()
    assert list(results["configurations"]) == list(memory.CONFIGURATIONS)
    assert results["machine"]["torch"] and len(results["commit"].rstrip("+")) >= 7


@pytest.mark.parametrize("name", memory.CONFIGURATIONS)
def test_estimated_memory_is_within_a_fifth_of_the_measured(name):
    found = json.loads(memory.RESULTS.read_text())["configurations"][name]
    assert found["estimated"].keys() == found["measured"].keys()
    for part, measured in found["measured"].items():
        assert abs(found["estimated"][part] / measured - 1) < 0.2, part


@pytest.mark.parametrize(
    ("module", "name"), [(pretrained, "cost"), (sampling_ahead, "ahead"), (turns, "turns")]
)
def test_the_page_shows_the_committed_results_of(module, name):
    results = json.loads(module.OUT.read_text())
    assert table_of(module.PAGE, name) == module.table(results)
    assert results["machine"]["torch"] and len(results["commit"].rstrip("+")) >= 7


def test_the_page_on_a_pretrained_model_names_the_peak_memory():
    peak = json.loads(pretrained.OUT.read_text())["smollm2_peak_memory_gib"]
    assert f"{peak:.1f} GiB" in pretrained.PAGE.read_text()


def test_sampling_ahead_was_measured_three_times():
    assert len(json.loads(sampling_ahead.OUT.read_text())["seconds"]) >= 3


def test_what_a_token_costs_by_its_place_and_by_how_much_more_per_thousand():
    # 8 rows. A token costs 1 ms and a millisecond more per thousand before it: n tokens cost
    # n + n^2 / 2,000 ms a row. The first repeat was disturbed.
    seconds = {
        f"8 x {n}": [9e9, *[8 * (n + n * n / 2000) / 1000] * 2] for n in (64, 128, 256, 512, 1024)
    }
    places = sizes.by_place(seconds)
    assert places == pytest.approx({96: 1.096, 192: 1.192, 384: 1.384, 768: 1.768})
    assert sizes.slope(places) == pytest.approx(1.0)
    assert sizes.by_rows({"8 x 64": [0.5, 2.0, 1.0]}) == {8: 512.0}


def test_the_page_on_sizes_shows_the_committed_results():
    results = json.loads(sizes.OUT.read_text())
    assert table_of(sizes.PAGE, "sizes") == sizes.table(results)
    assert sizes.FIGURE.exists() and list(results["seconds"]) == list(sizes.MODELS)
    assert all(
        len(rounds) >= 3 for cases in results["seconds"].values() for rounds in cases.values()
    )
    assert results["machine"]["torch"] and len(results["commit"].rstrip("+")) >= 7
