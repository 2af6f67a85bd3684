"""Completions of several turns: what is sampled does not depend on how answers come."""

import numpy as np
import pytest
import torch

from rllib_distrl.engine import SamplingParams, TorchEngine
from rllib_distrl.engine.conversation import Answer, converse
from tests.engine.engine_models import EOS, make_model, make_requests

PARAMS = SamplingParams(max_tokens=24, temperature=1.3)
ENDS = [EOS, 7, 9, 11, 20, 33]  # turns of some ten tokens
TURNS = 4


class Script:
    """Answers each turn but the fourth with one to nine tokens that depend on what was sampled."""

    longest = 90

    def __init__(self, lens, *, late=0, stops=None):
        self.lens, self.late, self.stops = lens, late, stops
        self.said, self.given, self.asked = {}, [], 0

    def ended(self, place, tokens):
        said = self.said.setdefault(place, [])
        over = len(tokens) >= PARAMS.max_tokens or len(said) == TURNS - 1
        if self.stops is None:
            assert over or tokens[-1] in ENDS
        if over:
            return False
        ids = [30 + int(token) % 20 for token in tokens[-1 - len(tokens) % 9 :]]
        if tokens[-1] == 33:
            ids = []  # over
        else:
            said.append((len(tokens), ids))
        self.given.append(Answer(place, ids, PARAMS.max_tokens))
        return True

    def ready(self, *, wait):
        self.asked += 1
        if self.late and not wait and self.asked % self.late:
            return []
        now, self.given = self.given[::-1], []
        return now


def speak(engine, **options):
    requests = make_requests()
    script = Script([len(r.prompt_ids) for r in requests], **options)
    found = dict(converse(engine, requests, PARAMS, script))
    return requests, [found[i] for i in range(len(requests))], script


def engine_of(name, decoder, **options):
    model = make_model(name)
    engine = TorchEngine(model.config, ENDS, decoder=decoder, **options)
    engine.load_weights(model.state_dict(), 0)
    return model, engine


def whole_row(request, completion, said):
    """The row's tokens, and where its sampled ones are."""
    ids, places, done = list(request.prompt_ids), [], 0
    for at, reply in [*said, (len(completion.tokens), [])]:
        places += range(len(ids), len(ids) + at - done)
        ids += [*completion.tokens[done:at].tolist(), *reply]
        done = at
    return ids, places


@pytest.mark.parametrize("name", ["qwen2-gqa", "qwen3-gqa", "llama-biases-llama3"])
@pytest.mark.parametrize("batch", [256, 5])
def test_logps_are_those_of_a_full_forward_over_all_turns(name, batch):
    model, engine = engine_of(name, "compiled", max_batch_size=batch)
    requests, completions, script = speak(engine)
    assert {len(said) for said in script.said.values()} >= {0, 1, 2, 3}
    for place, (request, completion) in enumerate(zip(requests, completions, strict=True)):
        ids, places = whole_row(request, completion, script.said.get(place, []))
        assert [ids[p] for p in places] == completion.tokens.tolist()
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double() / PARAMS.temperature
        want = logits.log_softmax(-1)[[p - 1 for p in places], completion.tokens]
        np.testing.assert_allclose(completion.logps, want, atol=2e-5)


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
