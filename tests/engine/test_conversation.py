"""Completions of several turns: what is sampled does not depend on how answers come."""

import pytest

from rllib_distrl.engine import TorchEngine
from rllib_distrl.engine.conversation import converse
from tests.engine.conversations import ENDS, PARAMS, Script, check_logps
from tests.engine.engine_models import make_model, make_requests


def speak(engine, **options):
    requests = make_requests()
    script = Script(**options)
    found = dict(converse(engine, requests, PARAMS, script))
    return requests, [found[i] for i in range(len(requests))], script


def engine_of(name, decoder, **options):
    model = make_model(name)
    engine = TorchEngine(model.config, ENDS, decoder=decoder, **options)
    engine.load_weights(model.state_dict(), 0)
    return model, engine


@pytest.mark.parametrize("name", ["qwen2-gqa", "qwen3-gqa", "llama-biases-llama3"])
@pytest.mark.parametrize("batch", [256, 5])
def test_logps_are_those_of_a_full_forward_over_all_turns(name, batch):
    model, engine = engine_of(name, "compiled", max_batch_size=batch)
    requests, completions, script = speak(engine)
    assert {len(said) for said in script.said.values()} >= {0, 1, 2, 3}
    check_logps(model, requests, completions, script, atol=2e-5)


@pytest.mark.parametrize("late", [0, 2, 7])
@pytest.mark.parametrize("decoder", ["compiled", "fast", "generic"])
def test_neither_the_decoder_nor_when_answers_come_change_what_is_sampled(decoder, late):
    _, one = engine_of("qwen2-gqa", "compiled")
    want = [completion.tokens.tolist() for completion in speak(one)[1]]
    _, other = engine_of("qwen2-gqa", decoder, max_batch_size=7)
    assert other.resumes == (decoder == "compiled")
    assert [completion.tokens.tolist() for completion in speak(other, late=late)[1]] == want


def test_a_row_that_goes_on_computes_its_new_tokens_alone():
    _, engine = engine_of("qwen2-gqa", "compiled")
    computed, resume = [], engine.decoder.resume

    def counted(parked, more):
        computed.extend(map(len, more))
        return resume(parked, more)

    engine.decoder.resume = counted
    *_, script = speak(engine)
    # The last token of the turn was drawn, but nothing came after it that needed its state.
    assert sorted(computed) == sorted(1 + len(ids) for s in script.said.values() for _, ids in s)


def test_a_turn_ends_where_the_conversation_says_so():
    def stops(place, tokens):
        return len(tokens) % 5 == 0

    found = {}
    for decoder in ("compiled", "generic"):
        _, engine = engine_of("qwen2-gqa", decoder)
        _, completions, script = speak(engine, stops=stops)
        found[decoder] = [c.tokens.tolist() for c in completions]
        assert all(at % 5 == 0 or c.tokens[at - 1] in ENDS for i, c in enumerate(completions)
                   for at, _ in script.said.get(i, []))  # fmt: skip
        assert any(at % 5 == 0 for said in script.said.values() for at, _ in said)
    assert found["compiled"] == found["generic"]
