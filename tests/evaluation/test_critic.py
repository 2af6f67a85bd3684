"""A critic reads the samples of an evaluation."""

import pytest
import torch

from rllib_distrl.algorithm.registry import algorithm_config
from rllib_distrl.evaluation.critic import check_judge, judge_samples
from rllib_distrl.evaluation.data import resolve_data
from rllib_distrl.evaluation.evaluate import run_evaluation
from tests.helpers import COUNTDOWN, TINY, distrl_config, local_learner

pytestmark = pytest.mark.usefixtures("ray_session")
SETTINGS = {"problems": 6, "n": 4, "k": (1, 2, 4), "max_tokens": 24, "temperature": 1.5}


@pytest.fixture(scope="module")
def algo(ray_session):
    # Head and heads of the observations are zero: the law is the same in all states, fifteen gaps
    # of a fifteenth of .1 around 0.
    built = distrl_config(critic_observation="state", critic="detached").build_algo()
    yield built
    built.stop()


def test_a_critic_that_has_learned_nothing_chooses_at_random_and_stops_at_once(algo, tmp_path):
    data = resolve_data(COUNTDOWN)
    data = type(data)(**{**vars(data), "settings": data.settings.changed(**SETTINGS)})
    results = [run_evaluation(TINY, data), run_evaluation(TINY, data, out=tmp_path)]
    for result in results:
        found = judge_samples(algo, TINY, data, result)
        mean = result.summary()["avg@4"]
        assert [found[f"best@{k}"] for k in (1, 2, 4)] == pytest.approx([mean] * 3)
        # The least atom with F >= .9 is the 15th of 16, at (14 - 7.5) / 15 * .1 = .0433.
        by_threshold = {each["threshold"]: each for each in found["stopping"]}
        assert by_threshold[0.02]["stopped"] == by_threshold[0.02]["tokens_saved"] == 0
        assert by_threshold[0.02]["false_stops"] is None
        assert by_threshold[0.05]["stopped"] == by_threshold[0.05]["tokens_saved"] == 1
        assert by_threshold[0.05]["false_stops"] == pytest.approx(mean)


def test_a_critic_that_follows_the_verifier_finds_what_is_right(algo):
    module = local_learner(algo).policy_module
    head = module.observation_head
    kept = {name: p.detach().clone() for name, p in head.named_parameters()}
    success = module.value_head.in_features + 2  # "success", the third of Countdown's numbers
    with torch.no_grad():
        head.inputs.zero_()[0, success] = 10.0
        head.output.zero_()[0, 0] = 0.1  # the centre of the law
    data = resolve_data(COUNTDOWN)
    data = type(data)(**{**vars(data), "settings": data.settings.changed(**SETTINGS)})
    try:
        settings = {"n": 16, "k": (1, 16), "problems": 200, "temperature": 0.6}
        result = run_evaluation(TINY, data, settings)
        found = judge_samples(algo, TINY, data, result)
    finally:
        head.load_state_dict(kept)
    # Before EOS the verifier knows: the choice of 16 is right wherever one is.
    assert found["best@16"] == pytest.approx(result.summary((16,))["pass@16"])
    assert found["best@16"] > found["best@1"] > 0


def test_runs_without_such_a_critic_are_refused():
    with pytest.raises(ValueError, match="names a run of PPO; it must be a run of one of our"):
        check_judge(algorithm_config("PPO"))
    with pytest.raises(ValueError, match="critic = 'none'"):
        check_judge(distrl_config(critic="none"))
