import pytest
import torch
from ray.rllib.core.columns import Columns

from rllib_distrl.learner.batch_pass import model_columns
from rllib_distrl.method import registry
from rllib_distrl.model.sequences import from_columns
from tests.learner.rig import hot_config, make_learner, pass_apart, sample

KL_IN_LOSS = {"regularisers": [{"name": "kl", "coeff": 0.1}]}


@pytest.fixture(scope="module")
def episodes():
    return sample(hot_config())


def passes_of(trunks):
    """Counts the forward passes of each trunk."""
    counts = dict.fromkeys(trunks, 0)
    for name, trunk in trunks.items():

        def count(*_, name=name):
            counts[name] += 1

        trunk.register_forward_hook(count)
    return counts


@pytest.mark.parametrize(
    ("training", "before"),
    [
        ({}, {"policy": 0, "critic": 1}),
        ({"shapers": [{"name": "entropy_shaped"}]}, {"policy": 1, "critic": 1}),
        ({"controllers": [{"name": "adaptive_entropy"}]}, {"policy": 1, "critic": 1}),
        (KL_IN_LOSS, {"policy": 0, "critic": 1, "reference": 1}),
        (
            {"reward_transforms": [{"name": "kl_penalty"}], **KL_IN_LOSS},
            {"policy": 0, "critic": 1, "reference": 1},
        ),
    ],
)
def test_one_pass_per_model_that_is_needed_and_none_per_epoch(episodes, training, before):
    learner = make_learner(hot_config(minibatch_size=6, micro_batch_tokens=80, **training))
    module = learner.policy_module
    trunks = {"policy": module.policy.base_model, "critic": module.critic}
    assert (learner.reference is not None) == ("reference" in before)
    if learner.reference is not None:
        trunks["reference"] = learner.reference.policy.base_model
    counts = passes_of(trunks)
    columns = learner.columns(episodes)
    parts = len(module.micro_batches(from_columns(columns), 80))
    assert parts > 1
    learner.batch_pass(columns, 1)
    expected = {name: n * parts for name, n in before.items()}
    assert counts == expected

    counts.update(dict.fromkeys(counts, 0))
    learner.update(
        episodes=episodes, timesteps={"training_iteration": 1}, num_epochs=3, minibatch_size=6
    )
    in_steps = {name: counts[name] - expected[name] for name in counts}
    assert in_steps["policy"] == in_steps["critic"] >= 3 * 2
    assert in_steps.get("reference", 0) == 0


def test_a_critic_on_the_policys_states_costs_no_second_pass(episodes):
    settings = {"critic": "shared", "shapers": [{"name": "entropy_shaped"}]}
    learner = make_learner(hot_config(**settings))
    counts = passes_of({"policy": learner.policy_module.policy.base_model})
    learner.batch_pass(learner.columns(episodes), 1)
    assert counts == {"policy": 1}


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_one_step_of_one_micro_batch_runs_each_trunk_once_and_learns_the_same(episodes, critic):
    settings = {"critic": critic, "shapers": [{"name": "entropy_shaped"}], "entropy_coeff": 0.01}

    def update(learner):
        module = learner.policy_module
        trunks = {"policy": module.policy.base_model}
        if critic == "separate":
            trunks["critic"] = module.critic
        counts = passes_of(trunks)
        learner.update(episodes=episodes, timesteps={"training_iteration": 1}, num_epochs=1)
        return counts, {name: p.grad for name, p in module.named_parameters()}

    once, gradients = update(make_learner(hot_config(**settings)))
    assert set(once.values()) == {1}
    twice, expected = update(pass_apart(make_learner(hot_config(**settings))))
    assert set(twice.values()) == {2}
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-7)


def test_columns_equal_the_plain_computation(episodes):
    learner = make_learner(hot_config(micro_batch_tokens=80, **KL_IN_LOSS))
    module, columns = learner.policy_module, learner.columns(episodes)
    needs = {"entropy", "hidden", "prompt_logp", "ref_logp", "quantiles"}
    found = model_columns(module, learner.reference, columns, needs)
    assert set(found) == needs
    assert not any(column.requires_grad for column in found.values())
    sequences = from_columns(columns)
    with torch.no_grad():
        for row in range(len(sequences.lengths)):
            prompt, length = int(sequences.prompt_lens[row]), int(sequences.mask[row].sum())
            ids = sequences.input_ids[row : row + 1, : prompt + length]
            outputs = module.policy(input_ids=ids, output_hidden_states=True)
            logits = outputs.logits[0] / 2.0
            logps = logits.log_softmax(-1)
            entropy = torch.distributions.Categorical(logits=logits).entropy()
            taken = logps[:-1].gather(1, ids[0, 1:, None])[:, 0]
            close(found["entropy"][row, :length], entropy[prompt - 1 : -1])
            close(found["ref_logp"][row, :length], taken[prompt - 1 :])
            close(found["prompt_logp"][row, 1:prompt], taken[: prompt - 1])
            close(found["hidden"][row, :length], outputs.hidden_states[-1][0, prompt - 1 : -1])
            assert not found["prompt_logp"][row, 0]
            assert not found["prompt_logp"][row, prompt:].any()
            assert not found["entropy"][row, length:].any()


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_what_a_stage_declares_reaches_it(episodes):
    seen = {}

    @registry.register("shaper", "reads_prompts", needs=("prompt_logp", "hidden"))
    def reads_prompts(batch, advantages):
        seen.update(prompt=batch.column("prompt_logp"), hidden=batch.column("hidden"))
        return advantages

    learner = make_learner(hot_config(shapers=[{"name": "reads_prompts"}]))
    columns = learner.columns(episodes)
    learner.batch_pass(columns, 1)
    registry.forget("shaper", "reads_prompts")
    assert seen["prompt"].shape == (12, int(columns["prompt_lens"].max()))
    assert seen["hidden"].shape[:2] == columns[Columns.ACTIONS].shape


def test_logps_at_other_temperatures_are_those_of_the_tempered_softmax(episodes):
    learner = make_learner(hot_config(micro_batch_tokens=80))  # samples at temperature 2
    columns = learner.columns(episodes)
    module = learner.policy_module
    needs = {registry.logp_at(factor) for factor in (0.5, 1.0, 1.2)}
    found = model_columns(module, None, columns, needs)
    sequences = from_columns(columns)
    mask = sequences.mask
    with torch.no_grad():
        logits = module.policy(sequences.input_ids).logits.float()
        logits = sequences.states(logits)[mask] / 2.0
    taken = sequences.actions[mask].unsqueeze(1)
    for factor in (0.5, 1.0, 1.2):
        expected = (logits / factor).log_softmax(-1).gather(1, taken)[:, 0]
        logp = found[registry.logp_at(factor)]
        torch.testing.assert_close(logp[mask], expected, rtol=1e-4, atol=1e-5)
        assert (logp[~mask] == 0).all()
    squares = (2 * found["logp_at_1"] - found["logp_at_0.5"]).exp()[mask]
    expected = logits.softmax(-1).square().sum(-1)
    torch.testing.assert_close(squares, expected, rtol=1e-4, atol=1e-6)


def test_stages_remember_what_is_learned_from_and_a_checkpoint_holds_it(episodes):
    config = hot_config(advantage={"name": "aapo"})
    learner, other = make_learner(config), make_learner(config)
    columns = learner.columns(episodes)
    learner.batch_pass.looking()(columns, 1)
    assert learner.get_state()["memory"] == {}
    learner.update(episodes=episodes, timesteps={"training_iteration": 1})
    memory = learner.get_state()["memory"]["aapo"]
    rewards = columns[Columns.REWARDS].sum(1)
    rows = {episode.infos[0]["row"]: i for i, episode in enumerate(episodes)}  # last of a group
    for row, last in rows.items():
        assert memory[row] == pytest.approx(rewards[last - 2 : last + 1].mean().item(), rel=1e-5)
    other.set_state(learner.get_state())
    found = [each.batch_pass(columns, 2).rollouts.advantages for each in (learner, other)]
    assert torch.equal(*found)
    assert other.get_state()["memory"] == learner.get_state()["memory"]


def test_the_gradient_by_the_head_is_the_mean_over_a_rows_tokens(episodes):
    learner = make_learner(hot_config(micro_batch_tokens=80))
    columns, module = learner.columns(episodes), learner.policy_module
    found = model_columns(module, None, columns, {"head_gradient"})["head_gradient"]
    sequences = from_columns(columns)
    head = module.policy.get_output_embeddings().weight
    with torch.no_grad():
        logits = sequences.states(module.policy(sequences.input_ids).logits.float()) / 2.0
        each = head[sequences.actions] - logits.softmax(-1) @ head
        valid = torch.where(sequences.mask.unsqueeze(-1), each, 0.0)
    expected = valid.sum(1) / sequences.mask.sum(1, keepdim=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_clip_that_a_controller_moves_is_the_one_of_the_step(episodes):
    """Several epochs, so that ratios leave a band of 1e-6 around 1 and lose their gradient."""
    found = {}
    for width in (1e-6, 0.4):
        bounds = {"start": width, "low": width, "high": width}
        learner = make_learner(
            hot_config(critic="none", bonus_coeff=0.0, advantage={"name": "reinforce_pp"},
                       controllers=[{"name": "adaptive_clip", **bounds}])
        )  # fmt: skip
        before = {n: p.detach().clone() for n, p in learner.policy_module.named_parameters()}
        metrics = learner.update(
            episodes=episodes, timesteps={"training_iteration": 1}, num_epochs=4
        )["default_policy"]
        assert metrics["clip_param"].peek() == pytest.approx(width)
        after = dict(learner.policy_module.named_parameters())
        found[width] = sum(float((after[n].detach() - before[n]).square().sum()) for n in before)
    assert found[1e-6] != found[0.4]
