import pytest

from rllib_distrl.learner.step import lr_factor


def factors(*ks, **settings):
    return [lr_factor(k, **settings) for k in ks]


def test_warm_up_is_linear_and_ends_at_one():
    assert factors(1, 2, 4, 5, 100, warmup_iterations=4) == [0.25, 0.5, 1.0, 1.0, 1.0]


def test_cosine_by_hand():
    # cos(pi/3) = 1/2: 0.1 + 0.9 * 3/4; cos(pi/2) = 0: 0.1 + 0.45.
    settings = {"schedule": "cosine", "decay_iterations": 7, "min_ratio": 0.1}
    assert factors(1, 3, 4, 7, 8, **settings) == pytest.approx([1.0, 0.775, 0.55, 0.1, 0.1])


def test_warm_up_then_cosine():
    settings = {"schedule": "cosine", "warmup_iterations": 2, "decay_iterations": 4}
    assert factors(1, 2, 3, 4, 5, **settings) == pytest.approx([0.5, 1.0, 0.5, 0.0, 0.0])


def test_never_above_one_and_never_rising_after_the_warm_up():
    settings = {"schedule": "cosine", "warmup_iterations": 3, "decay_iterations": 50}
    values = factors(*range(1, 60), **settings)
    assert max(values) == 1.0
    assert values[2:] == sorted(values[2:], reverse=True)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"schedule": "cosinus"}, "must be one of"),
        ({"schedule": "cosine"}, "needs lr_decay_iterations above 1"),
        (
            {"schedule": "cosine", "warmup_iterations": 5, "decay_iterations": 5},
            "above 5",
        ),
    ],
)
def test_refusals(settings, words):
    with pytest.raises(ValueError, match=words):
        lr_factor(9, **settings)
