"""The built-in models: what is built, that it learns, and that building disturbs nobody."""

import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from distrl_envs.task import distinct_rows
from distrl_envs.tasks import make_task
from distrl_envs.tasks.countdown import CountdownTask
from distrl_envs.tokenizers import EOS, VOCABULARY, small_tokenizer
from distrl_envs.turns import EnvReply, ReplyTokens, interleaved
from rllib_distrl.engine.protocol import Request, SamplingParams
from rllib_distrl.engine.torch_engine import TorchEngine
from rllib_distrl.model.builtin import (
    SPECS,
    VALIDATION_EXAMPLES,
    BuiltinSpec,
    builtin_folder,
    example_batches,
    find_spec,
    learning_rate,
)
from rllib_distrl.model.loading import (
    eos_token_ids,
    load_generation_config,
    load_model,
    load_tokenizer,
    resolve,
)

SHORT = replace(SPECS["countdown-tiny"], steps=40)


def meta_of(folder):
    return json.loads((folder / "meta.json").read_text())


class TwoOrThreeNumbers(CountdownTask):
    """Examples of different lengths."""

    def attempt(self, draws, row):
        self.numbers = 2 + draws.below(2)
        return super().attempt(draws, row)


def test_examples_are_solved_problems_padded_on_the_right():
    task = TwoOrThreeNumbers()
    (batch,) = example_batches(task, np.random.default_rng(0), 1, 40)
    tokens, targets = batch[0].tolist(), batch[1].tolist()
    solved = task.sample_solved(np.random.default_rng(0))
    decode = small_tokenizer().decode
    lengths = set()
    for row, (ids, counted) in enumerate(zip(tokens, targets, strict=True)):
        start, end = counted.index(True), len(counted) - counted[::-1].index(True)
        assert all(counted[start:end]) and set(ids[end:]) <= {0}
        assert decode(ids[start - 1]) == ":" and ids[end - 1] == VOCABULARY[EOS]
        prompt, answer = decode(ids[:start]), decode(ids[start : end - 1])
        numbers, _, target = prompt.removesuffix(" :").partition(" -> ")
        data = {"numbers": tuple(map(int, numbers.split())), "target": int(target)}
        assert task.grade(replace(solved[0], data=data), answer).score == 1.0
        lengths.add(end)
        if row == 0:
            assert (prompt, answer) == (solved[0].prompt, solved[1])
    assert lengths == {2 + 3 + 6, 3 + 3 + 12}


@pytest.mark.parametrize("name", ["blackjack", "mastermind", "countdown_check"])
def test_demonstrations_of_turns_are_the_environments_own_tokens(name):
    task, tokenizer = make_task(name), small_tokenizer()
    replies_of = ReplyTokens(tokenizer, task.reply_roles, task.max_reply_tokens)
    ((tokens, targets),) = example_batches(task, np.random.default_rng(3), 1, 16)
    rng, turns_of = np.random.default_rng(3), set()
    for row, said in zip(tokens, targets, strict=True):
        problem, turns = task.sample_demonstration(rng)
        prompt = tokenizer.encode(problem.prompt, add_special_tokens=False)
        completion, replies = [], []
        for turn in turns:
            completion += tokenizer.encode(turn.completion, add_special_tokens=False)
            completion.append(tokenizer.eos_token_id)
            if turn.reply is not None and not turn.reply.over:
                ids, _ = replies_of.encode(turn.reply, tokenizer.eos_token_id, prompt[-1])
                replies.append(EnvReply(len(completion), ids, turn.reply))
        ids = interleaved(prompt, completion, replies)
        assert row[: len(ids)].tolist() == ids
        assert not said[len(ids) :].any()
        assert row[said].tolist() == completion
        turns_of.add(len(turns))
    assert max(turns_of) > 1


def test_learning_rate_by_hand():
    spec = BuiltinSpec("x", steps=110, warmup_steps=10, lr=0.5)
    assert learning_rate(spec, 0) == pytest.approx(0.05)
    assert learning_rate(spec, 9) == pytest.approx(0.5)
    assert learning_rate(spec, 10) == pytest.approx(0.5)
    assert learning_rate(spec, 60) == pytest.approx(0.5 * (0.02 + 0.98 / 2))
    assert learning_rate(spec, 109) == pytest.approx(0.5 * 0.02, rel=0.02)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    return builtin_folder(SHORT, tmp_path_factory.mktemp("cache"))


def test_the_recorded_loss_is_hugging_faces_own(short):
    task = CountdownTask("validation")
    rng = np.random.default_rng(SHORT.seed)
    ((tokens, targets),) = example_batches(task, rng, 1, VALIDATION_EXAMPLES)
    labels = tokens.masked_fill(~targets, -100)
    with torch.no_grad():
        loss = load_model(str(short))(input_ids=tokens, labels=labels).loss.item()
    assert meta_of(short)["validation_loss"] == pytest.approx(loss, rel=1e-5)


def test_it_learns(short):
    untrained = math.log(len(VOCABULARY))
    assert meta_of(short)["validation_loss"] < 0.6 * untrained


def test_the_folder_is_a_plain_hugging_face_folder(short):
    model, tokenizer = load_model(str(short)), load_tokenizer(str(short))
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert eos_token_ids(model, tokenizer) == (VOCABULARY[EOS],)
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id == 0
    assert model.config.max_position_embeddings == 128
    assert meta_of(short)["parameters"] == model.num_parameters()
    assert "model.safetensors" in meta_of(short)["files"]
    saved = load_generation_config(str(short)).to_diff_dict()
    assert SHORT.generation_config().to_diff_dict() == saved


def test_building_depends_on_its_seed_alone_and_disturbs_nobody(short, tmp_path):
    torch.manual_seed(11), np.random.seed(12), random.seed(13)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.inference_mode():
            again = builtin_folder(SHORT, tmp_path)
            assert torch.is_inference_mode_enabled()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]

    weights = "model.safetensors"
    assert meta_of(again)["files"][weights] == meta_of(short)["files"][weights]
    other = builtin_folder(replace(SHORT, seed=1), tmp_path)
    assert meta_of(other)["files"][weights] != meta_of(short)["files"][weights]


def test_every_field_of_the_specification_is_in_the_key():
    changed = [
        replace(SHORT, **{name: value})
        for name, value in {
            "task_config": {"numbers": 3},
            "hidden_size": 64,
            "intermediate_size": 128,
            "initializer_range": 0.02,
            "steps": 41,
            "lr": 0.01,
            "seed": 1,
            "start": "countdown",
        }.items()
    ]
    assert all(spec.key() != SHORT.key() for spec in changed)


def test_a_model_starts_from_another(short, monkeypatch):
    monkeypatch.setitem(SPECS, "short", SHORT)
    on = replace(SHORT, name="on", start="short", steps=1, lr=1e-6, seed=1)
    key, root = on.key(), short.parent
    weights, before = (load_model(str(f)).state_dict() for f in (builtin_folder(on, root), short))
    assert all(torch.allclose(weights[name], before[name], atol=2e-6) for name in before)
    assert any(not weights[name].equal(before[name]) for name in before)
    monkeypatch.setitem(SPECS, "short", replace(SHORT, steps=41))
    assert on.key() != key  # What it starts from is another model.


def test_find_spec():
    assert find_spec("builtin:countdown") is SPECS["countdown"]
    with pytest.raises(ValueError, match=r"Got model 'builtin:Countdown'.*builtin:countdown"):
        find_spec("builtin:Countdown")


def test_the_tiny_model_mostly_knows_the_form_of_an_answer():
    statuses = sampled_grades("builtin:countdown-tiny", problems=40, samples=4)[1]
    answers = sum(statuses.values())
    assert answers == 160
    assert statuses.get("wrong", 0) + statuses.get("correct", 0) > 0.8 * answers


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a warm start may have to wait for another process
def test_countdown_starts_where_there_is_something_to_learn():
    correct, _ = sampled_grades("builtin:countdown", problems=300, samples=64)
    assert 0.10 < correct.mean() < 0.25
    assert correct.any(axis=1).mean() > 0.85  # pass@64
    assert 100_000 < load_model("builtin:countdown").num_parameters() < 300_000


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a warm start may have to wait for another process
def test_six_numbers_are_harder_and_still_within_reach():
    correct, statuses = sampled_grades("builtin:countdown-6", problems=100, samples=64)
    assert 0.02 < correct.mean() < 0.10
    assert correct.any(axis=1).mean() > 0.7  # pass@64
    assert statuses["wrong"] + statuses["correct"] > 0.95 * correct.size


def sampled_grades(name, problems, samples):
    """Correct or not (problems, samples) on validation problems at temperature 1; statuses."""
    model, tokenizer = load_model(resolve(name)), load_tokenizer(name)
    engine = TorchEngine(model.config, eos_token_ids(model, tokenizer), max_batch_size=256)
    engine.load_weights(model.state_dict(), 0)
    task = find_spec(name).make_task("validation")
    asked = [task.problem(row) for row in distinct_rows(task, problems)]
    requests = [
        Request(tokenizer.encode(problem.prompt, add_special_tokens=False), (5, row, sample, 0))
        for row, problem in enumerate(asked)
        for sample in range(samples)
    ]
    completions = engine.generate(requests, SamplingParams(max_tokens=task.max_completion_tokens))
    correct = np.zeros(len(requests), dtype=bool)
    statuses = {}
    for i, completion in enumerate(completions):
        cut = completion.finish_reason == "length"
        ids = [int(token) for token in completion.tokens]
        text = tokenizer.decode(ids if cut else ids[:-1])
        grade = task.grade(asked[i // samples], text, truncated=cut)
        correct[i] = grade.score == 1.0
        statuses[grade.status] = statuses.get(grade.status, 0) + 1
    return correct.reshape(problems, samples), statuses
