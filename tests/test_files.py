"""What is replaced is the old or the new, whatever happens in between."""

from __future__ import annotations

from pathlib import Path

import pytest

from rllib_distrl.files import content_hash, replaced_file, replaced_folder, write_atomic


def test_a_write_that_fails_leaves_the_old_and_nothing_else(tmp_path: Path) -> None:
    file, folder = tmp_path / "new" / "a.txt", tmp_path / "new" / "b"
    write_atomic(file, "ä")
    write_atomic(folder / "part", b"\xff")
    for replaced, target in ((replaced_file, file), (replaced_folder, folder)):
        with pytest.raises(OSError, match="no room"), replaced(target) as temporary:
            (temporary / "part" if temporary.is_dir() else temporary).write_text("half")
            raise OSError("no room")
    assert file.read_bytes() == "ä".encode()
    assert (folder / "part").read_bytes() == b"\xff"
    assert sorted(path.name for path in file.parent.iterdir()) == ["a.txt", "b"]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for name in ("first", "second"):
        with replaced_folder(target) as temporary:
            (temporary / name).touch()
            assert not (target / name).exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "second"]


def test_the_hash_of_a_folder_is_of_names_and_contents(tmp_path: Path) -> None:
    def hash_of(**files: str) -> str:
        folder = tmp_path / "".join(f"{name}-{text}" for name, text in files.items())
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
        return content_hash(folder)

    hashes = [hash_of(a="1", b="2"), hash_of(a="12", b=""), hash_of(a="1", c="2"), hash_of(a="1")]
    assert len(set(hashes)) == 4
    write_atomic(tmp_path / "file", "12")
    # As the reference implementation of BLAKE2b gives it: `printf 12 | b2sum -l 128`.
    assert content_hash(tmp_path / "file") == "68f978fe50aca8ee91e0e1f94618c62f"
