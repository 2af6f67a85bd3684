"""The evaluation loop on a tiny model: resuming, chunks, and what is written."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from rllib_distrl.engine.torch_engine import TorchEngine
from rllib_distrl.evaluation.evaluate import evaluate_model
from rllib_distrl.evaluation.result import SCHEMA, load_samples, sample_parts
from rllib_distrl.settings import EvalSettings
from tests.evaluation.tiny_evaluation import (
    ENV_ID,
    SETTINGS,
    FirstNumber,
    evaluate_tiny,
    tiny_model,
)

ROOT = Path(__file__).resolve().parents[2]
EXACT = [name for name in SCHEMA.names if name != "logp_sum"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole():
    """The evaluation in one go, in memory."""
    return evaluate_tiny()


def assert_same_samples(left: pd.DataFrame, right: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(
        left[EXACT].reset_index(drop=True), right[EXACT].reset_index(drop=True), check_dtype=False
    )
    assert np.allclose(left["logp_sum"], right["logp_sum"], atol=1e-4)


def test_samples_are_graded_by_the_task(whole):
    task = FirstNumber()
    frame = whole.frame
    assert len(frame) == 12 * 8 and frame["row"].nunique() == 12
    for sample in frame.itertuples():
        grade = task.grade(task.problem(sample.row), sample.completion)
        assert (grade.score, grade.status) == (sample.score, sample.status)
    assert 0 < frame["score"].mean() < 1
    assert set(frame["finish_reason"]) == {"stop", "length"}
    assert (frame["tokens"][frame["finish_reason"] == "length"] == 12).all()
    assert (frame["logp_sum"] < 0).all()


def test_summary_is_the_mean_over_problems(whole):
    scores = whole.frame["score"].to_numpy().reshape(12, 8)
    summary = whole.summary()
    assert set(summary) == {"avg@8", "pass@1", "pass@4"}
    assert summary["avg@8"] == summary["pass@1"] == pytest.approx(scores.mean())
    failing = [np.prod([(8 - c - j) / (8 - j) for j in range(4)]) for c in scores.sum(axis=1)]
    assert summary["pass@4"] == pytest.approx(1 - np.mean(failing))
    report = whole.report()
    low, high = report["intervals"]["pass@4"]
    assert low < summary["pass@4"] < high
    assert report["problems"] == 12 and report["samples"] == 8
    assert sum(report["status"].values()) == 96


def test_problems_are_distinct(whole):
    assert whole.frame.groupby("problem")["key"].first().is_unique
    everything = evaluate_tiny(settings=SETTINGS.changed(n=1, k=(1,), problems=20))
    assert sorted(everything.frame["key"], key=int) == [str(i) for i in range(20)]


def test_chunks_and_batches_do_not_change_the_samples(whole):
    other = evaluate_tiny(settings=SETTINGS.changed(chunk=5, max_batch_size=3))
    assert_same_samples(whole.frame, other.frame)


def test_another_seed_gives_other_samples(whole):
    other = evaluate_tiny(settings=SETTINGS.changed(seed=4))
    assert (other.frame["text_hash"] != whole.frame["text_hash"]).mean() > 0.5


def test_an_evaluation_killed_midway_resumes(tmp_path, whole):
    child = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("tiny_evaluation.py")), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "envs")])},
    )
    assert child.stdout is not None
    for line in child.stdout:
        if int(line) >= 6:
            break
    child.send_signal(signal.SIGKILL)
    assert child.wait(timeout=30) == -signal.SIGKILL
    child.stdout.close()
    before = {part: part.stat().st_mtime_ns for part in sample_parts(tmp_path)}
    finished = load_samples(tmp_path, ["problem"])["problem"].nunique()
    assert 6 <= finished < 12

    seen = []
    result = evaluate_tiny(tmp_path, on_progress=seen.append)
    assert seen[0].resumed == finished and seen[0].problems_done == finished
    assert seen[-1].problems_done == 12
    assert seen[-1].samples == (12 - finished) * 8  # Nothing that was finished is drawn again.
    assert all(part.stat().st_mtime_ns == time for part, time in before.items())
    assert_same_samples(load_samples(tmp_path), whole.frame)
    assert result.summary() == pytest.approx(whole.summary())
    assert result.report() == whole.report()


def test_a_half_written_part_is_ignored(tmp_path, whole):
    evaluate_tiny(tmp_path, settings=SETTINGS.changed(problems=4))
    (tmp_path / "samples" / "part-000004.tmp123").write_bytes(b"PAR1 half of it")
    seen = []
    evaluate_tiny(tmp_path, on_progress=seen.append)
    assert seen[0].resumed == 4
    assert_same_samples(load_samples(tmp_path), whole.frame)


def test_fewer_problems_can_be_read_from_a_larger_evaluation(tmp_path):
    evaluate_tiny(tmp_path)
    fewer = evaluate_tiny(tmp_path, settings=SETTINGS.changed(problems=5))
    assert fewer.problems == 5 and len(fewer.frame) == 40
    asked = set(fewer.frame["problem"])
    grams = {number: set() for number in asked}
    total = dict.fromkeys(asked, 0)
    for sample in load_samples(tmp_path).itertuples():
        if sample.problem in asked:
            ids = list(sample.token_ids)
            grams[sample.problem].update(zip(ids, ids[1:], ids[2:], strict=False))
            total[sample.problem] += max(len(ids) - 2, 0)
    shares = [len(grams[number]) / total[number] for number in asked]
    assert fewer.report()["dist-3"] == pytest.approx(np.mean(shares))


def test_another_evaluation_in_the_folder_is_refused_or_overwritten(tmp_path):
    small = SETTINGS.changed(problems=4)
    evaluate_tiny(tmp_path, settings=small)
    hot = small.changed(temperature=2.0)
    with pytest.raises(ValueError, match=r"temperature: there 1\.0, now 2\.0"):
        evaluate_tiny(tmp_path, settings=hot)
    seen = []
    evaluate_tiny(tmp_path, settings=hot, overwrite=True, on_progress=seen.append)
    assert seen[0].resumed == 0
    evaluate_tiny(tmp_path, settings=hot, overwrite=True, on_progress=seen.append)
    assert seen[-1].resumed == 4  # The same evaluation is continued, not forgotten.


def test_changed_data_are_noticed(tmp_path):
    class Shifted(FirstNumber):
        def problem(self, row):
            return super().problem((row + 7) % 40)

    evaluate_tiny(tmp_path)
    with pytest.raises(ValueError, match="samples of other data: problem 0"):
        evaluate_tiny(tmp_path, task=Shifted())
    fresh = evaluate_tiny(tmp_path, task=Shifted(), overwrite=True)
    assert fresh.frame["key"].iloc[0] == "7" and len(fresh.frame) == 96


class CountingEngine(TorchEngine):
    """Counts the rows that wait or run at once, and those of each step."""

    asked: list[int]

    def stream(self, requests, params):
        self.asked.append(len(requests))
        return super().stream(requests, params)


def counting_engine(max_batch_size):
    engine = CountingEngine(tiny_model().config, [1], max_batch_size=max_batch_size)
    engine.asked = []
    return engine


def test_the_engine_gets_all_rows_that_fit_into_memory_however_few_samples_a_problem_has(
    monkeypatch,
):
    few = SETTINGS.changed(n=2, k=(1,))
    engine = counting_engine(8)
    whole = evaluate_tiny(settings=few, engine=engine)
    assert engine.asked == [24]  # Not one part after another.
    monkeypatch.setattr("rllib_distrl.evaluation.sampling.MOST_TOKENS", 5 * 2 * 12)
    engine = counting_engine(8)
    bounded = evaluate_tiny(settings=few, engine=engine)
    assert engine.asked == [10, 10, 4]  # Five problems of two samples of twelve tokens, …
    assert_same_samples(whole.frame, bounded.frame)


def test_an_engine_that_answers_all_at_once_gives_the_same_samples(whole):
    class Batch:
        """Without `stream`."""

        def __init__(self):
            self._engine = TorchEngine(tiny_model().config, [1])
            self.generate, self.load_weights = self._engine.generate, self._engine.load_weights

    seen = []
    other = evaluate_tiny(engine=Batch(), on_progress=seen.append)
    assert_same_samples(whole.frame, other.frame)
    assert seen[-1].samples == 96


def test_parts_hold_whole_problems_and_are_let_go(tmp_path):
    result = evaluate_tiny(tmp_path)
    sizes = [len(pd.read_parquet(part)) for part in sample_parts(tmp_path)]
    assert sizes == [16] * 6  # Two problems of eight samples.
    assert not {"prompt", "completion"} & set(result.frame.columns)
    assert EvalSettings(n=4).problems_per_part == 64  # A batch of rows.
    assert EvalSettings(n=1024).problems_per_part == 1


def test_what_is_finished_is_kept_when_a_signal_ends_it(tmp_path, whole):
    def stop(progress):
        if progress.samples == 60:
            raise KeyboardInterrupt

    large = SETTINGS.changed(chunk=100, max_batch_size=8)
    with pytest.raises(KeyboardInterrupt):
        evaluate_tiny(tmp_path, settings=large, on_progress=stop)
    kept = load_samples(tmp_path)
    assert 5 <= kept["problem"].nunique() <= 7
    assert_same_samples(kept, whole.frame[: len(kept)])
    seen = []
    evaluate_tiny(tmp_path, settings=large, on_progress=seen.append)
    assert seen[0].resumed == kept["problem"].nunique()
    assert_same_samples(load_samples(tmp_path), whole.frame)


def test_files_are_complete(tmp_path, whole):
    on_disk = evaluate_tiny(tmp_path / "out")
    for result in (whole, on_disk):
        result.to_parquet(tmp_path / "samples.parquet")
        assert_same_samples(pd.read_parquet(tmp_path / "samples.parquet"), whole.frame)
        result.to_json(tmp_path / "eval.json")
        content = json.loads((tmp_path / "eval.json").read_text())
        assert content["pass@4"] == pytest.approx(whole.summary()["pass@4"])
        assert content["evaluated"]["env_id"] == ENV_ID
        assert content["evaluated"]["max_tokens"] == 12


def test_the_environment_limits_completions_where_nothing_is_set():
    result = evaluate_tiny(settings=SETTINGS.changed(problems=2))
    assert result.info["max_tokens"] == FirstNumber.max_completion_tokens


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 0}, "eval.n is 0; it must be >= 1"),
        ({"k": (9,)}, r"pass@9 needs 1 <= k <= n and eval.n is 8"),
        ({"split": "dev"}, "eval.split is 'dev'"),
        ({"temperature": 0.0}, r"eval.temperature is 0.0; it must be in \[0.001, 1000.0\]"),
        ({"top_p": 1.5}, "eval.top_p is 1.5"),
        ({"greedy": True}, "Set n = 1"),
        ({"dtype": "float64"}, "eval.dtype is"),
        ({"distinct_by": "tokens"}, "eval.distinct_by is"),
        ({"temprature": 1.0}, "nearest one is 'temperature'"),
        ({"max_tokens": 63}, "set max_tokens to at most"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        evaluate_tiny(settings=SETTINGS.changed(**change))


def test_an_unknown_engine_is_refused():
    with pytest.raises(ValueError, match="engine 'warp' is unknown"):
        evaluate_tiny(engine="warp")


def test_countdown_is_evaluated_on_its_test_split():
    settings = EvalSettings(problems=3, n=2, k=(1,), max_tokens=16)
    result = evaluate_model(tiny_model(), ENV_ID, {}, settings)
    from distrl_envs.task import split_of

    assert result.problems == 3
    assert all(split_of(key) == "test" for key in result.frame["key"])


def test_progress_counts_samples_as_they_end():
    seen = []
    evaluate_tiny(on_progress=seen.append)
    assert [p.samples_done for p in seen if p.samples_in_all == 96] == sorted(
        [*range(97), *[p.samples for a, p in pairwise(seen) if p.problems_done > a.problems_done]]
    )
    assert [p.problems_done for a, p in pairwise(seen) if p.problems_done > a.problems_done] == [
        2, 4, 6, 8, 10, 12,
    ]  # fmt: skip
    assert seen[0].seconds_left is None and seen[-1].seconds_left == 0.0
    quarter = next(p for p in seen if p.samples_done == 24)
    assert quarter.seconds_left == pytest.approx(3 * quarter.seconds)


def test_a_model_in_a_folder_brings_its_tokenizer(tmp_path):
    from distrl_envs.tokenizers import small_tokenizer

    settings = EvalSettings(problems=3, n=2, k=(1,), max_tokens=16)
    tiny_model().save_pretrained(tmp_path)
    small_tokenizer().save_pretrained(tmp_path)
    loaded = evaluate_model(tiny_model(), ENV_ID, {}, settings)
    by_name = evaluate_model(str(tmp_path), ENV_ID, {}, settings)
    assert_same_samples(by_name.frame, loaded.frame)
    assert by_name.info["weights"] == loaded.info["weights"]


def test_training_problems_are_asked_only_where_that_is_said():
    class Training(FirstNumber):
        split = "train"

    with pytest.raises(ValueError, match="serves the split 'train', but the evaluation asks for"):
        evaluate_tiny(task=Training())
    assert evaluate_tiny(task=Training(), settings=SETTINGS.changed(split="train")).problems == 12


def test_a_corrected_gold_is_graded_anew(tmp_path, capsys):
    class Corrected(FirstNumber):
        def problem(self, row):
            problem = super().problem(row)
            return replace(problem, data={"low": not problem.data["low"]})

    first = evaluate_tiny(tmp_path).frame
    seen = []
    second = evaluate_tiny(tmp_path, task=Corrected(), on_progress=seen.append).frame
    assert seen[-1].samples == 0  # Nothing is drawn again.
    answered = (first["status"] != "no_answer").to_numpy()
    flipped = np.where(answered, 1.0 - first["score"].to_numpy(), 0.0)
    assert second["score"].tolist() == flipped.tolist()
    assert "Graded 96 stored samples anew" in capsys.readouterr().err
    evaluate_tiny(tmp_path, task=Corrected())
    assert "anew" not in capsys.readouterr().err
