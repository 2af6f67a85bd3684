import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from rllib_distrl import load_run
from rllib_distrl.cli.app import app
from rllib_distrl.evaluation.measures import entropy_at
from rllib_distrl.method.token_table import TokenTable
from rllib_distrl.recipe import recipe_from_tables
from rllib_distrl.runs.folder import create_run
from rllib_distrl.viewer import plots
from rllib_distrl.viewer.plots import reliability, shared_states
from rllib_distrl.viewer.run_report import write_report
from tests.viewer.runs import RECIPE, make_run


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A run that tests only read."""
    return make_run(tmp_path_factory.mktemp("runs") / "one")


def test_load_run_gives_frames(one):
    run = load_run(one)
    assert run.name == "one"
    assert run.iterations.index.tolist() == [1, 2, 3, 4]
    assert run.iterations["env_runners/episode_return_mean"].tolist() == [0.1, 0.2, 0.3, 0.4]
    assert run.iterations["learners/default_policy/logp_mismatch_max"].isna().tolist() == [
        False, True, False, False,
    ]  # fmt: skip
    assert run.evaluations == {"before": {"avg@4": 0.25}, "after": {"avg@4": 0.5}}
    assert run.episodes.groupby("when")["score"].mean().to_dict() == {"before": 0.25, "after": 0.5}
    assert run.settings["training"]["lr"] == 1e-3
    assert run.recipe.run.iterations == 4
    assert len(run.tokens) == 12 * 5


def test_a_run_without_tokens_says_so(tmp_path):
    run = load_run(make_run(tmp_path / "one", tokens=False))
    with pytest.raises(ValueError, match="no token table"):
        _ = run.tokens
    with pytest.raises(ValueError, match="not a run folder"):
        load_run(tmp_path)


def test_reliability_by_hand():
    values = np.array([0.0, 0.1, 0.9, 1.0])
    predicted, observed, share = reliability(values, np.array([0.0, 1.0, 1.0, 1.0]), bins=4)
    np.testing.assert_allclose(predicted, [0.05, 0.95])
    np.testing.assert_allclose(observed, [0.5, 1.0])
    np.testing.assert_allclose(share, [0.5, 0.5])


def test_shared_states_are_those_with_equal_prefixes():
    frame = pd.DataFrame(
        {
            "problem": [0, 0, 0, 1],
            "token": [np.array(t, np.int32) for t in ([1, 2], [1, 3], [1], [1, 2])],
            "score": [1.0, 0.0, 0.0, 1.0],
            "value": [np.array(v) for v in ([0.25, 0.5], [0.25, 0.5], [0.25], [0.75, 0.5])],
            "quantiles": [
                np.array(q) for q in ([0, 0.5, 0, 1], [0, 0.5, 0, 1], [0, 0.5], [0.5, 1, 0, 1])
            ],
        }
    )
    spread, value, returns = shared_states(TokenTable(frame), least=2)
    # The prompt of problem 0 (three completions) and, after token 1, two of them go on.
    np.testing.assert_allclose(spread, [0.25, 0.5])
    np.testing.assert_allclose(value, [0.25, 0.5])
    np.testing.assert_allclose(returns, [1 / 3, 1 / 2])


def test_figures_draw_the_numbers(tmp_path):
    runs = [load_run(make_run(tmp_path / n, r)) for n, r in (("a", (0.1, 0.2)), ("b", (0.3, 0.4)))]
    learning = plots.plot_learning_curves(runs)
    drawn = [line.get_ydata().tolist() for line in learning.axes[0].lines]
    assert [0.1, 0.2] in drawn
    assert [0.3, 0.4] in drawn
    passes = plots.plot_pass_at_k(runs).axes[0].lines
    # One of four samples solves each problem before training, two after: pass@2 is 1/2 and 5/6.
    assert [line.get_ydata().tolist() for line in passes[:2]] == [
        pytest.approx([1 / 4, 1 / 2, 1]),
        pytest.approx([1 / 2, 5 / 6, 1]),
    ]
    bars = plots.plot_timing(runs[0]).axes[0].patches
    assert [bar.get_width() for bar in bars] == [1.0, 2.0]
    fan = plots.plot_completion(runs[0].token_table, 0)
    assert fan._repr_png_().startswith(b"\x89PNG")


def test_the_page_has_every_section_and_no_way_out(one, tmp_path):
    two = make_run(tmp_path / "two<b>", lr=2e-3, tokens=False)
    (two / "error.txt").write_text("Traceback <script>alert(1)</script>")
    page = write_report([load_run(one), load_run(two)], tmp_path / "report.html").read_text()
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert len(titles) == 13
    assert page.count("<svg") >= 7
    assert "two&lt;b&gt;" in page
    assert "<script" not in page
    assert '<tr class="differs"><th>training.lr</th><td>0.001</td><td>0.002</td></tr>' in page
    assert "<tr><th>run.seed</th><td>0</td><td>0</td></tr>" in page
    assert "25.0 → 50.0" in page
    assert not re.search(r'(src|href)="(?!#)', page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_a_page_is_drawn_without_ray_and_torch(tmp_path):
    run = make_run(tmp_path / "one")
    code = """
import sys
from pathlib import Path
from rllib_distrl.cli.pages import run_report
run_report([Path(sys.argv[1])], None)
print(*sorted(sys.modules))
"""
    command = [sys.executable, "-c", code, str(run)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    heavy = {"numba", "ray", "sklearn", "torch", "transformers"}
    assert not heavy & set(done.stdout.split())
    page = (run / "report.html").read_text()
    assert "rank corr." in page
    assert "predicted probability of a lower return" in page


def test_a_run_that_has_just_begun_has_a_page(tmp_path):
    create_run(tmp_path / "new", recipe_from_tables(RECIPE, "tiny"), ["x"])
    page = write_report(load_run(tmp_path / "new"), tmp_path / "report.html").read_text()
    assert page.count("Not shown:") == 10


def test_commands(tmp_path):
    run = make_run(tmp_path / "one")
    viewed = CliRunner().invoke(app, ["view", str(run)])
    assert viewed.exit_code == 0, viewed.stderr
    assert (run / "view.html").is_file()
    table = load_run(run).token_table
    word = str(table.completions["text"][0][0]).strip()
    said = CliRunner().invoke(app, ["view", str(run), "--entropy-at", f"{word}, never"])
    assert f"Entropy at the tokens {word}, never: " in said.stdout
    mean, count = entropy_at(table, [word])
    assert f"{mean:.3f} nats at {count:,} of them; " in said.stdout
    refused = CliRunner().invoke(app, ["view", str(run), "--entropy-at", " ,"])
    assert refused.exit_code == 2 and "names no word" in refused.stderr
    reported = CliRunner().invoke(app, ["report", str(run)])
    assert reported.exit_code == 0, reported.stderr
    assert "calibration" in (run / "report.html").read_text()
    make_run(tmp_path / "sub" / "one")
    both = ["report", str(run), str(tmp_path / "sub" / "one"), "--out", str(tmp_path / "r.html")]
    assert CliRunner().invoke(app, both).exit_code == 0
    refused = CliRunner().invoke(app, ["view", str(tmp_path)])
    assert refused.exit_code == 2
    assert "not a run folder" in refused.stderr
