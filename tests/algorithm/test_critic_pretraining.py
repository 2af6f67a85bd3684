import math

import pytest
import ray
import torch

from rllib_distrl.algorithm.critic_pretraining import read_groups
from rllib_distrl.algorithm.export import export_critic, policy_state
from rllib_distrl.evaluation.evaluate import evaluate_model
from rllib_distrl.learner.pretraining import pretrain_critic
from rllib_distrl.settings import EvalSettings
from tests.helpers import COUNTDOWN, TINY, distrl_config, local_learner
from tests.learner.rig import hot_config, make_learner, sample

pytestmark = pytest.mark.usefixtures("ray_session")


def lifetime(result):
    return result["env_runners"]["num_env_steps_sampled_lifetime"]


def critic_state(algo):
    module = local_learner(algo).policy_module
    return torch.cat([p.detach().flatten() for p in module.critic_parameters()])


def test_its_tokens_count_the_critic_moves_and_the_policy_does_not(build, tmp_path):
    table = {"rollouts": 24, "epochs": 2, "lr": 1e-3, "minibatch_size": 8}
    algo = build(distrl_config(critic_pretraining=table, critic_warmup_iterations=1, bonus_coeff=0))
    policy, critic = policy_state(algo), critic_state(algo)
    first = algo.train()
    metrics = first["learners"]["default_policy"]
    own = int(metrics["num_module_steps_trained"])
    assert metrics["critic_pretraining_tokens"] > own
    assert lifetime(first) == metrics["critic_pretraining_tokens"] + own
    assert math.isfinite(metrics["critic_pretraining_loss"])
    assert all(torch.equal(policy[name], weight) for name, weight in policy_state(algo).items())
    assert (critic_state(algo) - critic).abs().max() > 2e-3  # more than one iteration's step
    # Fresh prompts: 12 before, 4 in the iteration.
    assert algo.prompt_sampler.cursor == 16

    path = algo.save_to_path(str(tmp_path / "checkpoint"))
    second = algo.train()
    assert (
        lifetime(second) - lifetime(first)
        == second["learners"]["default_policy"]["num_module_steps_trained"]
    )
    algo.restore_from_path(path)
    assert lifetime(algo.train()) == lifetime(second)


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    def write(split):
        path = tmp_path_factory.mktemp("samples") / f"{split}.parquet"
        settings = EvalSettings(problems=6, n=3, split=split, temperature=2.0)
        result = evaluate_model(TINY, COUNTDOWN, {"max_completion_tokens": 24}, settings)
        result.to_parquet(path)
        return str(path), result.frame

    return {split: write(split) for split in ("train", "test")}


def test_saved_samples_come_back_as_episodes_and_count(build, samples):
    path, frame = samples["train"]
    table = {"samples": path, "epochs": 1, "minibatch_size": 8}
    algo = build(distrl_config(critic_pretraining=table))
    groups = read_groups(algo, path)
    assert [len(group) for group in groups] == [3] * 6
    episodes = [episode for group in groups for episode in group]
    for episode, record in zip(episodes, frame.to_dict("records"), strict=True):
        assert episode.actions.data.tolist() == list(record["token_ids"])
        assert episode.get_return() == record["score"]
        assert episode.is_done
    result = algo.train()
    metrics = result["learners"]["default_policy"]
    assert metrics["critic_pretraining_tokens"] == frame["tokens"].sum()
    assert lifetime(result) == frame["tokens"].sum() + metrics["num_module_steps_trained"]


def test_samples_of_other_problems_are_refused(build, samples):
    algo = build(distrl_config(critic_pretraining={"samples": samples["test"][0]}))
    with pytest.raises(ValueError, match=r"in the split 'train'.*eval.split=train"):
        algo.train()
    with pytest.raises(ValueError, match="is no file"):
        read_groups(algo, "nowhere.parquet")


@pytest.mark.parametrize(
    "head",
    [{"n_quantiles": 1}, {"n_quantiles": 8, "quantile_huber_kappa": 0.02}, {"n_quantiles": 16}],
    ids=["scalar", "8", "default"],
)
def test_what_can_be_known_is_learned(head):
    config = hot_config(bonus_coeff=0.0, init_value=0.5, **head)
    learner, episodes = make_learner(config), sample(config, prompts=64, generations=8)
    for episode in episodes:
        # Known from the first token on: whether it is even.
        episode.rewards.data[:] = 0.0
        episode.rewards.data[-1] = float(episode.actions.data[0] % 2 == 0)
    table = {"rollouts": 512, "epochs": 10, "lr": 3e-3, "minibatch_size": 16}
    found = pretrain_critic(learner, shards=[ray.put(episodes)], table=table)
    assert found["critic_pretraining_explained_variance"] > 0.6
    columns = learner.columns(episodes[-8:])
    values = learner.policy_module.compute_values(columns)
    assert values[:, 0].std() < 0.1  # nothing is known yet
    even = columns["actions"][:, 0] % 2 == 0
    assert values[even, 1].min() > 0.7
    assert values[~even, 1].max() < 0.3


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"rollout": 8}, "nearest one is 'rollouts'"),
        ({}, "give one of them"),
        ({"rollouts": 8, "samples": "a.parquet"}, "give one of them"),
        ({"rollouts": 8, "epochs": 0}, "epochs is 0"),
        ({"rollouts": 8, "lr": 0.0}, "lr is 0.0"),
        ({"rollouts": 12}, "8 completions"),
    ],
)
def test_refusals(table, words):
    with pytest.raises(ValueError, match=words):
        distrl_config(critic_pretraining=table).validate()


@pytest.mark.parametrize(
    "head",
    ["bernoulli", "categorical", {"name": "categorical", "bins": 9, "projection": "two_hot"}],
)
def test_every_head_is_pretrained_judged_and_kept(head, build, tmp_path):
    table = {"rollouts": 24, "epochs": 2, "lr": 1e-3, "minibatch_size": 8}
    target = {"name": "mixture", "critic_lambda": 0.9}
    around = {"critic_pretraining": table, "target": target, "critic_freeze": "attention"}
    algo = build(distrl_config(head=head, **around))
    critic = critic_state(algo)
    metrics = algo.train()["learners"]["default_policy"]
    assert (critic_state(algo) - critic).abs().max() > 2e-3
    for name in ("critic_pretraining_loss", "vf_loss", "quantile_coverage_90", "quantile_pit_ks"):
        assert math.isfinite(metrics[name])
    assert 0 <= metrics["quantile_pit_ks"] <= 1

    path = algo.save_to_path(str(tmp_path / "checkpoint"))
    kept = critic_state(algo)
    algo.train()
    algo.restore_from_path(path)
    assert torch.equal(critic_state(algo), kept)
    export_critic(algo, tmp_path / "critic")
    distrl_config(critic_checkpoint=str(tmp_path / "critic"), head=head).validate()
    with pytest.raises(ValueError, match="head="):
        distrl_config(critic_checkpoint=str(tmp_path / "critic")).validate()
    with pytest.raises(ValueError, match="head: "):
        build(distrl_config()).restore_from_path(path)


def test_its_loss_has_the_settings_of_training():
    """Far below kappa the Huber loss is quadratic over 2 kappa: kappa = 20 halves that of 10."""
    table = {"rollouts": 12, "epochs": 1, "lr": 1e-9, "minibatch_size": 12}
    episodes, losses = sample(hot_config()), []
    for kappa in (10.0, 20.0):
        learner = make_learner(hot_config(quantile_huber_kappa=kappa))
        found = pretrain_critic(learner, shards=[ray.put(episodes)], table=table)
        losses.append(found["critic_pretraining_loss"])
    assert losses[0] == pytest.approx(2 * losses[1], rel=1e-5)
