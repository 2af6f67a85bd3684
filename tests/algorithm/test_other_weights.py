"""States and weights of other algorithms by every way of RLlib; errors of runners and callbacks."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distrl_envs.tokenizers import decode_completion, render_prompt
from rllib_distrl import RolloutSettings, wire_language_model
from rllib_distrl.algorithm.cluster import check_cluster
from rllib_distrl.algorithm.registry import algorithm_config
from rllib_distrl.cli.session import cpus_needed
from rllib_distrl.rollout.groups import SamplingError
from tests.helpers import COUNTDOWN, TINY, distrl_config

pytestmark = pytest.mark.usefixtures("ray_session")
MODULE = "learner_group/learner/rl_module/default_policy"


def weights(algo):
    return algo.learner_group.get_weights()["default_policy"]


def assert_same_weights(one, other):
    assert weights(one).keys() == weights(other).keys()
    for name, value in weights(one).items():
        # Matrix products may round by where their operands lie in memory (MKL): a bit or two.
        np.testing.assert_allclose(value, weights(other)[name], rtol=0, atol=2e-6, err_msg=name)


@pytest.fixture(scope="module")
def donor(ray_session, tmp_path_factory):
    algo = distrl_config().build_algo()
    algo.train()
    algo.path = algo.save_to_path(str(tmp_path_factory.mktemp("donor")))
    yield algo
    algo.stop()


def held(algo):
    """Hash of what the local runner samples with."""
    return algo.env_runner.held_weights().hash


def test_a_state_goes_on_where_it_was_taken(donor, build):
    """Whoever continues samples and learns the same."""
    restored = build(distrl_config())
    restored.restore_from_path(donor.path)
    taken = build(distrl_config().env_runners(num_env_runners=1))
    taken.train()
    taken.train()  # The state is older than these weights.
    taken.set_state(restored.get_state())
    results = [algo.train() for algo in (restored, taken)]
    assert [result["training_iteration"] for result in results] == [2, 2]
    assert_same_weights(restored, taken)
    with pytest.raises(ValueError, match=r"n_quantiles: 16 in the checkpoint, 4 now"):
        build(distrl_config(n_quantiles=4)).set_state(donor.get_state())


def test_a_state_of_other_prompts_changes_nothing(donor, build):
    algo = build(
        distrl_config(prompt_sampler={"name": "variance_mix", "pool": 6}).debugging(seed=7)
    )
    before = weights(algo)
    with pytest.raises(ValueError, match="it is another prompt_sampler's"):
        algo.set_state(donor.get_state())
    for name, value in weights(algo).items():
        np.testing.assert_array_equal(value, before[name])
    assert algo.iteration == 0


@pytest.mark.parametrize("way", ["set_weights", "learner_group", "module", "component"])
def test_weights_alone_reach_the_runners(donor, build, way):
    algo = build(distrl_config().debugging(seed=7))
    algo.train()
    given = donor.get_weights()
    if way == "set_weights":
        algo.set_weights(given)
    elif way == "learner_group":
        algo.learner_group.set_state({"learner": {"rl_module": given}})
    elif way == "module":
        algo.learner_group.foreach_learner(lambda learner: learner.module.set_state(given))
    else:
        algo.restore_from_path(f"{donor.path}/{MODULE}", component=MODULE)
    assert_same_weights(algo, donor)
    result = algo.train()
    mismatch = result["learners"]["default_policy"]["logp_mismatch_max"]
    assert mismatch == pytest.approx(1.0, abs=1e-4)
    assert held(algo) != held(donor)  # It has learned since.


@pytest.mark.parametrize("component", [None, MODULE])
def test_a_callback_may_restore_when_the_algorithm_begins(donor, build, component):
    path = donor.path if component is None else f"{donor.path}/{component}"

    def restore(*, algorithm, **kwargs):
        algorithm.restore_from_path(path, component=component)

    algo = build(distrl_config().callbacks(on_algorithm_init=restore))
    assert_same_weights(algo, donor)
    assert held(algo) == held(donor)
    assert algo.iteration == (1 if component is None else 0)
    assert algo.train()["training_iteration"] == algo.iteration


def test_policy_and_module_write_what_the_runner_writes(donor, tmp_path):
    """The snippets of docs/python.md, greedy."""
    donor.export_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    task = donor.env_runner.token_env.unwrapped.task
    for episode in donor.env_runner.sample(num_episodes=3, explore=False):
        ids = render_prompt(tokenizer, task.problem(episode.infos[0]["row"]).prompt)
        out = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, len(ids) :]
        text = decode_completion(tokenizer, out.tolist(), {tokenizer.eos_token_id})
        assert text == episode.infos[-1]["completion"]
        module, written = donor.get_module(), []
        while len(written) < 24 and tokenizer.eos_token_id not in written:
            answer = module.forward_inference({"obs": [ids + written]})
            written.append(int(answer["actions"][0]))
        assert decode_completion(tokenizer, written, {tokenizer.eos_token_id}) == text


def test_more_actors_than_cpus_are_refused():
    words = "5 for env runners: that many CPUs were asked for, and the cluster has 2"
    with pytest.raises(ValueError, match=words):
        distrl_config().env_runners(num_env_runners=5).build_algo()
    mixed = distrl_config().env_runners(num_env_runners=1).learners(num_learners=1)
    mixed.evaluation(evaluation_interval=1, evaluation_num_env_runners=1)
    with pytest.raises(ValueError, match="1 for learners and 1 for env runners and 1 for eval"):
        mixed.build_algo()


def test_so_are_those_of_a_stock_algorithm():
    """RLlib starts and awaits actors before any callback: a class between asks the cluster."""
    stock = algorithm_config("IMPALA").environment(COUNTDOWN)
    stock.env_runners(num_env_runners=1).training(train_batch_size_per_learner=64)
    wire_language_model(stock, TINY, RolloutSettings(max_completion_tokens=24))
    stock.learners(num_learners=1, num_aggregator_actors_per_learner=1)
    assert cpus_needed(stock) == 3
    with pytest.raises(ValueError, match="1 for learners and 1 for aggregators and 1 for env runn"):
        stock.build_algo()
    stock.learners(num_learners=0)  # An aggregator remains.
    assert cpus_needed(stock) == 2
    check_cluster(stock)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["DistRL", "PPO"])
def test_nor_are_they_waited_for_where_ray_does_not_run_yet(algorithm):
    """`ray.cluster_resources` raises before `ray.init`, which RLlib itself does not ask for."""
    code = (
        "from rllib_distrl import RolloutSettings, wire_language_model\n"
        "from rllib_distrl.algorithm.registry import algorithm_config\n"
        f"config = algorithm_config({algorithm!r}).environment({COUNTDOWN!r})\n"
        "config.env_runners(num_env_runners=999)\n"
        "rollout = RolloutSettings(max_completion_tokens=24)\n"
        f"wire_language_model(config, {TINY!r}, rollout).build_algo()\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "ValueError: 999 for env runners: that many CPUs were asked for" in done.stderr


@pytest.mark.slow
def test_a_runner_that_cannot_start_shows_its_own_error():
    def fail(*, env_context, **kwargs):
        if env_context.worker_index:
            raise KeyError("no camera here")

    config = distrl_config().env_runners(num_env_runners=1)
    with pytest.raises(RuntimeError, match=r"(?s)No env runner starts\..*in fail.*no camera here"):
        config.callbacks(on_environment_created=fail).build_algo()


def exits(**kwargs):
    raise SystemExit(3)


def test_an_exit_while_the_algorithm_begins_is_an_error(build):
    words = (
        rf"sys.exit\(3\) was called while building the algorithm, by exits\(\) in {__file__}:\d+"
    )
    with pytest.raises(RuntimeError, match=words):
        build(distrl_config().callbacks(on_algorithm_init=exits))


def test_an_exit_in_a_callback_is_an_error(build):
    algo = build(distrl_config().callbacks(on_train_result=exits))
    with pytest.raises(RuntimeError, match=rf"sys.exit\(3\) .* by exits\(\) in {__file__}:\d+"):
        algo.train()


def test_an_error_in_user_code_ends_the_iteration_at_once_from_a_remote_runner_too(build):
    def fail(*, episode, **kwargs):
        raise KeyError(episode.infos[0]["row"])

    algo = build(distrl_config().env_runners(num_env_runners=1).callbacks(on_episode_end=fail))
    with pytest.raises(SamplingError, match=r"(?s)on_episode_end failed on row .*in fail") as error:
        algo.train()
    assert str(error.value).count("KeyError: ") == 1
    assert algo.fleet.counts["num_failed_env_runners"] == 0


def stock_ppo(**callbacks):
    config = algorithm_config("PPO").environment(COUNTDOWN).callbacks(**callbacks)
    config.training(train_batch_size_per_learner=64, minibatch_size=32)
    return wire_language_model(config, TINY, RolloutSettings(max_completion_tokens=24))


def test_an_exit_is_an_error_in_rllibs_own_algorithms_too(build):
    algo = build(stock_ppo(on_train_result=exits))
    with pytest.raises(RuntimeError, match=r"sys.exit\(3\) was called while .* by exits\(\)"):
        algo.train()


@pytest.mark.slow
def test_code_that_fails_in_every_runner_ends_rllibs_own_algorithms(build):
    """RLlib starts the runners again, and goes on without having learned anything."""

    def fail(*, episode, **kwargs):
        raise KeyError("my bug")

    config = stock_ppo(on_episode_end=fail).env_runners(num_env_runners=1)
    config.fault_tolerance(delay_between_env_runner_restarts_s=0)
    algo = build(config)
    words = r"(?s)No env runner can sample.*on_episode_end failed on row .*my bug"
    with pytest.raises(RuntimeError, match=words):
        algo.train()
