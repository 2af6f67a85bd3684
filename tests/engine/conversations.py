"""A scripted partner for conversations with engines."""

import numpy as np
import torch

from rllib_distrl.engine import SamplingParams
from rllib_distrl.engine.conversation import Answer
from tests.engine.engine_models import EOS

PARAMS = SamplingParams(max_tokens=24, temperature=1.3)
ENDS = [EOS, 7, 9, 11, 20, 33]  # turns of some ten tokens
TURNS = 4


class Script:
    """Answers each turn but the fourth with one to nine tokens that depend on what was sampled."""

    longest = 90

    def __init__(self, *, late=0, stops=None):
        self.late, self.stops = late, stops
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


def whole_row(request, completion, said):
    """The row's tokens, and where its sampled ones are."""
    ids, places, done = list(request.prompt_ids), [], 0
    for at, reply in [*said, (len(completion.tokens), [])]:
        places += range(len(ids), len(ids) + at - done)
        ids += [*completion.tokens[done:at].tolist(), *reply]
        done = at
    return ids, places


@torch.no_grad()
def check_logps(model, requests, completions, script, atol):
    """Each completion's logps against one full forward over its row, replies included."""
    for place, (request, completion) in enumerate(zip(requests, completions, strict=True)):
        ids, places = whole_row(request, completion, script.said.get(place, []))
        assert [ids[p] for p in places] == completion.tokens.tolist()
        logits = model(torch.tensor([ids])).logits[0].double() / PARAMS.temperature
        want = logits.log_softmax(-1)[[p - 1 for p in places], completion.tokens]
        np.testing.assert_allclose(completion.logps, want, atol=atol)
