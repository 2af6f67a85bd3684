"""What no CPU shows; run where there is a GPU."""

import numpy as np
import pytest
import torch

from rllib_distrl.engine import SamplingParams
from tests.engine.engine_models import FAST, make_engine, make_model, make_requests
from tests.engine.engine_models import reference_logps as reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SAMPLED = SamplingParams(max_tokens=40, temperature=1.4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAST)
def test_graphs_sample_what_the_model_computes(name, dtype):
    model, requests = make_model(name), make_requests()
    engine = make_engine(model, device="cuda", dtype=dtype)
    assert type(engine.decoder).__name__ == "FastDecoder"
    for _ in range(2):  # recorded, then replayed
        completions = engine.generate(requests, SAMPLED)
        errors = [
            np.abs(c.logps - reference(model, r, c, SAMPLED.temperature)).mean()
            for r, c in zip(requests, completions, strict=True)
        ]
        assert np.mean(errors) < (1e-5 if dtype == torch.float32 else 0.1)


def test_a_wider_call_records_its_graphs_anew():
    model, requests = make_model("qwen2-gqa"), make_requests(prompts=9, samples=5)
    engine = make_engine(model, device="cuda", max_batch_size=64)
    alone = [engine.generate([request], SAMPLED)[0] for request in requests]
    together = engine.generate(requests, SAMPLED)
    assert [c.tokens.tolist() for c in together] == [c.tokens.tolist() for c in alone]
