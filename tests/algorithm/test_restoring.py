"""Checkpoints by RLlib's own means: any file system, a new process, Tune."""

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.fs
import pytest
import torch

from rllib_distrl.algorithm.distrl import DistRL
from rllib_distrl.algorithm.export import policy_state
from rllib_distrl.algorithm.restoring import (
    SETTINGS,
    check_settings,
    module_settings,
    saved_settings,
)
from tests.helpers import distrl_config, with_model_config

pytestmark = pytest.mark.usefixtures("ray_session")
CLOCKS = ("_time", "throughput", "timer")


def small_config(runners=0):
    """Draws from every source of randomness: sampling, shuffling, the critic's targets."""
    config = distrl_config(
        prompts=4, generations=2, minibatch_size=4, num_epochs=2,
        target="sample_replacement", critic_lambda=0.9,
    )  # fmt: skip
    return config.env_runners(num_env_runners=runners)


def learner_state(algo):
    """Weights of policy and critic, moments, versions: everything the learner has, by name."""
    flat = {}

    def collect(node, name):
        if isinstance(node, dict):
            for key, value in node.items():
                collect(value, f"{name}/{key}")
        elif hasattr(node, "shape"):
            flat[name] = torch.as_tensor(node).clone()
        elif isinstance(node, (bool, int, float, str)):
            flat[name] = node

    state = algo.learner_group.get_state()["learner"]
    del state["metrics_logger"]
    collect(state, "learner")
    flat["prompts"] = algo.prompt_sampler.cursor
    flat["iteration"] = algo.iteration
    return flat


def learned(result):
    """What an iteration reported about learning and data, without clocks."""
    found = {**result["learners"]["default_policy"]}
    for key in ("episode_return_mean", "num_env_steps_sampled_lifetime", "num_episodes_lifetime"):
        found[key] = result["env_runners"][key]
    found["iteration"] = result["training_iteration"]
    return {k: float(v) for k, v in found.items() if not any(word in k for word in CLOCKS)}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        same = torch.equal(value, other[name]) if torch.is_tensor(value) else value == other[name]
        assert same, (name, value, other[name])


@pytest.fixture
def algo():
    algo = small_config().build_algo()
    yield algo
    algo.stop()


@pytest.mark.parametrize("place", ["folder", "uri", "filesystem"])
def test_save_and_restore_anywhere(algo, tmp_path, place):
    algo.train()
    saved = learner_state(algo)
    path, options = {
        "folder": (str(tmp_path / "c"), {}),
        "uri": ((tmp_path / "c").as_uri(), {}),
        "filesystem": ("c", {"filesystem": pyarrow.fs.SubTreeFileSystem(
            str(tmp_path), pyarrow.fs.LocalFileSystem())}),
    }[place]  # fmt: skip
    algo.save_to_path(path, **options)
    algo.train()
    algo.restore_from_path(path, **options)
    assert_equal(learner_state(algo), saved)


@pytest.mark.parametrize("kind", [str, Path])
def test_a_checkpoint_may_be_named_from_the_working_directory(algo, tmp_path, monkeypatch, kind):
    algo.save_to_path(str(tmp_path / "c"))
    saved = learner_state(algo)
    algo.train()
    monkeypatch.chdir(tmp_path)
    algo.restore_from_path(kind("c"))
    assert_equal(learner_state(algo), saved)


def class_of_another_version(module, name):
    """A pickle that names a class."""
    strings = [b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name)]
    return b"\x80\x04" + b"".join(strings) + b"\x93."


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("algorithm_state.pkl", b"abc"),
        ("algorithm_state.pkl", b""),
        ("algorithm_state.pkl", pickle.dumps([1])),
        ("algorithm_state.pkl", class_of_another_version("rllib_distrl.gone", "State")),
        ("algorithm_state.pkl", class_of_another_version("rllib_distrl.settings", "Gone")),
        (
            "learner_group/learner/state.pkl",
            class_of_another_version("rllib_distrl.settings", "Gone"),
        ),
    ],
)
def test_what_cannot_be_read_is_said_with_what_to_do(algo, tmp_path, file, content):
    algo.save_to_path(str(tmp_path / "c"))
    assert (tmp_path / "c" / file).exists()
    (tmp_path / "c" / file).write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint .*c cannot be read \(.*take another"):
        algo.restore_from_path(tmp_path / "c")
    algo.train()


def test_from_checkpoint_goes_on(algo, tmp_path):
    algo.train()
    path = algo.save_to_path(str(tmp_path / "c"))
    other = DistRL.from_checkpoint(path)
    try:
        assert_equal(learner_state(other), learner_state(algo))
        assert learned(other.train()) == learned(algo.train())
        assert_equal(learner_state(other), learner_state(algo))
    finally:
        other.stop()


def test_another_configuration_is_refused_with_the_difference(algo, tmp_path):
    path = algo.save_to_path(str(tmp_path / "c"))
    other = distrl_config(n_quantiles=8, critic="shared", lr=0.5).build_algo()
    try:
        before = policy_state(other)
        with pytest.raises(ValueError) as caught:
            other.restore_from_path(path)
        message = str(caught.value)
        assert "critic: 'separate' in the checkpoint, 'shared' now" in message
        assert "n_quantiles: 16 in the checkpoint, 8 now" in message
        assert "lr" not in message
        for name, weight in policy_state(other).items():
            assert torch.equal(weight, before[name])
    finally:
        other.stop()


LORA = {"r": 4, "alpha": 8, "targets": ["q_proj", "v_proj"]}


def with_lora(lora, **training):
    config = distrl_config(**training)
    return with_model_config(config, lora=lora)


@pytest.mark.parametrize(
    ("now", "difference"),
    [
        (with_lora({**LORA, "targets": ["v_proj", "q_proj"]}), None),
        (with_lora({**LORA, "alpha": 16}), r"lora: .*'alpha': 8.* in the checkpoint, .*16.* now"),
        (with_lora({**LORA, "targets": ["q_proj", "k_proj"]}), "lora: "),
        (distrl_config(), r"lora: .* in the checkpoint, None now"),
        (with_lora(LORA, bonus_stat="ensemble", ensemble={"size": 3}), "ensemble: .*'size': 4"),
        (with_lora(LORA, bonus_stat="ltv"), None),
        (
            with_lora(LORA, bonus_stat="ltv", critic_observation="state"),
            "critic_observation: 'none' in the checkpoint, 'state' now",
        ),
    ],
)
def test_a_checkpoint_of_other_adapters_or_ensembles_is_refused(now, difference, tmp_path):
    """By the settings alone: they are read before anything is loaded."""
    pytest.importorskip("peft")
    then = with_lora(LORA, bonus_stat="ensemble", ensemble={"size": 4})
    for config in (then, now):
        config.validate()
    (tmp_path / "state.pkl").write_bytes(pickle.dumps({SETTINGS: module_settings(then)}))
    saved = saved_settings(tmp_path, pyarrow.fs.LocalFileSystem(), "state")
    if difference is None:
        check_settings(now, saved, "The checkpoint")
        return
    with pytest.raises(ValueError, match=difference):
        check_settings(now, saved, "The checkpoint")


def test_a_models_folder_may_be_named_from_elsewhere(tmp_path, monkeypatch):
    """Recipes name it absolute, which those of earlier runs did not."""
    for name in ("mine", "another"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    now = distrl_config(model=str(tmp_path / "mine"))
    check_settings(now, {"model": "./mine"}, "The checkpoint")
    for other in ("./another", "./gone"):
        with pytest.raises(ValueError, match=f"model: '{other}' in the checkpoint"):
            check_settings(now, {"model": other}, "The checkpoint")


def test_settings_of_another_version_are_given_anew(algo, tmp_path):
    """RLlib falls back to the class alone where it cannot read them."""
    path = algo.save_to_path(str(tmp_path / "c"))
    gone = b"crllib_distrl.no_such_settings\nSettings\n."
    (tmp_path / "c" / "class_and_ctor_args.pkl").write_bytes(gone)
    with pytest.raises(ValueError, match=r"of another version.*from_checkpoint\(PATH, config="):
        DistRL.from_checkpoint(path)
    other = DistRL.from_checkpoint(path, config=algo.config.copy(copy_frozen=False))
    try:
        assert other.iteration == algo.iteration
    finally:
        other.stop()


def test_a_models_folder_may_have_moved(tmp_path):
    """Its files say which it is: those of a checkpoint, not its place."""
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    (old / "config.json").write_text("{}")
    (old / "README.md").write_text("before")
    saved = module_settings(distrl_config(model=str(old)))
    old.rename(new)
    (new / "README.md").write_text("after")
    now = distrl_config(model=str(new))
    check_settings(now, saved, "The checkpoint")
    (new / "config.json").write_text('{"vocab_size": 1}')
    with pytest.raises(ValueError, match=f"model: '{old}' in the checkpoint, '{new}' now"):
        check_settings(now, saved, "The checkpoint")


def test_a_learner_that_was_not_restored_is_an_error(algo, tmp_path):
    path = algo.save_to_path(str(tmp_path / "c"))
    algo.train()
    shutil.rmtree(tmp_path / "c" / "learner_group")
    with pytest.raises(RuntimeError, match="did not take over the checkpoint"):
        algo.restore_from_path(path)


PROGRAM = """
import pickle, sys
import ray
from tests.algorithm.test_restoring import learned, learner_state, small_config
OPTIONS = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
ray.init(address="local", num_cpus=3, **OPTIONS)
algo = small_config(int(sys.argv[2])).build_algo()
algo.restore_from_path(sys.argv[1])
states = [learner_state(algo)]
results = [learned(algo.train()) for _ in range(5)]
states.append(learner_state(algo))
algo.stop()
with open(sys.argv[3], "wb") as stream:
    pickle.dump((states, results), stream)
"""


@pytest.mark.slow
@pytest.mark.parametrize("runners", [0, 2])
def test_a_new_process_goes_on_to_the_last_bit(tmp_path, runners):
    """Also with runners: what is sampled is a function of seed, row, sample and visit."""
    algo = small_config(runners).build_algo()
    try:
        for _ in range(3):
            algo.train()
        path = algo.save_to_path(str(tmp_path / "c"))
        states = [learner_state(algo)]
        results = [learned(algo.train()) for _ in range(5)]
        states.append(learner_state(algo))
    finally:
        algo.stop()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(["", *map(os.path.abspath, sys.path)]),
    }
    subprocess.run(
        [sys.executable, "-c", PROGRAM, path, str(runners), str(tmp_path / "found")],
        check=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    found = pickle.loads((tmp_path / "found").read_bytes())
    assert_equal(states[0], found[0][0])
    assert [result["iteration"] for result in found[1]] == [4, 5, 6, 7, 8]
    for expected, result in zip(results, found[1], strict=True):
        assert result == expected
    assert_equal(states[1], found[0][1])


LAST = 20
TUNE = """
import sys
import ray
from ray import tune
from rllib_distrl.algorithm.distrl import DistRL
from tests.algorithm.test_restoring import small_config
OPTIONS = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
ray.init(address="local", num_cpus=3, **OPTIONS)
tune.Tuner(
    DistRL,
    param_space=small_config(),
    run_config=tune.RunConfig(
        name="tried",
        storage_path=sys.argv[1],
        stop={"training_iteration": 20},
        checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=1),
        verbose=0,
    ),
).fit()
"""


@pytest.mark.slow
def test_tune_restores_an_experiment_that_was_killed(tmp_path):
    from ray import tune

    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(["", *map(os.path.abspath, sys.path)]),
    }
    process = subprocess.Popen(
        [sys.executable, "-c", TUNE, str(tmp_path)],
        env=environment,
        cwd=Path(__file__).parents[2],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        give_up = time.monotonic() + 120
        while len(list(tmp_path.glob("tried/*/checkpoint_*"))) < 3:
            assert process.poll() is None and time.monotonic() < give_up
            time.sleep(0.05)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert len(list(tmp_path.glob("tried/*/checkpoint_*"))) < LAST
    tuner = tune.Tuner.restore(
        str(tmp_path / "tried"), trainable=DistRL, param_space=small_config(), resume_errored=True
    )
    (result,) = tuner.fit()
    assert result.error is None
    assert result.metrics["training_iteration"] == LAST
    straight = small_config().build_algo()
    try:
        for _ in range(LAST):
            expected = straight.train()
    finally:
        straight.stop()
    for key in ("total_loss", "vf_loss", "entropy"):
        assert result.metrics["learners"]["default_policy"][key] == learned(expected)[key]


def _iterations(folder):
    import json

    (file,) = folder.glob("tried/*/result.json")
    return [json.loads(line)["training_iteration"] for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_tune_goes_on_after_a_trial_has_died(tmp_path):
    from ray import tune

    marker = tmp_path / "died"

    def die_once(result, **kwargs):
        if result["training_iteration"] == 3 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    config = small_config().callbacks(on_train_result=die_once)
    (result,) = tune.Tuner(
        DistRL,
        param_space=config,
        run_config=tune.RunConfig(
            name="tried",
            storage_path=str(tmp_path),
            stop={"training_iteration": 5},
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=1),
            failure_config=tune.FailureConfig(max_failures=1),
            verbose=0,
        ),
    ).fit()
    assert marker.exists()
    assert result.error is None
    assert _iterations(tmp_path) == [1, 2, 3, 4, 5]
    straight = small_config().build_algo()
    try:
        for _ in range(5):
            expected = learned(straight.train())
    finally:
        straight.stop()
    for key in ("total_loss", "vf_loss", "entropy", "num_env_steps_sampled_lifetime"):
        found = {**result.metrics["learners"]["default_policy"], **result.metrics["env_runners"]}
        assert found[key] == expected[key]
