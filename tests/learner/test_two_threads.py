"""Weights that are asked for while another thread trains, as in parallel evaluation."""

import threading

import numpy as np
from ray.rllib.core import COMPONENT_RL_MODULE

from tests.learner.rig import hot_config, make_learner, sample


def flat(state):
    weights = state[COMPONENT_RL_MODULE]["default_policy"]
    return np.concatenate([np.ravel(weights[name]) for name in sorted(weights)])


def test_weights_are_those_before_or_after_an_update_never_between():
    config = hot_config()
    learner = make_learner(config)
    learner.build()
    first_step, asked = threading.Event(), threading.Event()
    apply_gradients = learner.apply_gradients

    def slow_steps(gradients):
        apply_gradients(gradients)
        first_step.set()
        asked.wait(5.0)

    learner.apply_gradients = slow_steps
    before = flat(learner.get_state())
    arguments = {"episodes": sample(config), "minibatch_size": 3, "num_epochs": 2}
    training = threading.Thread(target=learner.update, kwargs=arguments)
    training.start()
    assert first_step.wait(60.0)
    got = []
    evaluation = threading.Thread(target=lambda: got.append(flat(learner.get_state())))
    evaluation.start()
    evaluation.join(0.3)
    asked.set()
    training.join()
    evaluation.join()
    after = flat(learner.get_state())
    assert not np.array_equal(before, after)
    assert np.array_equal(got[0], after)


def test_weights_that_were_handed_out_stay_as_they_were():
    config = hot_config()
    learner = make_learner(config)
    learner.build()
    state = learner.get_state()
    before = flat(state).copy()
    learner.update(episodes=sample(config))
    assert np.array_equal(flat(state), before)
    assert not np.array_equal(flat(learner.get_state()), before)
