"""What `--data` may be, and how presets and the user's settings combine."""

import json
import os
from pathlib import Path

import pytest

from distrl_envs.tasks import make_task
from rllib_distrl.evaluation.data import MATH_ENV_ID, PRESETS, recipe_data, resolve_data
from rllib_distrl.recipe import recipe_from_tables
from rllib_distrl.settings import EvalSettings

BESIDE = Path(__file__).resolve().parents[3] / "shared" / "data" / "benchmarks"
BENCHMARKS = Path(os.environ.get("DISTRL_BENCHMARKS", BESIDE))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_validates_and_names_a_split(name):
    preset = PRESETS[name]
    assert 3 <= len(preset.hub.split("/")) <= 4
    data = resolve_data(name)
    assert data.env_id == MATH_ENV_ID
    assert data.env_config["task_config"]["data"] == {"test": f"hf:{preset.hub}"}
    assert set(data.env_config["task_config"]["fields"]) == {"problem", "answer"}


@pytest.mark.parametrize("name", PRESETS)
def test_local_copies_have_the_number_of_problems_that_the_preset_says(name):
    path = BENCHMARKS / PRESETS[name].file
    if not path.is_file():
        pytest.skip(f"no copy of {name}")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    assert len(lines) == PRESETS[name].problems


HUB_ROWS = {
    "olympiadbench": {"question": "Which?", "final_answer": ["7", "8"]},
    "gsm8k": {"question": "How many?", "answer": "3 + 4 = <<3+4=7>>7\\n#### 7"},
    "beyondaime": {"problem": "Which?", "answer": 7},
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_reads_what_the_hub_holds(name, tmp_path, monkeypatch):
    """A data set of the hub's name and form, in the working folder, where it comes first."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    parts = PRESETS[name].hub.split("/")
    folder = tmp_path / parts[0] / parts[1]
    folder.mkdir(parents=True)
    fields = PRESETS[name].hub_fields
    row = HUB_ROWS.get(name, {fields["problem"]: "Which?", fields["answer"]: "7"})
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    config = f"configs:\n- config_name: {parts[2] if len(parts) == 4 else 'default'}\n"
    files = f"  data_files:\n  - split: {parts[-1]}\n    path: rows.jsonl\n"
    (folder / "README.md").write_text(f"---\n{config}{files}---\n")

    task = make_task("math", split="test", **resolve_data(name).env_config["task_config"])
    assert len(task) == 1
    assert task.grade(task.problem(0), r"\boxed{7}").status == "correct"
    assert task.grade(task.problem(0), r"\boxed{9}").status == "wrong"


def test_a_folder_takes_the_place_of_the_hub(tmp_path):
    with pytest.raises(ValueError, match=r"there is no file .*aime24\.jsonl: put a copy"):
        resolve_data("aime24", tmp_path)
    (tmp_path / "aime24.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n')
    config = resolve_data("aime24", tmp_path).env_config
    assert config["task_config"] == {"data": {"test": str(tmp_path / "aime24.jsonl")}}


def test_files_hub_names_and_environment_ids(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text("{}")
    assert resolve_data(str(file)).name == "mine"
    hub = resolve_data("hf:someone/data/test").env_config["task_config"]["data"]
    assert hub == {"test": "hf:someone/data/test"}
    loud = file.with_name("LOUD.JSONL")
    loud.write_text("{}")
    assert resolve_data(str(loud)).env_config["task_config"]["data"] == {"test": str(loud)}
    countdown = resolve_data("distrl_envs:distrl/Countdown-v0")
    assert countdown.env_id == "distrl_envs:distrl/Countdown-v0"
    assert countdown.name == "Countdown-v0" and countdown.env_config == {}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("aime2", "Did you mean 'aime2"),
        ("nowhere.jsonl", "no file nowhere.jsonl"),
        ("x", "neither"),
        ("distrl_envs:distrl/Code-v0", "needs problems"),
    ],
)
def test_anything_else_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        resolve_data(data)


def test_users_settings_replace_a_presets():
    merged = PRESETS["aime24"].settings.changed(n=1024, top_p=None, seed=5)
    assert (merged.n, merged.top_p, merged.seed) == (1024, 0.95, 5)
    assert EvalSettings(n=64, k=(1, 8, 64)).changed(n=8).k == (1, 8)
    with pytest.raises(ValueError, match="nearest one is 'temperature'"):
        EvalSettings().changed(temprature=1.0)


def test_a_recipe_fills_in_what_its_eval_table_leaves_out():
    tables = {
        "run": {"model": "builtin:countdown-tiny", "seed": 7},
        "rollout": {"max_completion_tokens": 24, "max_batch_size": 32},
        "environment": {"env": "distrl_envs:distrl/Countdown-v0"},
    }
    data = recipe_data(recipe_from_tables(tables, "small"))
    found = data.settings
    assert (data.name, data.env_id) == ("Countdown-v0", "distrl_envs:distrl/Countdown-v0")
    assert (found.seed, found.max_tokens, found.max_batch_size, found.k) == (7, 24, 32, (1, 8))
    own = {"eval": {"seed": 1, "max_tokens": 9, "k": [], "n": 4}}
    found = recipe_data(recipe_from_tables(tables | own, "small")).settings
    assert (found.seed, found.max_tokens, found.ks) == (1, 9, (1, 2, 4))
