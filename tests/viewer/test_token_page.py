import base64
import gzip
import json
import re

import numpy as np
import pytest

from rllib_distrl.method.token_table import read_token_table
from rllib_distrl.viewer.token_page import blocks, table_of_samples, write_viewer
from tests.viewer.tables import HOSTILE, make_table


def unpack(text):
    return gzip.decompress(base64.b64decode(text))


def decode_block(text):
    data = unpack(text)
    size = int.from_bytes(data[:4], "little")
    header, offset = json.loads(data[4 : 4 + size]), 4 + size
    assert offset % 4 == 0
    columns = {}
    for name, kind, count in header["arrays"]:
        columns[name] = np.frombuffer(data, kind, count, offset)
        offset += columns[name].nbytes
    assert offset == len(data)
    return header, columns


def test_a_block_holds_what_the_table_does():
    table = make_table(completions=70, tokens=3)
    packed = list(blocks(table))
    assert [(rows.start, rows.stop) for rows, _ in packed] == [(0, 64), (64, 70)]
    header, columns = decode_block(packed[1][1])
    last = table.completions.iloc[-1]
    assert header["lengths"] == [3] * 6
    assert header["answers"] == [None, None, "answer 66", None, None, "answer 69"]
    assert [header["texts"][i] for i in columns["text"][-3:]] == list(last["text"])
    assert [header["texts"][i] for i in columns["top"][-3:]] == ["first", "second", "third"]
    assert columns["token"][-3:].tolist() == last["token"].tolist()
    assert columns["quantiles"].dtype == np.float16
    np.testing.assert_allclose(columns["quantiles"][-12:], last["quantiles"], rtol=1e-3)
    np.testing.assert_allclose(columns["logp"][-3:], last["logp"], rtol=1e-3)


def test_blocks_stay_small():
    texts = [["a" * 300_000] for _ in range(4)]
    cuts = [(rows.start, rows.stop) for rows, _ in blocks(make_table(completions=4, texts=texts))]
    assert cuts == [(0, 1), (1, 2), (2, 3), (3, 4)]


def test_no_text_of_a_completion_stands_in_the_page(tmp_path):
    texts = [[text] for text in HOSTILE[:5]]
    table = make_table(completions=5, texts=texts)
    page = write_viewer(table, tmp_path / "view.html", title="<script>x</script>").read_text()
    assert "hacked" not in page
    assert page.count("<script") == 3  # index, one block, the page's own
    assert "<title>&lt;script&gt;x&lt;/script&gt;</title>" in page
    assert not re.search(r"(src|href)=|https?://|innerHTML|insertAdjacentHTML", page)


def test_parquet_keeps_the_table(tmp_path):
    table = make_table()
    again = read_token_table(table.to_parquet(tmp_path / "tokens.parquet"))
    assert again.info == table.info
    assert (again.n_quantiles, again.n_top) == (4, 3)
    tokens = again.tokens
    assert len(tokens) == 30
    row = tokens.iloc[7]  # completion 1, token 2
    assert (row["row"], row["sample"], row["t"], row["token"], row["text"]) == (
        10,
        1,
        2,
        102,
        "c1t2 ",
    )
    expected = table.completions["quantiles"][1].reshape(5, 4)[2]
    np.testing.assert_array_equal(row["quantiles"], expected.astype(np.float64))
    assert row["spread"] == pytest.approx(expected.std(), rel=1e-5)
    assert row["probability"] == pytest.approx(np.exp(-0.25 - 1 / 64), rel=1e-5)
    assert row["logp_ratio"] == pytest.approx(np.exp(0.125))
    assert row["top"] == [("first", 0.5), ("second", 0.25), ("third", 0.125)]


def test_a_missing_column_says_why():
    table = make_table()
    bare = type(table)(
        table.completions.drop(columns="value"), {"missing": {"value": "GRPO has no critic."}}
    )
    with pytest.raises(ValueError, match=r"GRPO has no critic\."):
        bare.numbers("value")


def test_replies_are_kept_and_tables_without_them_still_open(tmp_path):
    replies = [[(2, "\ntoo low\n"), (4, "")], [], [(5, "end")]]
    table = make_table(completions=3, replies=replies)
    again = read_token_table(table.to_parquet(tmp_path / "tokens.parquet"))
    assert again.replies == replies
    [(_, block)] = blocks(again)
    header, _ = decode_block(block)
    assert header["replies"] == [[list(reply) for reply in some] for some in replies]
    old = read_token_table(make_table(completions=3).to_parquet(tmp_path / "old.parquet"))
    assert old.replies == [[], [], []]
    [(_, block)] = blocks(old)
    assert decode_block(block)[0]["replies"] is None


def test_replies_are_found_in_the_transcripts_of_an_evaluation(tmp_path):
    names = ["problem", "sample", "prompt", "completion", "score", "status", "finish_reason"]
    frame = make_table(completions=3).completions[names]
    frame["completion"] = ["3 4\n[user] too low\n5\n[tool] [user] x\n", "one word", "6\n[user] no"]
    told = {"at": 1, "ids": [1], "reward": 0.0, "status": "ok", "over": False, "finish": None}
    frame["replies"] = [
        [
            {**told, "role": "user", "text": "too low"},
            {**told, "role": "tool", "text": "[user] x"},
            {**told, "role": "user", "text": ""},
        ],
        [],
        [{**told, "role": "user", "text": "no"}],
    ]
    frame.to_parquet(tmp_path / "samples.parquet")
    table = table_of_samples(tmp_path / "samples.parquet")
    assert table.completions["text"].tolist() == [["3", " 4", "5"], ["one", " word"], ["6"]]
    assert table.lengths.tolist() == [3, 2, 1]
    assert table.replies == [
        [(2, "\n[user] too low\n"), (3, "\n[tool] [user] x\n")],
        [],
        [(1, "\n[user] no")],
    ]
    frame["replies"] = None  # Of a task that does not reply.
    frame.to_parquet(tmp_path / "samples.parquet")
    table = table_of_samples(tmp_path / "samples.parquet")
    assert table.replies == [[], [], []]
    assert table.completions["text"][2] == ["6", "\n[user]", " no"]


def test_other_files_are_refused(tmp_path):
    table = make_table()
    with pytest.raises(ValueError, match="no file"):
        table_of_samples(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("words")
    with pytest.raises(ValueError, match="not a Parquet file"):
        table_of_samples(tmp_path / "text.parquet")
    table.completions[["problem", "prompt"]].to_parquet(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="no column sample, completion"):
        table_of_samples(tmp_path / "other.parquet")


def test_graded_completions_are_read_by_word(tmp_path):
    names = ["problem", "sample", "prompt", "completion", "score", "status", "finish_reason"]
    make_table().completions[names].to_parquet(tmp_path / "after.parquet")
    table = table_of_samples(tmp_path / "after.parquet")
    assert table.completions["text"][0] == ["c0t0", " c0t1", " c0t2", " c0t3", " c0t4", " "]
    assert "".join(table.completions["text"][0]) == table.completions["completion"][0]
    write_viewer(table, tmp_path / "view.html", title="words")
