import json

import pytest

from tests.golden.curve import FILE, METRICS, loss_curve


def test_the_losses_of_twenty_iterations_are_the_committed_ones():
    expected = json.loads(FILE.read_text())
    found = loss_curve()
    for name in METRICS:
        assert found[name] == pytest.approx(expected[name], rel=2e-6, abs=2e-6), name
    # The curve is worth watching: the policy moves, and lengths and rewards differ.
    assert len(set(expected["policy_loss"])) == 20
    assert min(expected["vf_loss"][-5:]) > 0
