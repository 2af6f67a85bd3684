"""The whole of `distrl eval` but its command line: data by name, files and plot on disk."""

import json

import pytest

from rllib_distrl.evaluation.evaluate import run_evaluation
from rllib_distrl.evaluation.result import load_samples
from tests.evaluation.tiny_evaluation import ENV_ID, tiny_model

SMALL = {"problems": 3, "n": 4, "max_tokens": 16}


def test_numbers_samples_and_plot_are_written(tmp_path):
    first = run_evaluation(tiny_model(), ENV_ID, SMALL, tmp_path / "first")
    content = json.loads((tmp_path / "first" / "eval.json").read_text())
    assert content["problems"] == 3 and content["samples"] == 4
    assert {"avg@4", "pass@1", "pass@4", "maj@4", "truncated"} <= content.keys()
    assert content["intervals"].keys() >= first.summary().keys()
    assert len(load_samples(tmp_path / "first")) == 12
    assert (tmp_path / "first" / "pass_at_k.png").stat().st_size > 10_000


def test_other_evaluations_are_drawn_beside_it(tmp_path):
    run_evaluation(tiny_model(), ENV_ID, SMALL, tmp_path / "first")
    settings = {**SMALL, "temperature": 2.0}
    run_evaluation(
        tiny_model(), ENV_ID, settings, tmp_path / "second", compare=[tmp_path / "first"]
    )
    alone = (tmp_path / "first" / "pass_at_k.png").read_bytes()
    assert (tmp_path / "second" / "pass_at_k.png").read_bytes() != alone
    with pytest.raises(ValueError, match="holds no samples"):
        run_evaluation(tiny_model(), ENV_ID, SMALL, compare=[tmp_path / "third"])


def test_arguments_of_the_environment_pass_through():
    result = run_evaluation(tiny_model(), ENV_ID, SMALL, env_config={"task_config": {"numbers": 3}})
    assert all(len(key.split("|")[0].split()) == 3 for key in result.frame["key"])


def test_an_unknown_environment_is_refused():
    with pytest.raises(ValueError, match="there is no environment 'distrl/Nothing-v0'"):
        run_evaluation(tiny_model(), "distrl/Nothing-v0", SMALL)
    with pytest.raises(ValueError, match="there is no environment 'no_such_module:x/Y-v0'"):
        run_evaluation(tiny_model(), "no_such_module:x/Y-v0", SMALL)
