import numpy as np
import pytest
import torch

from rllib_distrl.algorithm.export import policy_state
from rllib_distrl.algorithm.inspection import inspect_policy
from tests.helpers import distrl_config, local_learner

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def algo():
    algo = distrl_config(
        prompts=8, generations=4, bonus_max_ratio=None, read_out={"name": "mean"}
    ).build_algo()
    yield algo
    algo.stop()


def test_looking_changes_nothing(algo):
    module = local_learner(algo).policy_module
    before = {name: x.clone() for name, x in module.state_dict().items()}
    first = inspect_policy(algo, problems=2, num_generations=2)
    assert not bool(module.value_initialised)
    for name, x in module.state_dict().items():
        assert torch.equal(x, before[name]), name
    again = inspect_policy(algo, problems=2, num_generations=2)
    assert first.completions["completion"].tolist() == again.completions["completion"].tolist()
    assert algo.prompt_sampler.get_state() == {"cursor": 0}


def test_the_table_is_what_an_independent_forward_pass_gives(algo):
    for _ in range(2):
        algo.train()
    table = inspect_policy(algo, problems=3, num_generations=4, split="validation")
    assert len(table) == 12
    assert (table.n_quantiles, table.n_top) == (16, 5)
    assert table.info["iteration"] == 2
    assert table.completions["problem"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    from rllib_distrl.model.loading import load_model, load_tokenizer

    model = load_model("builtin:countdown-tiny")
    model.load_state_dict(policy_state(algo))
    tokenizer = load_tokenizer("builtin:countdown-tiny")
    for _, row in table.completions.iterrows():
        prompt = tokenizer(row["prompt"]).input_ids
        ids = row["token"].tolist()
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        logps = logits.log_softmax(-1)
        expected = logps[range(len(ids)), ids].numpy()
        np.testing.assert_allclose(row["logp"], expected, atol=1e-4)
        np.testing.assert_allclose(row["entropy"], -(logps.exp() * logps).sum(-1), atol=1e-4)
        top = logps.topk(5).values.numpy().ravel()
        np.testing.assert_allclose(row["top_logps"], top, atol=1e-4)
        assert np.abs(row["logp_difference"]).max() < 1e-3
        quantiles = row["quantiles"].reshape(-1, 16)
        assert (np.diff(quantiles) >= 0).all()
        np.testing.assert_allclose(quantiles.mean(1), row["value"], atol=1e-5)
        # GAE of the values, backwards, with gamma 1 and lambda 0.95.
        values, advantage = [*row["value"].tolist(), 0.0], 0.0
        for t in reversed(range(len(ids))):
            reward = row["score"] if t == len(ids) - 1 else 0.0
            advantage = reward + values[t + 1] - values[t] + 0.95 * advantage
            assert row["advantage"][t] == pytest.approx(advantage, abs=1e-4)
        assert row["bonus"][-1] == 0.0  # the end is neither punished nor rewarded
        pieces = " ".join(text.strip() for text in row["text"])
        assert pieces.removesuffix(" <eos>") == row["completion"]
    used = table.numbers("advantage_used")
    shaped = table.numbers("advantage") + table.numbers("bonus")
    np.testing.assert_allclose(used, (shaped - shaped.mean()) / shaped.std(), atol=1e-3)


def test_replies_stand_apart_from_the_sampled_tokens(ray_session):
    config = distrl_config(prompts=4, generations=2)
    algo = config.environment(env_config={"task": "tests.rollout.turn_tasks:Talk"}).build_algo()
    table = inspect_policy(algo, problems=3, num_generations=2)
    algo.stop()
    assert max(map(len, table.replies)) == 2
    for replies, (_, row) in zip(table.replies, table.completions.iterrows(), strict=True):
        pieces, lines = [text.strip() for text in row["text"]], row["completion"].split("\n")
        assert len(pieces) == len(row["token"]) == len(row["logp"])
        start = 0
        for number, (at, text) in enumerate(replies):
            assert " ".join(pieces[start:at]) == f"{lines[2 * number]} <eos>".strip()
            assert text.split() == [*lines[2 * number + 1].split()[1:], ":"]
            start = at
        assert " ".join(pieces[start:]).removesuffix("<eos>").strip() == lines[2 * len(replies)]


def test_a_stock_algorithm_has_values_and_says_what_it_lacks(ray_session):
    from ray.rllib.algorithms.ppo import PPOConfig

    from rllib_distrl.algorithm.wiring import wire_language_model
    from rllib_distrl.settings import RolloutSettings
    from tests.helpers import COUNTDOWN, TINY

    config = wire_language_model(
        PPOConfig().environment(COUNTDOWN).env_runners(num_env_runners=0),
        TINY,
        RolloutSettings(max_completion_tokens=24),
    )
    stock = config.build_algo()
    table = inspect_policy(stock, rows=[5, 6], num_generations=3)
    stock.stop()
    assert table.completions["row"].tolist() == [5, 5, 5, 6, 6, 6]
    assert table.has("value")
    assert table.has("advantage")
    assert table.n_quantiles == 0
    with pytest.raises(ValueError, match="predicts one number"):
        table.numbers("quantiles")


@pytest.mark.slow
def test_two_learners_score_what_one_does(ray_session):
    config = distrl_config(prompts=4, generations=3)
    tables = []
    for learners in (0, 2):
        algo = config.copy(copy_frozen=False).learners(num_learners=learners).build_algo()
        tables.append(inspect_policy(algo, problems=5, num_generations=3, split="test"))
        algo.stop()
    one, two = tables
    assert one.completions["completion"].tolist() == two.completions["completion"].tolist()
    for column in ("logp", "value", "quantiles", "advantage", "advantage_used", "bonus"):
        np.testing.assert_allclose(one.numbers(column), two.numbers(column), atol=1e-4)
