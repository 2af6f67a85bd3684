"""A learner that does not compute what sampled says so, once."""

import pytest

from rllib_distrl.algorithm.probe_check import MismatchWarning
from tests.helpers import distrl_config


@pytest.mark.parametrize(
    ("rollout", "training", "ratios", "times"),
    [
        ({}, {}, [1.0001, 1.04], 0),
        ({}, {}, [1.2, 3.0], 1),
        ({"dtype": "bfloat16"}, {}, [1.2], 0),
        ({}, {"precision": "bf16"}, [1.2, 1.6], 1),
        ({"max_staleness": 1}, {}, [3.0], 0),
        ({"top_p": 0.9}, {}, [3.0], 0),
    ],
)
def test_a_mismatch_far_outside_its_range_is_told_once(rollout, training, ratios, times, caplog):
    warn = MismatchWarning(distrl_config(**training).rollout(**rollout))
    for ratio in ratios:
        warn(ratio)
    assert len(caplog.records) == times
    assert all("logp_mismatch_p95" in record.message for record in caplog.records)
