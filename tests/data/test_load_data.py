import json
import subprocess
import sys

import pandas as pd
import pytest

from distrl_envs.data import Column, DataError, hub_address, load_data

COLUMNS = {"problem": Column(), "answer": Column((str, int), convert=str)}
ROWS = [{"problem": "1+1?", "answer": "2"}, {"problem": "2+2?", "answer": 4, "level": 3}]


def write(path, lines):
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )
    return path


def load(path, **options):
    return load_data(path, COLUMNS, gold="answer", **options)


def test_jsonl_with_its_places(tmp_path):
    data = load(write(tmp_path / "a.jsonl", [ROWS[0], "", ROWS[1]]))
    assert data.rows == [
        {"problem": "1+1?", "answer": "2"},
        {"problem": "2+2?", "answer": "4", "level": 3},
    ]
    assert [place.rsplit(":", 1)[1] for place in data.places] == ["1", "3"]


def test_csv_and_parquet_hold_the_same(tmp_path):
    frame = pd.DataFrame({"question": ["a,b?", 'say "x"\nand y'], "final": ["1", "2"]})
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_parquet(tmp_path / "a.parquet")
    fields = {"problem": "question", "answer": "final"}
    loaded = [load(tmp_path / name, fields=fields).rows for name in ("a.csv", "a.parquet")]
    assert loaded[0] == loaded[1]
    assert loaded[0][1] == {"problem": 'say "x"\nand y', "answer": "2"}


FAULTY = [
    ROWS[0],
    '{"problem": "cut off',
    {"problem": "no gold"},
    {"problem": "empty gold", "answer": "  "},
    {"problem": ["a", "list"], "answer": 1.5},
    '"a string"',
    ROWS[1],
    {"problem": " 1+1?  ", "answer": "3"},
]


def test_all_faults_are_in_one_error(tmp_path):
    path = write(tmp_path / "bad.jsonl", FAULTY)
    with pytest.raises(DataError) as caught:
        load(path)
    message = str(caught.value)
    assert "8 faults" in message
    for line, fault in [
        (2, "cannot be read"), (3, "'answer' is missing"), (4, "'answer' is empty"),
        (5, "'problem' holds list"), (5, "'answer' holds float"), (6, "holds str"),
        (1, "different golds"), (8, "different golds"),
    ]:  # fmt: skip
        assert any(f"{path}:{line}: " in row and fault in row for row in message.splitlines())


def test_bad_rows_can_be_skipped_and_are_counted(tmp_path, capsys):
    data = load(write(tmp_path / "bad.jsonl", FAULTY), on_bad_row="skip")
    assert [row["problem"] for row in data.rows] == ["2+2?"]
    assert len(data.skipped) == 8
    assert "skipped 7 of 8 rows" in capsys.readouterr().err


def test_nothing_left_is_an_error_even_when_skipping(tmp_path):
    with pytest.raises(DataError, match="no usable row"):
        load(write(tmp_path / "bad.jsonl", ["{"]), on_bad_row="skip")


def test_duplicates_that_agree_stay(tmp_path):
    data = load(write(tmp_path / "a.jsonl", [ROWS[0], ROWS[1], ROWS[0]]))
    assert (len(data.rows), data.duplicates) == (3, 1)


def test_csv_faults_name_their_lines(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('problem,answer\n"one\nline more",1\ntwo\nthree,3,4\nfour,\n')
    with pytest.raises(DataError) as caught:
        load(path)
    message = str(caught.value)
    assert "3 faults" in message
    assert f"{path}:4: field 'answer' is missing" in message
    assert f"{path}:5: cannot be read: more cells" in message
    assert f"{path}:6: field 'answer' is empty" in message


@pytest.mark.parametrize("source", ["a.txt", "missing.jsonl", "hf:", "hf:name", "hf:a/b/c/d/e"])
def test_sources_that_cannot_be(source):
    with pytest.raises(ValueError):
        load(source)


def test_settings_are_checked(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(ValueError, match="on_bad_row"):
        load(path, on_bad_row="ignore")
    with pytest.raises(ValueError, match="question"):
        load(path, fields={"question": "problem"})


def testhub_addresses():
    assert hub_address("hf:gsm8k/test") == ("gsm8k", None, "test")
    assert hub_address("hf:owner/name/test") == ("owner/name", None, "test")
    assert hub_address("hf:owner/name/main/test") == ("owner/name", "main", "test")
    assert hub_address("hf:./some/folder/test") == ("some/folder", None, "test")
    assert hub_address("hf:/a/b/c/d/test") == ("/a/b/c/d", None, "test")


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    """The package, away from the user's cache."""
    package = pytest.importorskip("datasets")
    monkeypatch.setattr(package.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return package


def test_a_hub_data_set_in_a_folder(tmp_path, datasets):
    folder = tmp_path / "mine"
    folder.mkdir()
    write(folder / "train.jsonl", [ROWS[0]])
    frame = [{"question": "2+2?", "final": "4"}, {"question": "3+3?", "final": None}]
    write(folder / "test.jsonl", frame)
    (folder / "train.jsonl").unlink()
    fields = {"problem": "question", "answer": "final"}
    with pytest.raises(DataError, match=r"hf:.*mine/test:2: field 'final' is missing"):
        load(f"hf:{folder}/test", fields=fields)
    data = load(f"hf:{folder}/test", fields=fields, on_bad_row="skip")
    assert data.rows == [{"problem": "2+2?", "answer": "4"}]
    with pytest.raises(ValueError, match=r"cannot be loaded: .*validation"):
        load(f"hf:{folder}/validation")
    with pytest.raises(ValueError, match=r"There is no folder .*nowhere"):
        load(f"hf:{tmp_path}/nowhere/test")


def test_a_missing_datasets_package_is_a_clear_error():
    program = (
        "import sys\nsys.modules['datasets'] = None\nfrom distrl_envs.data import *\n"
        "try:\n    load_data('hf:a/test', {'problem': Column()})\n"
        "except ValueError as error:\n    print(error)"
    )
    path = [entry for entry in sys.path if entry]
    shown = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{program}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "rllib-distrl[datasets]" in shown.stdout


CSV = {
    "the index of pandas": ",problem,answer\n0,1+1?,2\n",
    "a trailing comma": "problem,answer,\n1+1?,2,\n",
    "trailing commas below only": "problem,answer\n1+1?,2,\n",
    "a byte order mark": "\ufeffproblem,answer\n1+1?,2\n",
    "blank lines and spaces": "problem, answer\n\n1+1?,2\n\n",
}


@pytest.mark.parametrize("case", CSV)
def test_csv_as_spreadsheets_write_it(case, tmp_path):
    (tmp_path / "a.csv").write_text(CSV[case], encoding="utf-8")
    assert load(tmp_path / "a.csv").rows == [{"problem": "1+1?", "answer": "2"}]


DAMAGED = {
    "latin-1": ("a.csv", "problem,answer\ncafé,2\n".encode("latin-1"), 2, "not UTF-8"),
    "semicolons": ("a.csv", b"problem;answer\n1+1;2\n", 2, "the row has problem;answer"),
    "deep": ("a.jsonl", b'{"problem": ' + b"[" * 200_000, 1, "nested too deeply"),
    "surrogate": ("a.jsonl", rb'{"problem": "a \ud83d", "answer": "1"}', 1, "surrogates"),
    "json": ("a.json", b'[{"problem": "a", "answer": "1"},\n\n {"problem": }]', 3, "Expecting"),
    "json list": ("a.json", b'[{"problem": "a", "answer": "1"}\n {}]', 2, "neither ','"),
    "nan": ("a.jsonl", b'{"problem": "a", "answer": NaN}', 1, "'answer' is missing"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_is_damaged_has_its_file_and_line(case, tmp_path):
    name, content, line, words = DAMAGED[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load(tmp_path / name)
    assert f"{name}:{line}: " in str(caught.value) and words in str(caught.value)


def test_a_damaged_parquet_file(tmp_path):
    path = tmp_path / "a.parquet"
    pd.DataFrame([ROWS[0]] * 1000).to_parquet(path)
    content = bytearray(path.read_bytes())
    content[20:60] = b"x" * 40
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.parquet:\d+: no readable Parquet"):
        load(path)


def test_many_rows_that_share_a_problem_make_a_short_error(tmp_path):
    rows = [{"problem": "Rewrite.", "answer": str(n)} for n in range(3000)]
    with pytest.raises(DataError) as caught:
        load(write(tmp_path / "a.jsonl", rows))
    assert "3000 faults" in str(caught.value) and "and 2997 more" in str(caught.value)
    assert len(str(caught.value)) < 10_000
