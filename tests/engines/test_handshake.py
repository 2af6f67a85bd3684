"""What the handshake's probe samples."""

from __future__ import annotations

import numpy as np
import pytest

from rllib_distrl.engines import Request, SamplingParams
from rllib_distrl.engines.handshake import take_probe
from tests.engines.engine_models import make_engine, make_model, make_requests, reference_logps

NARROW = {
    "nucleus": {"top_p": 0.2},
    "three tokens": {"top_k": 3},
    "greedy": {"greedy": True},
}


@pytest.mark.parametrize("name", NARROW)
def test_a_probe_samples_from_the_whole_distribution_at_the_temperature_of_training(
    name: str,
) -> None:
    model = make_model("qwen2-tied")
    engine = make_engine(model)
    prompt = make_requests()[0].prompt_ids
    params = SamplingParams(max_tokens=40, temperature=1.4, **NARROW[name])
    probe = take_probe(engine, prompt, params)
    request = Request(prompt, (0, 0, 0, 0))
    want = reference_logps(model, request, probe, 1.4)
    np.testing.assert_allclose(probe.logps, want, atol=1e-5)
    assert len(probe.tokens) <= 8
    plain = take_probe(engine, prompt, SamplingParams(max_tokens=40, temperature=1.4))
    assert probe.tokens.tolist() == plain.tokens.tolist()
