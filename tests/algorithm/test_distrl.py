import time

import pytest
import torch

from rllib_distrl.algorithm.export import policy_state
from rllib_distrl.algorithm.weight_sync import ProbeCheck
from tests.helpers import distrl_config, with_model_config

pytestmark = pytest.mark.usefixtures("ray_session")


def assert_same_weights(one, other):
    for name, weight in one.items():
        torch.testing.assert_close(weight, other[name], rtol=0, atol=0, msg=name)


def assert_same_update(one, other):
    """Equal up to float noise, which Adam turns into whole steps where a gradient is zero.

    A step is 1e-3 here: a wrong gradient would differ by about that much on average.
    """
    differences = torch.cat([(one[name] - other[name]).abs().flatten() for name in one])
    assert float(differences.mean()) < 2e-5


def learner_metrics(result):
    return result["learners"]["default_policy"]


def test_an_iteration_reports_what_rllib_users_look_for(build):
    algo = build(distrl_config(prompts=4, generations=4))
    before = policy_state(algo)
    result = algo.train()
    assert result["env_runners"]["num_env_steps_sampled_lifetime"] > 0
    assert 0 <= result["env_runners"]["episode_return_mean"] <= 1
    metrics = learner_metrics(result)
    for key in ("policy_loss", "vf_loss", "entropy", "optimism_coeff", "quantile_spread"):
        assert key in metrics
    assert metrics["logp_mismatch_max"] == pytest.approx(1.0, abs=1e-4)
    assert metrics["quantile_crossing_rate"] == 0.0
    after = policy_state(algo)
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_two_seeded_runs_are_bit_equal(build):
    runs = [build(distrl_config(prompts=4, generations=4)) for _ in range(2)]
    for algo in runs:
        algo.train()
        algo.train()
    assert_same_weights(policy_state(runs[0]), policy_state(runs[1]))


def test_remote_runners_sample_what_the_local_one_does(build):
    config = distrl_config(prompts=5, generations=3)
    local = build(config.copy(copy_frozen=False))
    remote = build(config.copy(copy_frozen=False).env_runners(num_env_runners=2))
    for algo in (local, remote):
        algo.train()
        algo.train()
    assert_same_update(policy_state(local), policy_state(remote))


def test_resuming_is_bit_exact(build, tmp_path):
    config = distrl_config(
        prompts=4,
        generations=4,
        target="sample_replacement",
        critic_lambda=0.9,
        reward_transforms=[{"name": "kl_penalty", "coeff": 0.01}],
        regularisers=[{"name": "kl", "coeff": 0.1}],
        controllers=[{"name": "adaptive_entropy", "target": 9.0, "step": 1e-3}],
        lr_schedule="cosine",
        lr_warmup_iterations=3,
        lr_decay_iterations=6,
    )
    straight = build(config.copy(copy_frozen=False))
    straight.train()
    straight.train()
    path = straight.save_to_path(str(tmp_path / "checkpoint"))

    def three_more(algo):
        metrics = [learner_metrics(algo.train()) for _ in range(3)]
        rates = [values["default_optimizer_learning_rate"] for values in metrics]
        assert rates == pytest.approx([1e-3, 7.5e-4, 2.5e-4])  # 3/3, then the cosine's (1 +- 1/2)/2
        return [values["total_loss"] for values in metrics]

    expected = three_more(straight)
    weights = policy_state(straight)

    resumed = build(config.copy(copy_frozen=False))
    resumed.restore_from_path(path)
    assert resumed.iteration == 2
    assert three_more(resumed) == expected
    assert_same_weights(policy_state(resumed), weights)

    # In place: back from iteration 5, which RLlib alone does not manage.
    straight.restore_from_path(path)
    assert three_more(straight) == expected


def test_a_curriculum_sees_results_and_resumes(build, tmp_path):
    sampler = {"name": "variance_mix", "pool": 6}
    config = distrl_config(prompts=8, generations=2, prompt_sampler=sampler)
    straight = build(config.copy(copy_frozen=False))
    straight.train()
    state = straight.prompt_sampler.get_state()
    assert (state["served"], state["seen"].sum()) == (8, 16)
    statuses = straight.metrics.peek(("env_runners", "grade_status"))
    assert state["correct"].sum() == statuses.get("correct", 0)
    path = straight.save_to_path(str(tmp_path / "checkpoint"))
    expected = learner_metrics(straight.train())["total_loss"]

    resumed = build(config.copy(copy_frozen=False))
    resumed.restore_from_path(path)
    assert learner_metrics(resumed.train())["total_loss"] == expected
    assert resumed.prompt_sampler.next(8) == straight.prompt_sampler.next(8)


def test_adapters_train_merge_and_resume(build, tmp_path):
    from transformers import AutoModelForCausalLM

    config = distrl_config(prompts=4, generations=4, regularisers=[{"name": "kl", "coeff": 0.1}])
    with_model_config(config, lora={"r": 4, "alpha": 8})
    straight = build(config.copy(copy_frozen=False))
    before = policy_state(straight)
    straight.train()
    path = straight.save_to_path(str(tmp_path / "checkpoint"))
    result = straight.train()
    # Every sync was checked: the engine's own tensors are the merged weights, and they say
    # what the learner's adapters say.
    assert learner_metrics(result)["logp_mismatch_max"] == pytest.approx(1.0, abs=1e-4)
    after = policy_state(straight)
    assert not torch.equal(
        before["model.layers.0.mlp.up_proj.weight"], after["model.layers.0.mlp.up_proj.weight"]
    )
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    straight.export_model(tmp_path / "model")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert_same_weights(after, exported)
    resumed = build(config.copy(copy_frozen=False))
    resumed.restore_from_path(path)
    resumed.train()
    assert_same_weights(policy_state(resumed), after)


def test_zero_advantages_leave_the_policy_alone(build):
    algo = build(distrl_config(advantage={"name": "zero"}, bonus_coeff=0.0))
    before = policy_state(algo)
    algo.train()
    assert_same_weights(before, policy_state(algo))


def test_the_critic_warms_up_before_the_policy_moves(build):
    algo = build(distrl_config(critic_warmup_iterations=1, critic="shared"))
    before = policy_state(algo)
    algo.train()
    assert_same_weights(before, policy_state(algo))
    algo.train()
    after = policy_state(algo)
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_sync_that_did_not_happen_is_an_error(build):
    algo = build(distrl_config())
    algo.train()
    algo.env_runner.load_engine = lambda: None
    with pytest.raises(RuntimeError, match="weight sync did not happen"):
        for _ in range(2):
            algo.train()


OF_ALL_LEARNERS = (
    *("total_loss", "policy_loss", "vf_loss", "entropy", "regularisation", "ref_kl"),
    *("advantages_std", "importance_weight_mean", "importance_bounded_share"),
    *(f"logp_mismatch_{name}" for name in ("p50", "p95", "max", "outside_clip", "ess")),
)


@pytest.mark.slow
def test_two_learners_of_adapters_correct_and_report_what_one_does(build):
    config = distrl_config(
        prompts=4,
        generations=3,
        init_value=0.5,
        bonus_coeff=0.0,
        entropy_coeff=0.01,
        regularisers=[{"name": "kl", "coeff": 0.1}],
        importance_correction="masked",
        importance_bound=1.2,
        micro_batch_tokens=80,
    ).rollout(temperature=2.0, top_k=20, dtype="bfloat16")
    with_model_config(config, lora={"r": 4, "alpha": 8})
    one = build(config.copy(copy_frozen=False))
    two = build(config.copy(copy_frozen=False).learners(num_learners=2))
    expected, found = (learner_metrics(algo.train()) for algo in (one, two))
    for name in OF_ALL_LEARNERS:
        # Small differences of logps: learners pad their rows differently.
        assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
    assert 0 < expected["importance_bounded_share"] < 0.5
    assert expected["logp_mismatch_max"] > 1.3
    assert_same_update(policy_state(one), policy_state(two))
    # Learners that are busy: they answer in turn, so no score can come at once.
    two.learner_group.foreach_learner(lambda learner: time.sleep(5), timeout_seconds=0.0)
    impatient = ProbeCheck(two.learner_group, two.config.model_config, timeout_s=0.0)
    with pytest.raises(TimeoutError, match="No learner has scored the probes within 0 s"):
        impatient({"It": two.env_runner.held_weights().probe})


def test_export_loads_in_plain_transformers(build, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    algo = build(distrl_config())
    algo.train()
    algo.export_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    exported = model.state_dict()
    assert_same_weights(policy_state(algo), exported)

    episode = algo.env_runner.sample(num_episodes=1, explore=False)[0]
    prompt = episode.infos[0]["prompt_ids"]
    generated = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)
    assert generated[0, len(prompt) :].tolist() == episode.actions.data.tolist()
    assert tokenizer.eos_token_id == generated[0, -1]
