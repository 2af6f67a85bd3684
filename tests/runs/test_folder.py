"""The run folder: refusals lose nothing, and resumption asks for the same recipe."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rllib_distrl.recipe import Recipe, load_recipe
from rllib_distrl.runs.folder import (
    RunFolder,
    check_free,
    create_run,
    is_run_folder,
    locked,
    open_run,
    resume_run,
)

RECIPE = """
[run]
algorithm = "PPO"
model = "builtin:countdown-tiny"
iterations = 5
[environment]
env = "distrl_envs:distrl/Countdown-v0"
[training]
lr = 1e-3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def recipe(file: Path) -> Recipe:
    return load_recipe(file)


def test_create_writes_recipe_and_meta(tmp_path: Path, recipe: Recipe) -> None:
    run = create_run(tmp_path / "runs" / "a", recipe, ["distrl", "train"])
    assert run.recipe() == recipe
    meta = json.loads(run.meta_file.read_text())
    assert meta["seed"] == 0
    assert meta["versions"]["ray"].startswith("2.")
    assert [s["command"] for s in meta["sessions"]] == [["distrl", "train"]]
    assert is_run_folder(run.path)


def test_an_existing_run_is_refused_and_kept(tmp_path: Path, recipe: Recipe) -> None:
    run = create_run(tmp_path / "a", recipe, [])
    run.progress_file.write_text("{}\n")
    with pytest.raises(ValueError, match=r"--resume.*--overwrite"):
        create_run(tmp_path / "a", recipe, [])
    assert run.progress_file.read_text() == "{}\n"


def test_overwrite_deletes_the_run_and_nothing_else(tmp_path: Path, recipe: Recipe) -> None:
    run = create_run(tmp_path / "a", recipe, [])
    run.progress_file.write_text("{}\n")
    (run.checkpoints / "iteration_000001").mkdir(parents=True)
    note = run.path / "notes.txt"
    note.write_text("mine")
    create_run(tmp_path / "a", recipe, [], overwrite=True)
    assert note.read_text() == "mine"
    assert not run.progress_file.exists()
    assert not run.checkpoints.exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_run_is_never_touched(
    tmp_path: Path, recipe: Recipe, overwrite: bool
) -> None:
    folder = tmp_path / "precious"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "meta.json").write_text('{"format": "something else"}')
    with pytest.raises(ValueError, match="not a run"):
        create_run(folder, recipe, [], overwrite=overwrite)
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoints", "meta.json"]


def test_a_damaged_meta_json_is_named(tmp_path: Path, recipe: Recipe) -> None:
    run = create_run(tmp_path / "run", recipe, [])
    run.meta_file.write_text('{"format"')
    for use in (open_run, check_free):
        with pytest.raises(ValueError, match=r"run/meta\.json is damaged \(.*\)\. Put it back"):
            use(run.path)


def test_out_must_be_a_folder(tmp_path: Path, file: Path) -> None:
    with pytest.raises(ValueError, match="not a folder"):
        check_free(file, overwrite=True)
    link = tmp_path / "link"
    link.symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(ValueError, match="not a folder"):
        check_free(link, overwrite=True)


def test_resume_takes_the_same_recipe_with_more_iterations(file: Path, tmp_path: Path) -> None:
    run = create_run(tmp_path / "a", load_recipe(file), ["one"])
    resume_run(run.path, load_recipe(file, ["run.iterations=9"]), ["two"])
    assert run.recipe().run.iterations == 9
    meta = json.loads(run.meta_file.read_text())
    assert [s["command"] for s in meta["sessions"]] == [["one"], ["two"]]


def test_resume_refuses_a_changed_recipe_and_shows_the_difference(
    file: Path, tmp_path: Path
) -> None:
    run = create_run(tmp_path / "a", load_recipe(file), [])
    changed = load_recipe(file, ["training.lr=2e-3", "training.gamma=0.9", "run.iterations=9"])
    with pytest.raises(ValueError) as caught:
        resume_run(run.path, changed, [])
    message = str(caught.value)
    assert "training.lr: 0.001 in the run, 0.002 now" in message
    assert "training.gamma: '(not set)' in the run, 0.9 now" in message
    assert "iterations" not in message
    assert run.recipe().run.iterations == 5


def test_resume_refuses_fewer_iterations_and_folders_without_a_run(
    file: Path, tmp_path: Path
) -> None:
    run = create_run(tmp_path / "a", load_recipe(file), [])
    with pytest.raises(ValueError, match="only be raised"):
        resume_run(run.path, load_recipe(file, ["run.iterations=4"]), [])
    with pytest.raises(ValueError, match="not a run folder"):
        open_run(tmp_path)


def test_a_budget_of_tokens_can_be_raised_but_not_introduced(file: Path, tmp_path: Path) -> None:
    run = create_run(tmp_path / "a", load_recipe(file, ["run.budget_tokens=100"]), [])
    assert resume_run(run.path, load_recipe(file, ["run.budget_tokens=200"]), []).path == run.path
    with pytest.raises(ValueError, match="only be raised on resume: 200 in the run, 150 now"):
        resume_run(run.path, load_recipe(file, ["run.budget_tokens=150"]), [])
    with pytest.raises(ValueError, match="budget_tokens: 200 in the run, 0 now"):
        resume_run(run.path, load_recipe(file), [])


def test_eval_json(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.read_eval() == {}
    run.write_eval({"before": {"avg@4": 0.25}, "after": None})
    assert run.read_eval() == {"before": {"avg@4": 0.25}, "after": None}


def test_two_processes_cannot_train_in_one_folder(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from rllib_distrl.runs.folder import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "a")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match="Another process"), locked(tmp_path / "a"):
        pass
    holder.communicate("")
    with locked(tmp_path / "a"):
        pass


def recipe_of_data(file: Path, data: Path) -> Recipe:
    """A recipe that names its data beside it."""
    task = f'\n[environment.env_config.task_config]\ndata = "{data.name}"\n[training]'
    text = RECIPE.replace("Countdown-v0", "Math-v0").replace("\n[training]", task)
    file.write_text(text)
    return load_recipe(file)


def test_a_run_goes_on_only_with_the_data_that_it_began_with(tmp_path: Path) -> None:
    data, file = tmp_path / "rows.jsonl", tmp_path / "own.toml"
    data.write_text('{"problem": "1 + 1 =", "answer": "2"}\n')
    recipe = recipe_of_data(file, data)
    run = create_run(tmp_path / "run", recipe, [])
    assert resume_run(run.path, recipe, []).path == run.path
    data.write_text('{"problem": "1 + 1 =", "answer": "3"}\n')
    with pytest.raises(ValueError, match=rf"task_config.data: the files of {data} have changed"):
        resume_run(run.path, recipe, [])
    data.unlink()
    with pytest.raises(ValueError, match="are gone"):
        resume_run(run.path, recipe, [])
    meta = json.loads(run.meta_file.read_text())
    assert len(meta["sessions"]) == 2
    del meta["data"]  # a run of an earlier version
    run.meta_file.write_text(json.dumps(meta))
    assert resume_run(run.path, recipe, []).path == run.path


def test_a_run_goes_on_only_with_the_model_that_it_began_with(tmp_path: Path) -> None:
    model, file = tmp_path / "mine", tmp_path / "own.toml"
    model.mkdir()
    (model / "config.json").write_text("{}")
    weights = model / "model.safetensors"
    weights.write_bytes(bytes(3 << 20))
    file.write_text(RECIPE)
    recipe = load_recipe(file, [f"run.model={model}"])
    run = create_run(tmp_path / "run", recipe, [])
    with weights.open("r+b") as stream:
        stream.seek((3 << 20) - 1)
        stream.write(b"1")  # of the last weight
    with pytest.raises(ValueError, match=rf"run.model: the files of {model} have changed"):
        resume_run(run.path, recipe, [])
    weights.write_bytes(bytes(3 << 20))
    moved = model.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"are gone.*with run\.model=PLACE"):
        resume_run(run.path, recipe, [])
    elsewhere = load_recipe(run.recipe_file, [f"run.model={moved}"])
    assert resume_run(run.path, elsewhere, []).recipe().run.model == str(moved)


def test_the_same_data_may_lie_elsewhere_on_resume(tmp_path: Path) -> None:
    """As they do on another machine, which has fetched the run's copy."""
    data, file = tmp_path / "rows.jsonl", tmp_path / "own.toml"
    data.write_text('{"problem": "1 + 1 =", "answer": "2"}\n')
    run = create_run(tmp_path / "run", recipe_of_data(file, data), [])
    (tmp_path / "other").mkdir()
    moved = data.rename(tmp_path / "other" / data.name)
    elsewhere = recipe_of_data(tmp_path / "other" / file.name, moved)
    assert resume_run(run.path, elsewhere, []).recipe() == elsewhere
    again = create_run(tmp_path / "again", elsewhere, [])
    data.write_text('{"problem": "1 + 1 =", "answer": "3"}\n')
    with pytest.raises(ValueError, match=rf"data: '{moved}' in the run, '{data}' now"):
        resume_run(again.path, load_recipe(file), [])


def test_the_way_past_a_long_prompt_is_open_on_resume(tmp_path: Path, file: Path) -> None:
    run = create_run(tmp_path / "run", load_recipe(file), [])
    skipping = load_recipe(file, ["environment.env_config.on_long_prompt=skip"])
    resume_run(run.path, skipping, [])
    assert run.recipe().env_config == {"on_long_prompt": "skip"}
