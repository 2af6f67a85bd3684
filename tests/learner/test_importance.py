import copy

import numpy as np
import pytest
import torch

from rllib_distrl.method.batch import SequenceBatch
from rllib_distrl.method.pipeline import Method
from tests.helpers import distrl_config
from tests.learner.double_precision import SgdLearner
from tests.learner.rig import hot_config, make_learner, sample

pytestmark = pytest.mark.usefixtures("ray_session")


def rollouts(sampler_logp):
    return SequenceBatch(
        rewards=torch.zeros(2, 3),
        loss_mask=torch.tensor([[True, True, True], [True, False, False]]),
        action_logp=torch.tensor(sampler_logp),
        group=torch.arange(2),
    )


@pytest.mark.parametrize(
    ("correction", "weights", "mean", "share"),
    [("truncated", [[0.25, 2.0, 1.0], [1.5, 0, 0]], 4.75 / 4, 0.25),
     ("masked", [[0.0, 0.0, 1.0], [1.5, 0, 0]], 2.5 / 4, 0.5)],
)  # fmt: skip
def test_weights_by_hand(correction, weights, mean, share):
    learner = torch.tensor([[0.1, 0.4, 0.2], [0.3, 1.0, 1.0]]).log()
    sampler = np.log([[0.4, 0.1, 0.2], [0.2, np.nan, 1.0]]).astype(np.float32).tolist()
    batch = rollouts(sampler)
    config = distrl_config(importance_correction=correction, importance_bound=2.0)
    Method.from_config(config).correct_importance(learner, batch)
    torch.testing.assert_close(batch.extras["importance_weights"], torch.tensor(weights))
    assert batch.action_logp is learner
    assert batch.extras["sampler_logp"][0].tolist() == sampler[0]
    assert batch.metrics["importance_weight_mean"] == pytest.approx(mean)
    assert batch.metrics["importance_bounded_share"] == pytest.approx(share)


def update_from_shifted_logps(episodes, shift, **training):
    """The change of the policy in one update on episodes whose sampler logps are off by `shift`."""
    # A large step: what is compared are differences of float32 weights.
    settings = {"lr": 1.0, "init_value": 0.5, "whiten_advantages": False, "bonus_coeff": 0.0}
    learner = make_learner(hot_config(learner_class=SgdLearner, **settings, **training))
    episodes = copy.deepcopy(episodes)
    for episode in episodes:
        episode.extra_model_outputs["action_logp"].data[:] += shift
    policy = learner.policy_module.policy
    before = {name: weight.detach().clone() for name, weight in policy.named_parameters()}
    result = learner.update(episodes=episodes, timesteps={"training_iteration": 1})
    moved = [
        (weight - before[name]).detach().flatten() for name, weight in policy.named_parameters()
    ]
    return torch.cat(moved), {n: each.peek() for n, each in result["default_policy"].items()}


def test_the_weight_multiplies_the_policy_gradient():
    episodes = sample(hot_config())
    correction = {"importance_correction": "truncated", "importance_bound": 1.5, "grad_clip": None}
    plain, metrics = update_from_shifted_logps(episodes, float(np.log(2.0)), **correction)
    assert metrics["importance_weight_mean"] == pytest.approx(0.5, rel=1e-4)
    assert metrics["importance_bounded_share"] == 0.0
    cut, metrics = update_from_shifted_logps(episodes, -float(np.log(2.0)), **correction)
    assert float(plain.abs().max()) > 1e-2
    # Weights 1/2 and 2, cut at 1.5, for every token: the ratio to the learner's own logps stays 1.
    torch.testing.assert_close(cut, 3 * plain, rtol=1e-3, atol=1e-6)
    assert metrics["importance_weight_mean"] == 1.5
    assert metrics["importance_bounded_share"] == 1.0
    assert metrics["logp_mismatch_p50"] == pytest.approx(2.0, rel=1e-4)
    nothing, metrics = update_from_shifted_logps(
        episodes, 3.0, **{**correction, "importance_correction": "masked"}
    )
    assert metrics["importance_bounded_share"] == 1.0 and not nothing.any()


@pytest.mark.parametrize("correction", ["none", "truncated"])
def test_the_mismatch_is_that_before_the_first_step(correction):
    training = {"minibatch_size": 6, "micro_batch_tokens": 80, "lr": 1e-2}
    training |= {"clip_param": 0.25, "clip_param_high": 0.4}
    config = hot_config(importance_correction=correction, **training)
    episodes = sample(config)
    for episode in episodes:
        episode.extra_model_outputs["action_logp"].data[:] -= np.log(1.3)  # a weight of 1.3
    learner = make_learner(config)
    parameters = list(learner.policy_module.parameters())
    before = [parameter.detach().clone() for parameter in parameters]
    result = learner.update(episodes=episodes, num_epochs=3, minibatch_size=6)["default_policy"]
    moved = [
        float((p.detach() - old).abs().max()) for p, old in zip(parameters, before, strict=True)
    ]
    assert max(moved) > 0.03
    for name in ("p50", "p95", "max"):
        assert result[f"logp_mismatch_{name}"].peek() == pytest.approx(1.3, rel=1e-4)
    assert result["logp_mismatch_outside_clip"].peek() == 0.0
    assert result["logp_mismatch_ess"].peek() == pytest.approx(1.0, rel=1e-6)


def test_only_what_the_learner_samples_is_learned_from_uncorrected(build):
    algo = build(distrl_config(importance_correction="truncated").rollout(temperature=2.0, top_k=3))
    metrics = algo.train()["learners"]["default_policy"]
    assert 0.3 < metrics["importance_weight_mean"] < 0.99  # mass of the kept three
    runner = algo.env_runner
    learners = {
        correction: make_learner(hot_config(importance_correction=correction))
        for correction in ("none", "truncated")
    }

    def learn(correction, explore=True, **rollout):
        runner.rollout = runner.rollout.model_copy(
            update={"temperature": 2.0, "top_k": 0, "top_p": 1.0, **rollout}
        )
        episodes = runner.sample(num_episodes=2, explore=explore)
        sampling = {
            name: getattr(runner.rollout, name) for name in ("temperature", "top_p", "top_k")
        }
        assert episodes[0].infos[0]["sampling"] == {**sampling, "greedy": not explore}
        learners[correction].update(episodes=episodes)

    others = ({"temperature": 1.5}, {"top_p": 0.9}, {"top_k": 3})
    for other in others:
        learn("truncated", **other)
        with pytest.raises(ValueError, match=f"{next(iter(other))}'.*Sample from it"):
            learn("none", **other)
    learn("none")
    for correction in ("none", "truncated"):
        with pytest.raises(ValueError, match=r"'greedy': True.*cannot be corrected for"):
            learn(correction, explore=False)
