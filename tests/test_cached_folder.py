"""The cache: hit, miss, damage, interrupted builds, several processes."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from rllib_distrl.files import CachedFolder, cache_root, content_key
from rllib_distrl.model.builtin import SPECS, builtin_folder


class Builds:
    """A builder that counts."""

    def __init__(self):
        self.count = 0

    def __call__(self, folder):
        assert not list(folder.iterdir())
        self.count += 1
        (folder / "weights").write_bytes(b"\x01\x02")
        (folder / "config").write_text("{}")
        return {"loss": 0.5}


@pytest.fixture
def folder(tmp_path):
    return CachedFolder("model-1", "the model", tmp_path / "cache")


def test_it_is_built_once(folder):
    builds = Builds()
    path = folder.get(builds)
    assert folder.get(builds) == path == folder.path
    assert builds.count == 1
    assert {file.name for file in path.iterdir()} == {"weights", "config", "meta.json"}
    assert '"loss": 0.5' in (path / "meta.json").read_text()


def change(path):
    path.joinpath("weights").write_bytes(b"\x01\x03")


def remove(path):
    path.joinpath("config").unlink()


def remove_meta(path):
    path.joinpath("meta.json").unlink()


def cut_meta(path):
    path.joinpath("meta.json").write_text('{"files": ')


def empty_meta(path):
    path.joinpath("meta.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (change, "weights was changed"),
        (remove, "config is missing"),
        (remove_meta, "meta.json cannot be read"),
        (cut_meta, "meta.json cannot be read"),
        (empty_meta, "meta.json cannot be read"),
    ],
)
def test_a_damaged_folder_is_built_again_and_that_is_said(damage, told, folder, capsys):
    builds = Builds()
    damage(folder.get(builds))
    capsys.readouterr()
    path = folder.get(builds)
    assert builds.count == 2
    assert (path / "weights").read_bytes() == b"\x01\x02"
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and told in lines[0] and "the model" in lines[0]


def test_a_build_that_failed_leaves_nothing_that_counts(folder):
    def fails(target):
        (target / "weights").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder.get(fails)
    assert not folder.path.exists()
    builds = Builds()  # asserts that it gets an empty folder
    assert (folder.get(builds) / "weights").read_bytes() == b"\x01\x02"


def test_a_place_that_cannot_be_written_to_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    folder = CachedFolder("model-1", "the model", tmp_path / "file" / "cache")
    with pytest.raises(ValueError, match=r"cannot be written to.*Set DISTRL_CACHE") as caught:
        folder.get(Builds())
    assert caught.value.__suppress_context__


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("DISTRL_CACHE", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_root() == tmp_path / "rllib_distrl"
    monkeypatch.delenv("DISTRL_CACHE")
    assert cache_root() == Path("/elsewhere/rllib_distrl")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "rllib_distrl"


def test_the_key_depends_on_content_not_on_order():
    assert content_key({"a": 1, "b": 2}) == content_key({"b": 2, "a": 1})
    assert content_key({"a": 1, "b": 2}) != content_key({"a": 1, "b": 3})


SCRIPT = """
import sys
from dataclasses import replace
from pathlib import Path
from rllib_distrl.model.builtin import SPECS, builtin_folder
print(builtin_folder(replace(SPECS["countdown-tiny"], steps=3), Path(sys.argv[1])))
"""


def test_of_two_processes_one_builds_and_the_other_waits(tmp_path):
    name = builtin_folder(replace(SPECS["countdown-tiny"], steps=3), tmp_path / "name").name
    root = tmp_path / "cache"
    root.mkdir()
    command = [sys.executable, "-c", SCRIPT, str(root)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with FileLock(root / f".{name}.lock"):  # both reach the lock before either may build
        processes = [
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
            )
            for _ in range(2)
        ]
        for process in processes:
            assert process.stderr is not None
            assert any("Waiting for another process" in line for line in process.stderr)
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert [out for out, _ in results] == [f"{root / name}\n"] * 2
    assert sum(err.count("Warm-starting") for _, err in results) == 1
    assert CachedFolder(name, "the model", root).damage() is None
