"""What a critic alone is told: it uses it, and the policy does not notice."""

import gymnasium
import pytest
import torch
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.core.columns import Columns

from distrl_envs.tasks.countdown import CountdownTask
from distrl_envs.token_env import TokenEnv
from rllib_distrl.algorithm.registry import algorithm_config
from rllib_distrl.algorithm.wiring import wire_language_model
from rllib_distrl.learner.minibatches import model_inputs
from rllib_distrl.method.prompt_samplers import PromptRequest
from rllib_distrl.model.critics import PARTS, load_critic, save_critic
from rllib_distrl.model.sequences import (
    CRITIC_OBSERVATIONS,
    CRITIC_TEXT_IDS,
    CRITIC_TEXT_LENS,
    INPUT_IDS,
    Sequences,
    from_columns,
)
from rllib_distrl.rollout.completion_env_runner import CompletionEnvRunner
from rllib_distrl.rollout.episodes import returns_so_far
from rllib_distrl.settings import RolloutSettings
from tests.helpers import COUNTDOWN, TINY, distrl_config
from tests.learner.rig import gradients, hot_config, make_learner, sample


def told(observation, critic="separate", **training):
    config = hot_config(critic_observation=observation, critic=critic, **training)
    return config, make_learner(config)


@pytest.fixture(scope="module")
def episodes():
    """By what the critic is told; the sampled tokens are the same."""
    return {name: sample(hot_config(critic_observation=name)) for name in ("none", "state", "text")}


def disturbed(learner):
    """A critic that does use what it is told, with weights that depend on a seed alone."""
    generator = torch.Generator().manual_seed(3)
    for name, weights in learner.policy_module.named_parameters():
        if name in ("value_head.weight", "observation_head.output"):
            weights.data.copy_(0.3 * torch.randn(weights.shape, generator=generator))
    return learner


def test_episodes_carry_the_tasks_numbers_and_only_then(episodes):
    env = hot_config().env_config
    assert "critic_observation" not in env
    for plain, some in zip(episodes["none"], episodes["state"], strict=True):
        assert plain.actions.data.tolist() == some.actions.data.tolist()
        assert CRITIC_OBSERVATIONS not in plain.extra_model_outputs
        numbers = some.extra_model_outputs[CRITIC_OBSERVATIONS].data
        assert numbers.shape == (len(some), 6)
        assert numbers.dtype == "float32"
        assert numbers[0, [0, 1, 4, 5]].tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("observation", "critic"),
    [("state", "separate"), ("state", "detached"), ("state", "shared"), ("text", "separate")],
)
def test_the_start_is_as_without_and_the_policys_gradient_is_bitwise_the_same(
    episodes, observation, critic
):
    _, plain = told("none", critic)
    _, other = told(observation, critic)
    metrics, wanted = gradients(plain, episodes["none"])
    seen, found = gradients(other, episodes[observation])
    assert seen["logp_mismatch_max"] == metrics["logp_mismatch_max"]
    assert seen["policy_loss"] == metrics["policy_loss"]
    policy = [name for name in wanted if name.startswith("policy.")]
    assert policy
    for name in policy:
        assert torch.equal(found[name], wanted[name]), name
    if observation == "state":
        assert seen["vf_loss"] == metrics["vf_loss"]
        assert float(found["observation_head.output"].abs().max()) > 0
        for name in wanted.keys() - set(policy):
            assert torch.equal(found[name], wanted[name]), name


def test_a_critic_that_uses_them_leaves_the_gradient_of_given_advantages(episodes):
    def policy_gradient(observation):
        config = hot_config(
            critic_observation=observation, advantage={"name": "grpo"}, bonus_coeff=0.0
        )
        learner = disturbed(make_learner(config))
        return gradients(learner, episodes[observation])

    (plain, wanted), (seen, found) = policy_gradient("none"), policy_gradient("state")
    assert seen["vf_loss"] != plain["vf_loss"]
    for name in wanted:
        if name.startswith("policy."):
            assert torch.equal(found[name], wanted[name]), name


@pytest.mark.parametrize("observation", ["state", "text"])
def test_values_do_not_depend_on_the_rows_beside_nor_on_what_stands_in_the_padding(
    episodes, observation
):
    _, learner = told(observation)
    module = disturbed(learner).policy_module
    columns = learner.columns(episodes[observation])
    assert len(set(columns[Columns.LOSS_MASK].sum(1).tolist())) > 1
    values = module.compute_values(columns)
    sequences = from_columns(columns)
    for row in range(len(values)):
        alone = module.compute_values(model_inputs(sequences.rows(torch.tensor([row]))))
        torch.testing.assert_close(alone[0], values[row, : alone.shape[1]], rtol=0, atol=1e-5)
    mask = columns[Columns.LOSS_MASK]
    if observation == "state":
        columns[CRITIC_OBSERVATIONS] = columns[CRITIC_OBSERVATIONS].clone()
        columns[CRITIC_OBSERVATIONS][~mask] = 1e9
        assert torch.equal(module.compute_values(columns)[mask], values[mask])
        columns[CRITIC_OBSERVATIONS][0, 0] += 1.0
    else:
        columns[CRITIC_TEXT_IDS] = columns[CRITIC_TEXT_IDS].clone()
        columns[CRITIC_TEXT_IDS][0, 0] += 1
    moved = (module.compute_values(columns) != values) & mask
    assert bool(moved[0, 0])
    assert not bool(moved[1:].any())


def test_a_text_stands_before_the_critics_rows_by_hand():
    rows = Sequences(
        input_ids=torch.tensor([[11, 12, 13, 14], [21, 22, 0, 0]]),
        prompt_lens=torch.tensor([2, 1]),
        actions=torch.tensor([[13, 14], [22, 0]]),
        mask=torch.tensor([[True, True], [True, False]]),
        reply_tokens=torch.zeros(2, 2, dtype=torch.long),
        text_ids=torch.tensor([[5, 0, 0], [6, 7, 8]]),
        text_lens=torch.tensor([1, 3]),
    ).behind_text
    assert rows.input_ids[0, :5].tolist() == [5, 11, 12, 13, 14]
    assert rows.input_ids[1, :5].tolist() == [6, 7, 8, 21, 22]
    assert rows.prompt_lens.tolist() == [3, 4]
    hidden = torch.arange(5.0).expand(2, 5)[..., None]
    assert rows.states(hidden)[..., 0].tolist()[0] == [2, 3]
    assert rows.states(hidden)[1, 0, 0] == 3


def test_texts_are_the_tasks_and_no_policy_sees_them(episodes):
    config, learner = told("text")
    columns = learner.columns(episodes["text"])
    task, tokenizer = sample_env(config).task, sample_env(config).tokenizer
    plain = learner.columns(episodes["none"])
    assert torch.equal(columns[INPUT_IDS], plain[INPUT_IDS])
    for row, episode in enumerate(episodes["text"]):
        ids = columns[CRITIC_TEXT_IDS][row, : columns[CRITIC_TEXT_LENS][row]]
        problem = task.problem(episode.infos[0]["row"])
        text = tokenizer.decode(ids)
        assert text == task.critic_text(problem)
        assert task.grade(problem, text).score == 1.0


def sample_env(config):
    return gymnasium.make(COUNTDOWN, disable_env_checker=True, **config.env_config).unwrapped


def test_the_head_learns_what_the_numbers_alone_say(episodes):
    _, learner = told("state", "detached")
    module = learner.policy_module
    columns = learner.columns(episodes["state"])
    mask = columns[Columns.LOSS_MASK]
    generator = torch.Generator().manual_seed(0)
    # Nothing that the tokens say: numbers of chance, and a target made of them.
    numbers = torch.randn(columns[CRITIC_OBSERVATIONS].shape, generator=generator)
    columns[CRITIC_OBSERVATIONS] = numbers
    target = (numbers[..., 0] * numbers[..., 1]).tanh()
    with torch.no_grad():
        states = module.critic_states(from_columns(columns))
    head = [p for name, p in module.named_parameters() if name.startswith(PARTS[1:])]
    optimizer = torch.optim.Adam(head, 1e-2)
    for _ in range(120):
        values = module.compute_values({}, states)
        loss = (values - target)[mask].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1 * float(target[mask].var())


def test_a_folder_and_a_learners_state_keep_it(episodes, tmp_path):
    config, learner = told("state")
    module = disturbed(learner).policy_module
    columns = learner.columns(episodes["state"])
    wanted = module.compute_values(columns)
    tensors = {name: x for name, x in module.state_dict().items() if name.startswith(PARTS)}
    assert any(name.startswith("observation_head.") for name in tensors)
    save_critic(
        tmp_path,
        tensors,
        head=config.head,
        n_quantiles=config.n_quantiles,
        head_center=config.head_center,
        trunk_config={},
        critic_observation="state",
    )
    _, other = told("state")
    assert not torch.equal(other.policy_module.compute_values(columns), wanted)
    load_critic(other.policy_module, tmp_path)
    assert torch.equal(other.policy_module.compute_values(columns), wanted)
    _, restored = told("state")
    restored.set_state(learner.get_state())
    assert torch.equal(restored.policy_module.compute_values(columns), wanted)


class Dense(CountdownTask):
    """Countdown that also pays a little for every token."""

    has_step_reward = True

    def step_reward(self, problem, completion_ids):
        return 0.25 * (completion_ids[-1] % 4) - 0.125


def dense_config(**training):
    config = distrl_config(prompts=4, generations=3, **training)
    config.environment(COUNTDOWN, env_config={"task": f"{__name__}:Dense"})
    config.rollout(temperature=2.0)
    config.validate()
    return config


class Watched(RLlibCallback):
    def on_episode_step(self, **kwargs):
        pass


def test_the_stock_is_what_an_episode_has_earned_before_each_token():
    assert returns_so_far([1.0, -0.5, 2.0]).tolist() == [[0.0], [1.0], [0.5]]
    config = dense_config(critic_observation="stock")
    watched = config.copy(copy_frozen=False).callbacks(Watched)
    for each in (config, watched):
        runner = CompletionEnvRunner(config=each)
        for episode in runner.sample_prompts(
            [PromptRequest(row, 0) for row in range(3)], 2
        ).episodes:
            rewards = episode.rewards.data.tolist()
            assert len(set(rewards)) > 1
            found = episode.extra_model_outputs[CRITIC_OBSERVATIONS].data
            assert found.dtype == "float32" and found.shape == (len(rewards), 1)
            assert found[:, 0].tolist() == [sum(rewards[:t]) for t in range(len(rewards))]


def test_a_critic_that_is_told_the_stock_starts_as_without_and_then_uses_it():
    learners = {
        name: make_learner(dense_config(critic_observation=name)) for name in ("none", "stock")
    }
    told = sample(dense_config(critic_observation="stock"))
    (plain, _), (seen, found) = (gradients(learner, told) for learner in learners.values())
    assert (seen["vf_loss"], seen["policy_loss"]) == (plain["vf_loss"], plain["policy_loss"])
    assert float(found["observation_head.output"].abs().max()) > 0
    module = disturbed(learners["stock"]).policy_module
    columns = learners["stock"].columns(told)
    values = module.compute_values(columns)
    columns[CRITIC_OBSERVATIONS] = columns[CRITIC_OBSERVATIONS] + 1.0
    assert not torch.allclose(module.compute_values(columns), values)


def test_columns_that_no_critic_reads_are_refused():
    config = distrl_config().environment(COUNTDOWN, env_config={"critic_observation": "state"})
    with pytest.raises(ValueError, match=r"setting is 'none'. Say it once: training\(critic_obs"):
        config.validate()
    config.training(critic_observation="state").validate()
    config.training(critic_observation="none").validate()  # what validate() had put there itself
    assert config.env_config["critic_observation"] == "none"
    stock = algorithm_config("PPO").environment(
        COUNTDOWN, env_config={"critic_observation": "state"}
    )
    with pytest.raises(
        ValueError, match=r"or rl_module\(model_config={'critic_observation': 'stat"
    ):
        wire_language_model(stock, TINY, RolloutSettings())


def test_refusals(episodes):
    with pytest.raises(ValueError, match="'countdown' rewards the end of an episode alone"):
        TokenEnv(critic_observation="stock")
    with pytest.raises(ValueError, match=r"the undiscounted return so far, but gamma is 0.9"):
        dense_config(critic_observation="stock", gamma=0.9)
    with pytest.raises(ValueError, match="critic_observation is 'text', but critic is 'shared'"):
        hot_config(critic_observation="text", critic="shared")
    with pytest.raises(ValueError, match=r"no critic_observations: .*env_config"):
        gradients(told("state")[1], episodes["none"])
    with pytest.raises(ValueError, match="the task 'talk' has no method critic_observation"):
        TokenEnv("tests.rollout.turn_tasks:Talk", critic_observation="state")
    with pytest.raises(ValueError, match="must be one of none, state, text, stock"):
        TokenEnv(critic_observation="numbers")
    with pytest.raises(ValueError, match=r"fill the model's window of 25: .* no room for a text"):
        TokenEnv(critic_observation="text", window=25)
